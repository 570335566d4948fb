"""A run that a scheduler stops."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from robovlms_jax.training import checkpoints
from tests.experiments.test_calvin_abcd import ROOT, SETTINGS, metrics_of


@pytest.mark.slow
def test_sigterm_of_a_real_process_saves(tmp_path):
    output = tmp_path / "stopped"
    settings = SETTINGS | {"train.output": output, "train.steps": 100000, "train.checkpoint_every": 100000}
    flags = [(f"--{name}", *map(str, x if isinstance(x, tuple) else (x,))) for name, x in settings.items()]
    command = [sys.executable, "-m", "experiments.calvin_abcd", "--preset", "sample", *itertools.chain(*flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (output / "metrics.jsonl").exists() or len(metrics_of(output)) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no step within five minutes"
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    assert "stopped by SIGTERM" in messages
    step = int(checkpoints.locate(output).name)
    assert step >= 3
