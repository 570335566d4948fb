"""Statistics of a dataset's actions, and what may be wrong with them. NumPy only.

Bounds taken from bad statistics fail in silence: a dimension whose quantiles coincide is clipped to nothing, a gripper
of the wrong sign trains a policy that opens where it should close. `lint` finds such things before a run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from robovlms_jax.control import robot as robots

logger = logging.getLogger(__name__)

CLOSE = 0.01
"""Quantiles are close when they are nearer than this share of the widest pair among dimensions of the same unit."""

FAR = 100.0
"""A value is no action when it lies farther outside q01 ... q99 than this many times the widest such range among
dimensions of the same unit. RT-1's published statistics reach 49, Bridge's 15."""

ABSURD = 1e6
"""Nor is one as large as this, in any unit that arms are commanded in."""

FARTHEST = {"m": 0.5, "rad": 3.2, "deg": 184.0}
"""What no arm moves or turns by within one step; more is another unit, or a place to go to."""

BEYOND = 0.1
"""By which gripper commands may leave -1 ... 1: measured ones do."""

INVERTED = -0.5
"""Correlation of gripper command and finger width below which the sign must be wrong (CALVIN's sample: above +0.8)."""


class Finding(NamedTuple):
    """Something odd about one dimension.

    refused: training on it would lose or invert what was recorded.
    """

    dimension: str
    message: str
    refused: bool


def summarize(values: np.ndarray) -> dict[str, np.ndarray]:
    """float[N, d] -> "mean", "std", "min", "max", "q01", "q99": float64[d] each. Raises ValueError for N = 0."""
    values = np.asarray(values, np.float64)
    if len(values) == 0:
        raise ValueError("there is no action to take statistics over.")
    return {
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }


def lint(
    action: Mapping[str, np.ndarray],
    *,
    by_quantiles: bool = True,
    commands: np.ndarray | None = None,
    widths: np.ndarray | None = None,
    units: Sequence[float] | None = None,
    robot: robots.RobotSpec = robots.CALVIN,
) -> list[Finding]:
    """Look for values that can be no actions, motion that no arm makes within one step, quantiles that nearly coincide,
    dimensions that never change, and a gripper of another convention.

    Args:
      action: as `summarize` returns it, float[A] each; binary grippers should be -1 (closed) and 1 (open).
      by_quantiles: actions are going to be scaled by q01 and q99, so it is fatal when they coincide.
      commands, widths: float[N] actions of the only gripper and the finger widths measured with them, to tell the sign.
      units: what 1.0 of each dimension that is no binary gripper means, in `FARTHEST`'s units, where the data know
        better than the robot; None = as `robot` says.
      robot: whose actions they are.
    """
    findings = []
    low, high = (np.asarray(action[name], np.float64) for name in ("q01", "q99"))
    smallest, largest = (np.asarray(action[name], np.float64) for name in ("min", "max"))
    names = robot.action_names
    for group in robots.groups(robot.action):
        widest = (high - low)[list(group)].max()
        for i in group:
            values = f"min {smallest[i]:.4g}, q01 {low[i]:.4g}, q99 {high[i]:.4g}, max {largest[i]:.4g}"
            beyond = max(low[i] - smallest[i], largest[i] - high[i])
            if (widest > 0 and beyond > FAR * widest) or max(-smallest[i], largest[i]) >= ABSURD:
                message = f"has values that can be no actions ({values}): damaged or wrongly scaled steps"
                findings.append(Finding(names[i], message, True))
            if smallest[i] == largest[i]:
                findings.append(Finding(names[i], f"never changes ({values}); nothing can be learned there", False))
            elif high[i] - low[i] <= CLOSE * widest:
                message = f"q01 and q99 nearly coincide ({values}): scaled by them, all larger motion is clipped away"
                findings.append(Finding(names[i], message, by_quantiles))
    findings += _too_far(smallest, largest, units, robot)
    for i in robot.binary:
        recorded = (commands, widths) if len(robot.binary) == 1 else (None, None)
        findings += _lint_gripper(names[i], float(smallest[i]), float(largest[i]), *recorded)
    return findings


def _too_far(
    smallest: np.ndarray, largest: np.ndarray, units: Sequence[float] | None, robot: robots.RobotSpec
) -> list[Finding]:
    """Motions within one step (kind "delta") that leave what an arm can do in one; one finding each."""
    findings = []
    for place, i in enumerate(robot.scaled):
        dimension = robot.action[i]
        scale, unit = dimension.measure
        scale = scale if units is None else units[place]
        limit = FARTHEST.get(unit)
        if dimension.kind != "delta" or limit is None:
            continue
        low, high = float(smallest[i]) * scale, float(largest[i]) * scale
        if max(-low, high) > limit:
            hint = "millimetres or places" if unit == "m" else "degrees or angles"
            findings.append(
                Finding(
                    dimension.name,
                    f"moves by {low:.4g} to {high:.4g} {unit} within one step, more than {limit:g} {unit}: are "
                    f"these {hint} to go to, joints, or numbers that were normalised already? Describe them (arm, "
                    "units; data/README.md)",
                    False,
                )
            )
    return findings


def _lint_gripper(
    name: str, smallest: float, largest: float, commands: np.ndarray | None, widths: np.ndarray | None
) -> list[Finding]:
    values = f"min {smallest:.4g}, max {largest:.4g}"
    if smallest == largest:
        return [Finding(name, f"never changes ({values}); it cannot be learned when to grasp", False)]
    if smallest < -1 - BEYOND or largest > 1 + BEYOND:
        message = f"leaves -1 (closed) to 1 (open): {values}; describe it as an opening from 0 to 1, for which"
        return [Finding(name, f"{message} from_range(x, CLOSED, OPEN), clip and invert help", True)]
    if smallest >= 0 or largest <= 0:
        message = f"has one sign only ({values}); expected -1 (closed) and 1 (open), not 0 and 1 or a width in metres"
        return [Finding(name, f"{message}; from_range(x, CLOSED, OPEN) makes 0 to 1 of a width", True)]
    if commands is None or widths is None:
        return []
    is_open, widths = np.asarray(commands) > 0, np.asarray(widths, np.float64)
    if is_open.all() or not is_open.any() or np.ptp(widths) == 0:
        return []
    opened, closed = widths[is_open].mean(), widths[~is_open].mean()
    if np.corrcoef(is_open, widths)[0, 1] > INVERTED:
        return []
    message = f"means the opposite: fingers are {opened:.3g} apart at 1 and {closed:.3g} at -1, expected open at 1"
    return [Finding(name, message, True)]


def require_bounds(
    action: Mapping[str, np.ndarray], low: np.ndarray, high: np.ndarray, robot: robots.RobotSpec = robots.CALVIN
) -> None:
    """Refuse bounds, one number each per dimension that is no binary gripper, made from means and standard deviations
    that a few outliers decide.

    Args:
      action: "q01", "q99", "std" -> float[A], what they were made from.
    Raises:
      ValueError: names the dimensions; a policy would otherwise send a robot actions of that size.
    """
    std, q01, q99 = (np.asarray(action[name], np.float64) for name in ("std", "q01", "q99"))
    places = {column: place for place, column in enumerate(robot.scaled)}
    for group in robots.groups(robot.action):
        widest = (q99 - q01)[list(group)].max()
        for i in group:
            smallest, largest = low[places[i]], high[places[i]]
            # A normal distribution has 0.2, one that is q01 half of the time and q99 otherwise 0.5.
            if (widest > 0 and std[i] > widest) or not max(abs(smallest), abs(largest)) < ABSURD:
                raise ValueError(
                    f"action dimension {robot.action_names[i]} has standard deviation {std[i]:.4g} but 98 % of it lies "
                    f"in {q01[i]:.4g} ... {q99[i]:.4g}: a few far outliers would make the bounds {smallest:.4g} ... "
                    f"{largest:.4g}. Correct the data, or scale by quantiles (policy.action_scaling=quantile)."
                )


def enforce(findings: Iterable[Finding], name: str, *, refuse: bool = True) -> None:
    """Log every finding about the dataset `name`; raise ValueError with the refused ones where `refuse`."""
    bad = []
    for finding in findings:
        logger.warning("%s: action dimension %s %s", name, finding.dimension, finding.message)
        if finding.refused:
            bad.append(f"{finding.dimension}: {finding.message}")
    if bad and refuse:
        raise ValueError(
            f"{name}: the actions' statistics look wrong. {'; '.join(bad)}. Correct the data, or pass "
            "--data.check_actions warn to train on it as it is."
        )
