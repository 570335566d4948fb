"""The main job, with what its process drew for each step written down: a digest of every row of its part of the batch.

NOTES=FILE python -m tests.experiments.noted FLAGS      # appends to FILE.<process>
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from robovlms_jax.training import loop


def digests(batch: Any) -> list[str]:
    """Of each row: everything that it holds, bit by bit."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    return [
        hashlib.sha256(b"".join(np.ascontiguousarray(leaf[row]).tobytes() for leaf in leaves)).hexdigest()
        for row in range(len(leaves[0]))
    ]


def noting(draw: Any) -> Any:
    def noted(batches: Iterator[Any], step: int) -> Any:
        batch = draw(batches, step)
        with open(f"{os.environ['NOTES']}.{jax.process_index()}", "a") as file:
            file.write(json.dumps({"step": step, "rows": digests(batch)}) + "\n")
        return batch

    return noted


if __name__ == "__main__":
    loop._next = noting(loop._next)
    runpy.run_module("experiments.calvin_abcd", run_name="__main__", alter_sys=True)
