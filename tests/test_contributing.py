"""The worked examples in CONTRIBUTING.md run as they stand there."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from tests.processes import run_python

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


RUN_EACH = """
import json, runpy, sys, traceback
failed = {}
for heading, path in json.loads(sys.argv[1]).items():
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException:
        failed[heading] = traceback.format_exc()
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> dict[str, str]:
    """Heading -> how its example ended, of those that failed."""
    # All in one process, which imports JAX once, and not in this one: what they register must not reach tests that run
    # over a registry.
    paths = {heading: tmp_path_factory.mktemp("example") / "example.py" for heading in examples()}
    for heading, path in paths.items():
        path.write_text(examples()[heading])
    listed = json.dumps({heading: str(path) for heading, path in paths.items()})
    return json.loads(run_python("-c", RUN_EACH, listed).splitlines()[-1])


@pytest.mark.parametrize("heading", examples())
def test_example_runs(heading: str, failed: dict[str, str]):
    assert heading not in failed, failed[heading]
