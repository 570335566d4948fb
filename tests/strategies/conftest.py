"""Protocols of many runs within a process of many tests."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True)
def programs_are_kept(monkeypatch):
    """A protocol forgets all compiled programs after each run, which would make every test after it compile again."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
