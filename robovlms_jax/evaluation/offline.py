"""How far predicted actions are from recorded ones, in the robot's units. NumPy only, no simulator.

`measure` turns a batch into sums, `add` joins batches and hosts, `summarize` turns sums into numbers:

    sums = add(*(measure(predicted, recorded, mask, units, robot) for predicted, recorded, mask in batches))
    summary = summarize(sums, robot)

D are the robot's dimensions that are no binary gripper (`RobotSpec.scaled`), in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from robovlms_jax.control.robot import CALVIN, RobotSpec


class Sums(NamedTuple):
    """What adds up over batches and hosts: sums over the entries that count, one row per chunk position.

    count: int64[C] entries that count.
    absolute: float64[C, D] of |predicted - recorded|, in metres, radians and so on, as everything below.
    squared: float64[C, D] of (predicted - recorded)^2.
    motion: float64[C, D] of |recorded|: the error of predicting no motion at all, where actions are motions.
    recorded, recorded_squared: float64[C, D], from which follows the error of always predicting the mean.
    gripper: int64[C, 2, 2] entries by [recorded closed?, predicted closed?], of all binary grippers together.
    """

    count: np.ndarray
    absolute: np.ndarray
    squared: np.ndarray
    motion: np.ndarray
    recorded: np.ndarray
    recorded_squared: np.ndarray
    gripper: np.ndarray


class Summary(NamedTuple):
    """Numbers to read. Each has the same leading shape: [C] per chunk position, or none over all positions.

    nan means that there was nothing to measure.

    count: entries behind the numbers.
    translation_m, rotation_rad: mean absolute error, averaged over the dimensions that are positions, and Euler angles
      or rotation vectors.
    mae, mae_still: float[..., D] mean absolute error, and what predicting no motion at all would have.
    rmse, rmse_mean: float[..., D] root mean square error, and what always predicting the mean recorded action would
      have (the recorded actions' standard deviation).
    gripper_accuracy, gripper_majority: share of right open / closed decisions, and what always the commoner one would
      have.
    gripper_f1: 2 hits / (2 hits + false alarms + misses), closed being what is looked for; nan when nothing was closed.
    """

    count: np.ndarray
    translation_m: np.ndarray
    rotation_rad: np.ndarray
    mae: np.ndarray
    mae_still: np.ndarray
    rmse: np.ndarray
    rmse_mean: np.ndarray
    gripper_accuracy: np.ndarray
    gripper_majority: np.ndarray
    gripper_f1: np.ndarray


class Sensitivity(NamedTuple):
    """How far predictions move when only the instruction changes.

    translation_m, rotation_rad: mean absolute change, averaged as in `Summary`.
    relative: that change over the predictions' own spread (mean absolute deviation from their mean, both instructions
      together), averaged over the dimensions. 0: the instruction is ignored; 2, the most possible: only it matters.
    gripper_flips: share of open / closed decisions that change.
    """

    translation_m: float
    rotation_rad: float
    relative: float
    gripper_flips: float


def measure(
    predicted: ArrayLike, recorded: ArrayLike, mask: ArrayLike, units: ArrayLike, robot: RobotSpec = CALVIN
) -> Sums:
    """Sums of one batch.

    Args:
      predicted, recorded: float[N, W, C, A] in dataset units; a binary gripper > 0 is open. What the mask leaves out is
        ignored.
      mask: bool[N, W, C], True = counts.
      units: float[D], what one dataset unit is, such as CALVIN's 0.02 m and 0.05 rad (`units_of`).
    Raises:
      ValueError: shapes that do not belong together.
    """
    mask = np.asarray(mask, bool)
    (arm, is_open), (target, was_open) = (_split(x, mask, units, robot) for x in (predicted, recorded))
    return Sums(
        count=mask.sum(axis=(0, 1)),
        absolute=np.abs(arm - target).sum(axis=(0, 1)),
        squared=np.square(arm - target).sum(axis=(0, 1)),
        motion=np.abs(target).sum(axis=(0, 1)),
        recorded=target.sum(axis=(0, 1)),
        recorded_squared=np.square(target).sum(axis=(0, 1)),
        gripper=np.einsum("nwc,nwcgr,nwcgp->crp", mask.astype(int), _one_hot(was_open), _one_hot(is_open)),
    )


def add(*sums: Sums) -> Sums:
    """Sums of batches (or hosts) together."""
    return Sums(*(np.sum(parts, axis=0) for parts in zip(*sums, strict=True)))


def units_of(robot: RobotSpec) -> np.ndarray:
    """float[D]: what 1.0 of each dimension is in metres, radians, ..., as the robot's units say."""
    return np.array([robot.action[column].measure[0] for column in robot.scaled])


