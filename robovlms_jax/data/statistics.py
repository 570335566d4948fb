"""Mean, spread and quantiles of actions and state, in the JSON layout that OpenVLA and RoboVLMs publish.

    {"action": {"mean": [A], "std": [A], "max": [A], "min": [A], "q01": [A], "q99": [A], "mask": [A]},
     "proprio": {the same without mask}, "num_transitions": n, "num_trajectories": n}

One difference in meaning, undone on reading: in the files binary grippers (mask False) run from 0 to 1, here from -1 to
1.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax import json_files
from robovlms_jax.actions.statistics import summarize
from robovlms_jax.control import robot as robots

KEYS = ("mean", "std", "max", "min", "q01", "q99")
SEVEN = (True,) * 6 + (False,)
"""`mask` of files that have none: an arm's six numbers and the gripper."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one dataset.

    action, proprio: name in `KEYS` -> float64[d]; proprio may have d = 0. Binary grippers are in -1 ... 1.
    num_transitions, num_trajectories: what they are taken over.
    mask: per action dimension, False for binary grippers, which are not scaled.
    """

    action: Mapping[str, np.ndarray]
    proprio: Mapping[str, np.ndarray]
    num_transitions: int
    num_trajectories: int
    mask: tuple[bool, ...] = SEVEN

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) float64 of the scaled dimensions: their 1 % and 99 % quantiles, one unit apart where one never
        changes."""
        low, high = (self.action[name][np.array(self.mask)] for name in ("q01", "q99"))
        still = high - low < 1e-6
        return np.where(still, low - 0.5, low), np.where(still, high + 0.5, high)

    def to_json(self) -> dict[str, Any]:
        """Upstream's layout, with `mask` (OpenVLA's key): which dimensions are normalised, all but binary grippers."""
        action, binary = {key: self.action[key].copy() for key in KEYS}, ~np.array(self.mask)
        for key in KEYS:
            action[key][binary] = action[key][binary] / 2 if key == "std" else (action[key][binary] + 1) / 2
        return {
            "action": {key: value.tolist() for key, value in action.items()} | {"mask": list(self.mask)},
            "proprio": {key: self.proprio[key].tolist() for key in KEYS},
            "num_transitions": self.num_transitions,
            "num_trajectories": self.num_trajectories,
        }


def compute(
    actions: np.ndarray, states: np.ndarray, num_trajectories: int, mask: tuple[bool, ...] = SEVEN
) -> Statistics:
    """Over all steps of a dataset: actions float[N, A], states float[N, s]; `mask` as in `Statistics`.
    Raises ValueError for N = 0."""
    return Statistics(summarize(actions), summarize(states), len(actions), num_trajectories, mask)


def mask_of(robot: robots.RobotSpec) -> tuple[bool, ...]:
    """`Statistics.mask` of a robot's actions."""
    return tuple(dimension.kind != "binary" for dimension in robot.action)


def shrink(action: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """`action` with its quantiles moved towards the middle between them: `share` of the distance is left.

    0.65 makes one normalisation of what upstream's configs do in two: clip(x, -0.65, 0.65) / 0.65 after the quantiles.
    """
    middle, half = (action["q01"] + action["q99"]) / 2, (action["q99"] - action["q01"]) / 2 * share
    return {**action, "q01": middle - half, "q99": middle + half}


def from_json(content: Mapping[str, Any], name: str) -> Statistics:
    """Inverse of `to_json`; also reads published files. Raises ValueError naming what is missing in `name`."""
    try:
        parts = {}
        for part in ("action", "proprio"):
            listed = content.get(part) or {}
            if part == "proprio" and not listed:
                listed = {key: [] for key in KEYS}
            parts[part] = {key: np.array(listed[key], np.float64) for key in KEYS}
            sizes = {len(value) for value in parts[part].values()}
            if len(sizes) != 1:
                raise ValueError(f"{part} has lists of lengths {sorted(sizes)}")
        mask = tuple(map(bool, content["action"].get("mask", SEVEN)))
        if len(parts["action"]["mean"]) != len(mask):
            has = len(parts["action"]["mean"])
            raise ValueError(f"action has {has} dimensions, expected {len(mask)}, one for each entry of mask")
        if not all(np.isfinite(value).all() for part in parts.values() for value in part.values()):
            raise ValueError("a value is not finite")
        for key, value in parts["action"].items():
            value[~np.array(mask)] = value[~np.array(mask)] * 2 - (0 if key == "std" else 1)
        return Statistics(
            parts["action"],
            parts["proprio"],
            int(content.get("num_transitions", 0)),
            int(content.get("num_trajectories", 0)),
            mask,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{name} holds no action statistics (mean, std, max, min, q01, q99): {error!r}.") from error


def read(path: str | pathlib.Path, names: Sequence[str] = ()) -> dict[str, Statistics]:
    """Dataset name -> statistics of a file: of one dataset, then under every name in `names`, or of several by name.

    Raises ValueError.
    """
    try:
        content = json_files.read(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"statistics {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"statistics {path} is no JSON object.")
    if "action" in content:
        return dict.fromkeys(names, from_json(content, str(path)))
    return {name: from_json(part, f"{path}: {name}") for name, part in content.items()}
