"""A run that is stopped in every way ends bit for bit as one that never was."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_stopped_runs_end_as_one_never_stopped(tmp_path):
    # Each kind of stop once. Fails if anything that a step depends on is
    # not in the checkpoint, or a run goes on from another step than the newest complete one.
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--cases", "4", "--seed", "1", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["identical_end"]
    assert len({case["kind"] for case in result["cases"]}) == 4
    for case in result["cases"]:
        assert case["identical"] and case["resumed"] == case["expected"], case
    assert sum(case["compared"] for case in result["cases"]) > 0
