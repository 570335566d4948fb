"""How many cores this process may use, which on a shared machine are fewer than there are."""

from __future__ import annotations

import os


def usable() -> int:
    """Cores that this process is let to use, at least 1: those that SLURM, `taskset` or a container's list of cores
    leave it, where the system tells it (Linux), or else all of the machine. A container's share of processor time
    is not looked at."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # noqa: TID251 (the one place)
