"""The configuration that a checkpoint was trained with, and what was found out about it later."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from robovlms_jax import atomic, json_files
from robovlms_jax.policies.confidence import Calibration
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import from_dict
from robovlms_jax.training.items import read_serving

CALIBRATION = "calibration.json"
"""Beside the parts of a step directory; not under its seal, for it comes later."""

NEEDED = {
    "backbone": ("name", "dtype", "lora_rank", "lora_alpha"),
    "policy": (
        *("history", "readout", "head", "num_queries", "window", "chunk"),
        *("cameras", "action_low", "action_high"),
    ),
    "data": ("text_length",),
}
"""Fields that checkpoints of every version have, and that must not be guessed: with a default in their place, a robot
would be sent other actions. What came later has defaults that leave it off."""


def read_checkpoint(directory: pathlib.Path) -> tuple[ExperimentConfig, dict[str, str]]:
    """The resolved configuration of a step directory, and its backbone's small files by name.

    Raises FileNotFoundError, ValueError: something is missing, damaged or of another type; names file and field.
    """
    serving, path = read_serving(directory), directory / "serving"
    saved = serving["config"]
    for part, fields in NEEDED.items():
        found = saved.get(part)
        missing = [name for name in fields if isinstance(found, Mapping) and name not in found]
        if found is None or missing:
            names = ", ".join(f"{part}.{name}" for name in missing) or part
            raise ValueError(
                f"{path}: its configuration has no {names}. No default may stand in for what a policy was trained "
                "with: copy the checkpoint again, or write down the value that it was trained with."
            )
    try:
        return from_dict(ExperimentConfig, _as_meant(saved)), serving["assets"]
    except ValueError as error:
        raise ValueError(f"{path}: {error} It was edited, or written by a newer version.") from None


def _as_meant(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what a head computed before there was a field for it, where the field's default is something else. A head is
    saved with all of its fields, so one that is not there was unknown."""
    policy = saved["policy"]
    head = policy["head"] if isinstance(policy, Mapping) else None
    kind = head.get("kind") if isinstance(head, Mapping) else None
    if kind not in heads.kinds():  # refused, with the path, by who reads it
        return saved
    earlier = heads.config_of(kind).EARLIER
    return {**saved, "policy": {**policy, "head": {**earlier, **head}}}


def read_calibration(directory: pathlib.Path) -> Calibration | None:
    """The calibration of a step directory; None where there is none. Raises ValueError for one that cannot be read."""
    path = directory / CALIBRATION
    if not path.is_file():
        return None
    values = json_files.read_object(path, "a calibration")
    try:
        quantiles = tuple(math.inf if x is None else float(x) for x in values["quantiles"])
        return Calibration(quantiles, float(values["coverage"]), int(values["episodes"]), bool(values["scaled"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no calibration: {error!r}. Run experiments.calibrate again.") from error


def write_calibration(directory: pathlib.Path, calibration: Calibration, facts: dict[str, Any]) -> pathlib.Path:
    """Beside the checkpoint; infinite quantiles are null."""
    path = directory / CALIBRATION
    values = dataclasses.asdict(calibration) | facts
    values["quantiles"] = [None if math.isinf(x) else x for x in calibration.quantiles]
    atomic.write_json(path, values)  # a robot may be loading the checkpoint meanwhile, and half a file is refused
    return path
