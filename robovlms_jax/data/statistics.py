"""Mean, spread and quantiles of actions and state, in the JSON layout that OpenVLA and RoboVLMs publish.

    {"action": {"mean": [7], "std": [7], "max": [7], "min": [7], "q01": [7], "q99": [7], "mask": [7]},
     "proprio": {the same without mask}, "num_transitions": n, "num_trajectories": n}

One difference in meaning, undone on reading: in the files the gripper runs from 0 to 1, here from -1 to 1.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax import json_files
from robovlms_jax.actions.statistics import summarize

KEYS = ("mean", "std", "max", "min", "q01", "q99")
ARM = 6


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one dataset.

    action, proprio: name in `KEYS` -> float64[d]; proprio may have d = 0. The action's last dimension is the gripper in
      -1 ... 1.
    num_transitions, num_trajectories: what they are taken over.
    """

    action: Mapping[str, np.ndarray]
    proprio: Mapping[str, np.ndarray]
    num_transitions: int
    num_trajectories: int

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) float64[6]: the arm's 1 % and 99 % quantiles, one unit apart where a dimension never changes."""
        low, high = self.action["q01"][:ARM], self.action["q99"][:ARM]
        still = high - low < 1e-6
        return np.where(still, low - 0.5, low), np.where(still, high + 0.5, high)

    def to_json(self) -> dict[str, Any]:
        """Upstream's layout, with `mask` (OpenVLA's key): which dimensions are normalised, all but the gripper."""
        action = {key: self.action[key].copy() for key in KEYS}
        for key in KEYS:
            action[key][-1] = action[key][-1] / 2 if key == "std" else (action[key][-1] + 1) / 2
        return {
            "action": {key: value.tolist() for key, value in action.items()} | {"mask": [True] * ARM + [False]},
            "proprio": {key: self.proprio[key].tolist() for key in KEYS},
            "num_transitions": self.num_transitions,
            "num_trajectories": self.num_trajectories,
        }


def compute(actions: np.ndarray, states: np.ndarray, num_trajectories: int) -> Statistics:
    """Over all steps of a dataset: actions float[N, 7], states float[N, s]. Raises ValueError for N = 0."""
    return Statistics(summarize(actions), summarize(states), len(actions), num_trajectories)


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
        if len(parts["action"]["mean"]) != ARM + 1:
            raise ValueError(f"action has {len(parts['action']['mean'])} dimensions, expected {ARM + 1}")
        if not all(np.isfinite(value).all() for part in parts.values() for value in part.values()):
            raise ValueError("a value is not finite")
        for key, value in parts["action"].items():
            value[-1] = value[-1] * 2 if key == "std" else value[-1] * 2 - 1
        return Statistics(
            parts["action"],
            parts["proprio"],
            int(content.get("num_transitions", 0)),
            int(content.get("num_trajectories", 0)),
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