def summarize(sums: Sums, robot: RobotSpec = CALVIN) -> Summary:
    """Numbers at every chunk position, [C] and [C, D]. For all positions together, `summarize(over_chunk(sums))`."""
    count = sums.count[..., None]
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan: nothing was measured
        mae, mean = sums.absolute / count, sums.recorded / count
        variance = np.maximum(sums.recorded_squared / count - mean**2, 0)  # below 0 only by rounding
        hits, misses, alarms = sums.gripper[..., 1, 1], sums.gripper[..., 1, 0], sums.gripper[..., 0, 1]
        decisions = sums.gripper.sum(axis=(-2, -1))
        return Summary(
            count=sums.count,
            translation_m=_mean_of(mae, robot, "m"),
            rotation_rad=_mean_of(mae, robot, "rad"),
            mae=mae,
            mae_still=sums.motion / count,
            rmse=np.sqrt(sums.squared / count),
            rmse_mean=np.sqrt(variance),
            gripper_accuracy=np.trace(sums.gripper, axis1=-2, axis2=-1) / decisions,
            gripper_majority=sums.gripper.sum(axis=-1).max(axis=-1) / decisions,
            gripper_f1=np.where(hits + misses > 0, 2 * hits / (2 * hits + alarms + misses), np.nan),
        )


def over_chunk(sums: Sums) -> Sums:
    """All chunk positions as one: every field loses its leading axis."""
    return Sums(*(field.sum(axis=0) for field in sums))


def scalars(summary: Summary | Sensitivity) -> dict[str, float]:
    """The single numbers of an overall summary by name, for loggers; nan is left out."""
    values = {name: float(x) for name, x in summary._asdict().items() if np.ndim(x) == 0}
    return {name: x for name, x in values.items() if not np.isnan(x)}


def by_name(summary: Summary, robot: RobotSpec) -> dict[str, float]:
    """Mean absolute error of an overall summary by dimension, for loggers, where translation and rotation do not say
    all: "mae/left_elbow". {} for end-effector robots."""
    if all(robot.action[column].quantity in ("position", *_ROTATIONS) for column in robot.scaled):
        return {}
    names = [robot.action[column].name for column in robot.scaled]
    return {f"mae/{name}": float(x) for name, x in zip(names, summary.mae, strict=True)}


def language_sensitivity(
    predicted: ArrayLike, other: ArrayLike, mask: ArrayLike, units: ArrayLike, robot: RobotSpec = CALVIN
) -> Sensitivity:
    """Compare predictions for the same frames under the right instruction and under another one.

    Args:
      predicted, other: float[N, W, C, A] in dataset units.
      mask, units, robot: as `measure` takes them.
    Raises:
      ValueError: shapes that do not belong together, or a mask that leaves nothing.
    """
    mask = np.asarray(mask, bool)
    (arm, is_open), (other_arm, other_open) = (_split(x, mask, units, robot) for x in (predicted, other))
    if not mask.any():
        raise ValueError("the mask leaves no prediction to compare.")
    arm, other_arm = arm[mask], other_arm[mask]  # [entries, D]
    change = np.abs(arm - other_arm).mean(axis=0)
    both = np.concatenate([arm, other_arm])
    spread = np.abs(both - both.mean(axis=0)).mean(axis=0)
    return Sensitivity(
        translation_m=float(_mean_of(change, robot, "m")),
        rotation_rad=float(_mean_of(change, robot, "rad")),
        relative=_mean(np.divide(change, spread, out=np.zeros_like(change), where=spread > 0)),
        gripper_flips=_mean((is_open != other_open)[mask]),
    )


def _one_hot(is_open: np.ndarray) -> np.ndarray:
    return np.stack([is_open, ~is_open], axis=-1).astype(int)


_ROTATIONS = ("euler_xyz", "axis_angle")


def _mean_of(values: np.ndarray, robot: RobotSpec, unit: str) -> np.ndarray:
    """float[..., D] -> float[...]: the mean over positions ("m") or angles of rotations ("rad"); nan where none are."""
    quantities = ("position",) if unit == "m" else _ROTATIONS
    chosen = [place for place, column in enumerate(robot.scaled) if robot.action[column].quantity in quantities]
    if not chosen:
        return np.full(values.shape[:-1], np.nan)[()]
    return values[..., chosen].mean(axis=-1)


def _mean(values: np.ndarray) -> float:
    """The mean; NaN of an empty array."""
    return float(values.mean()) if values.size else float("nan")


def _split(actions: ArrayLike, mask: np.ndarray, units: ArrayLike, robot: RobotSpec) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in the units' measure, 0 outside the mask, float64[N, W, C, D]; is each binary gripper open, bool[N, W,
    C, grippers]."""
    actions, units = np.asarray(actions, np.float64), np.asarray(units, np.float64)
    size, scaled = len(robot.action), list(robot.scaled)
    if mask.ndim != 3 or actions.shape != (*mask.shape, size) or units.shape != (len(scaled),):
        raise ValueError(
            f"expected actions [N, W, C, {size}], mask [N, W, C] and units [{len(scaled)}]; "
            f"got {actions.shape}, {mask.shape} and {units.shape}."
        )
    return np.where(mask[..., None], actions[..., scaled] * units, 0), actions[..., list(robot.binary)] > 0
