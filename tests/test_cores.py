"""Threads are as many as the cores that a process may use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from robovlms_jax import cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not tell")
def test_cores_are_those_that_the_process_may_use_and_not_those_of_the_machine():
    # Fails if the machine's are counted: a job that SLURM gives 4 of 128 cores would start 128 threads for pictures.
    show = "import os; from robovlms_jax import cores; print(cores.usable())"
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); {show}"
    assert int(subprocess.check_output([sys.executable, "-c", code])) == 1
    assert cores.usable() == len(os.sched_getaffinity(0))


def test_where_the_system_does_not_tell_there_is_at_least_one(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.usable() == 1
