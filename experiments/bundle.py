"""A checkpoint made small, to pass on: what only training needs is left out, parameters are stored in 16 bits.

    python -m experiments.bundle --checkpoint runs/playtable_fixtures --out policies/playtable_fixtures

What is written opens, serves and evaluates like any checkpoint; only resuming needs the original. IEEE's 16-bit
floating point keeps 11 binary digits of each parameter (bfloat16 keeps 8); parameters beyond its range are refused.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import shutil
import sys

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from robovlms_jax import atomic, cli
from robovlms_jax.runs import logs, saved
from robovlms_jax.runs.load import open_model
from robovlms_jax.training import checkpoints, items, seals

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BundleConfig:
    """What to make small, and where to write it."""

    checkpoint: str
    """Run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME."""
    out: str
    """Directory to write: a checkpoint like any other."""


def halve(params: object) -> object:
    """The same tree in float16. Raises ValueError that names a parameter beyond its range."""
    largest = float(np.finfo(np.float16).max)
    for path, value in flatten_dict(params, sep="/").items():
        if not np.isfinite(value).all() or np.abs(value).max(initial=0) > largest:
            raise ValueError(f"parameter {path} has values beyond {largest:g} or not finite.")
    return jax.tree.map(lambda x: np.asarray(x, np.float16), params)


def forget_places(step: pathlib.Path) -> None:
    """Orbax notes in a step directory where it was written, which is nobody's business elsewhere."""
    for note in step.glob("*/commit_success.txt"):
        note.write_text("Checkpoint commit was successful.", encoding="utf-8")
    seals.seal(step)


def bundle(config: BundleConfig) -> pathlib.Path:
    """Returns the step directory. Raises ValueError, OSError that say what to change."""
    source = checkpoints.locate(config.checkpoint, strict=True)
    log.info("reading %s", source)
    serving = items.read_serving(source)
    _, params, _ = open_model(source, weights="float32", dtype="float32")
    params = jax.device_get(params)
    log.info("writing %s", config.out)
    out = pathlib.Path(config.out).expanduser().resolve()
    with atomic.becoming_folder(out) as folder:
        written = checkpoints.write_policy(folder, halve(params), serving)
        forget_places(written)
        if (source / saved.CALIBRATION).is_file():
            shutil.copy2(source / saved.CALIBRATION, written)
    return out / written.relative_to(folder)


def main() -> None:
    logs.to_stderr(absl=logging.ERROR)
    config = cli.read(BundleConfig, description=__doc__)
    try:
        target = bundle(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    log.info("%s: %.2f MB", target, size / 1e6)


if __name__ == "__main__":
    main()
