"""Whether numbers are what they are taken for, and what to write where they are not: a gripper's opening from 0 to 1,
and motion within one step."""

from __future__ import annotations

import numpy as np

from robovlms_jax.actions.statistics import FARTHEST
from robovlms_jax.data.registry import entry as entries

TOLERANCE = 0.05
"""By which a gripper's opening may leave 0 ... 1: measured ones do."""
RANGES = (1.0, 100.0, 255.0, 850.0, 1000.0)
"""Numbers at which grippers are wide open or closed: a share, per cent, a byte, millimetre tenths (xArm), per mille."""


def require_gripper(commands: np.ndarray, entry: entries.Entry, where: str, place: str) -> None:
    """Raises ValueError with the smallest and largest opening and an expression to write where they leave 0 ... 1.

    Args:
      commands: float[N], twice the opening minus one; those that are not finite are passed over.
      where: the dataset. place: where its description is written, for the message.
    """
    opening = (np.asarray(commands, np.float64) + 1) / 2
    opening = opening[np.isfinite(opening)]
    if not len(opening):
        return
    low, high = float(opening.min()), float(opening.max())
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return
    outside = float(((opening < -TOLERANCE) | (opening > 1 + TOLERANCE)).mean())
    raise ValueError(
        f"{where}: the gripper {entry.gripper!r} runs from {low:.4g} to {high:.4g}, expected 0 (closed) to 1 (open); "
        f"{outside:.1%} of the steps lie outside. {_remedy(entry, low, high)} {place} (data/README.md), or "
        f"clip({entry.gripper}) if what lies outside is noise."
    )


_SAMPLE = 100_000


def require_steps(arm: np.ndarray, where: str, place: str) -> None:
    """Of numbers that nobody described and that were therefore taken for metres and radians per step. Raises ValueError
    with their range where a hundredth of them are more than any arm does in one step: joints, places, normalised ones.

    Args:
      arm: float[N, 6]; what is not finite is passed over.
      where: the dataset. place: where its description is written, for the message.
    """
    arm = np.asarray(arm[:: max(len(arm) // _SAMPLE, 1)], np.float64)
    arm = arm[np.isfinite(arm).all(axis=1)]
    if not len(arm):
        return
    low, high = np.quantile(arm, [0.01, 0.99], axis=0)
    limits = np.repeat([FARTHEST["m"], FARTHEST["rad"]], 3)
    beyond = np.maximum(-low, high) > limits
    if beyond.any():
        names = np.array(["x", "y", "z", "roll", "pitch", "yaw"])[beyond].tolist()
        ranges = ", ".join(f"{a:.4g} to {b:.4g}" for a, b in zip(low[beyond], high[beyond], strict=True))
        raise ValueError(
            f"{where}: nobody says what the action's numbers mean, and as metres and radians to move by in one step "
            f"{names} run from {ranges} (1 % and 99 %); expected at most {limits[0]:g} m and {limits[3]:g} rad. Are "
            f"they joints, places to go to, or normalised already? Write what they are {place} (data/README.md)."
        )


def _remedy(entry: entries.Entry, low: float, high: float) -> str:
    source, functions = entry.gripper_source or entry.gripper, entry.gripper_functions
    if functions == ("invert",):
        low, high = 1 - high, 1 - low
    elif functions:
        return f"Write an expression of {source!r} that gives 0 to 1, such as from_range({source}, CLOSED, OPEN),"
    if -1 - TOLERANCE <= low < -TOLERANCE and high <= 1 + TOLERANCE:
        return (
            f"Write gripper: invert(clip({source})) if +1 closes it and -1 opens it (LIBERO, robosuite), gripper: "
            f"clip({source}) if +1 opens it, or gripper: from_range({source}, CLOSED, OPEN) if it rests in between,"
        )
    bottom = 0.0 if low >= -TOLERANCE * high else low
    top = next((value for value in RANGES if high <= value * (1 + TOLERANCE)), high)
    return (
        f"Write gripper: from_range({source}, {bottom:.6g}, {top:.6g}) if {top:.6g} is open, or gripper: "
        f"from_range({source}, {top:.6g}, {bottom:.6g}) if it is closed,"
    )
