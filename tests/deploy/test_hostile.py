"""Whatever clients send: the server goes on, other robots notice nothing, nothing is kept."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("websockets", reason="the server needs the extra `serve`")

from tests.deploy import hostile


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_some_bad_messages_do_no_harm():
    said = []
    hostile.attack(40, report=said.append)  # asserts that a good robot beside them is served
    assert int(said[-1].split(" bad messages")[0]) >= 40


@pytest.mark.slow
def test_thirty_thousand_bad_messages_do_no_harm_and_leave_no_memory_behind():
    assert hostile.attack(30_000, seed=1) < 30
