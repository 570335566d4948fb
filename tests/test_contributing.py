"""The worked examples in CONTRIBUTING.md run as they stand there."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def examples() -> dict[str, str]:
    """Heading -> its python block."""
    sections = re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)[1:]
    blocks = {}
    for section in sections:
        found = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        assert len(found) <= 1, f"two python blocks under one heading: {section.splitlines()[0]}"
        if found:
            blocks[section.splitlines()[0]] = found[0]
    return blocks


def test_every_playbook_has_an_example_that_asserts():
    blocks = examples()
    assert set(blocks) == {
        *("Add a backbone", "Add a head", "Add a task", "Add a sensor", "Add a dataset", "Add a robot")
    }
    for heading, block in blocks.items():
        assert block.count("\nassert ") >= 3, heading


def test_every_place_that_the_table_sends_to_exists():
    section = re.search(r"^## I want to change .*?\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)[1]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    for row in rows:
        places = re.findall(r"`([^`<]*(?:\.py|/))`", row)
        assert places or "<family>" in row, row
        for place in places:
            assert any((root / place).exists() for root in (ROOT / "robovlms_jax", ROOT)), f"{place} does not exist"


@pytest.mark.parametrize("heading", examples())
def test_example_runs(heading: str, tmp_path: pathlib.Path):
    # In a process of its own: what it registers must not reach tests that run over a registry.
    path = tmp_path / "example.py"
    path.write_text(examples()[heading])
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
