"""A run that is stopped in every way ends bit for bit as one that never was."""

from __future__ import annotations

import json

import pytest

from tests.processes import run_python


@pytest.mark.slow
def test_stopped_runs_end_as_one_never_stopped(tmp_path):
    # Each kind of stop once. Fails if anything that a step depends on is
    # not in the checkpoint, or a run goes on from another step than the newest complete one.
    out = tmp_path / "faults.json"
    run_python("-m", "benchmarks.faults", "--cases", 4, "--seed", 1, "--out", out, TMPDIR=str(tmp_path))
    result = json.loads(out.read_text())
    assert result["identical_end"]
    assert len({case["kind"] for case in result["cases"]}) == 4
    for case in result["cases"]:
        assert case["identical"] and case["resumed"] == case["expected"], case
    assert sum(case["compared"] for case in result["cases"]) > 0
