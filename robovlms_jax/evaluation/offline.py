"""How far predicted actions are from recorded ones, in metres and radians. NumPy only, no simulator.

`measure` turns a batch into sums, `add` joins batches and hosts, `summarize` turns sums into numbers:

    sums = add(*(measure(predicted, recorded, mask, units) for predicted, recorded, mask in batches))
    summary = summarize(sums)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from robovlms_jax.control import interface


class Sums(NamedTuple):
    """What adds up over batches and hosts: sums over the entries that count, one row per chunk position.

    count: int64[C] entries that count.
    absolute: float64[C, 6] of |predicted - recorded|, in metres and radians as everything below.
    squared: float64[C, 6] of (predicted - recorded)^2.
    motion: float64[C, 6] of |recorded|: the error of predicting no motion at all.
    recorded, recorded_squared: float64[C, 6], from which follows the error of always predicting the mean.
    gripper: int64[C, 2, 2] entries by [recorded closed?, predicted closed?].
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
    translation_m, rotation_rad: mean absolute error, averaged over the three axes.
    mae, mae_still: float[..., 6] mean absolute error, and what predicting no motion at all would have.
    rmse, rmse_mean: float[..., 6] root mean square error, and what always predicting the mean recorded action would
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

    translation_m, rotation_rad: mean absolute change, averaged over the three axes.
    relative: that change over the predictions' own spread (mean absolute deviation from their mean, both instructions
      together), averaged over the arm dimensions. 0: the instruction is ignored; 2, the most possible: only it matters.
    gripper_flips: share of open / closed decisions that change.
    """

    translation_m: float
    rotation_rad: float
    relative: float
    gripper_flips: float


def measure(predicted: ArrayLike, recorded: ArrayLike, mask: ArrayLike, units: ArrayLike) -> Sums:
    """Sums of one batch.

    Args:
      predicted, recorded: float[N, W, C, 7] in dataset units; gripper > 0 is open. What the mask leaves out is ignored.
      mask: bool[N, W, C], True = counts.
      units: float[6], metres (0:3) and radians (3:6) per dataset unit; CALVIN's relative actions: 0.02 and 0.05.
    Raises:
      ValueError: shapes that do not belong together.
    """
    mask = np.asarray(mask, bool)
    (arm, is_open), (target, was_open) = _split(predicted, mask, units), _split(recorded, mask, units)
    return Sums(
        count=mask.sum(axis=(0, 1)),
        absolute=np.abs(arm - target).sum(axis=(0, 1)),
        squared=np.square(arm - target).sum(axis=(0, 1)),
        motion=np.abs(target).sum(axis=(0, 1)),
        recorded=target.sum(axis=(0, 1)),
        recorded_squared=np.square(target).sum(axis=(0, 1)),
        gripper=np.einsum("nwc,nwcr,nwcp->crp", mask.astype(int), _one_hot(was_open), _one_hot(is_open)),
    )


def add(*sums: Sums) -> Sums:
    """Sums of batches (or hosts) together."""
    return Sums(*(np.sum(parts, axis=0) for parts in zip(*sums, strict=True)))


def summarize(sums: Sums) -> Summary:
    """Numbers at every chunk position, [C] and [C, 6]. For all positions together, `summarize(over_chunk(sums))`."""
    count = sums.count[..., None]
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan: nothing was measured
        mae, mean = sums.absolute / count, sums.recorded / count
        variance = np.maximum(sums.recorded_squared / count - mean**2, 0)  # below 0 only by rounding
        hits, misses, alarms = sums.gripper[..., 1, 1], sums.gripper[..., 1, 0], sums.gripper[..., 0, 1]
        return Summary(
            count=sums.count,
            translation_m=mae[..., :3].mean(axis=-1),
            rotation_rad=mae[..., 3:].mean(axis=-1),
            mae=mae,
            mae_still=sums.motion / count,
            rmse=np.sqrt(sums.squared / count),
            rmse_mean=np.sqrt(variance),
            gripper_accuracy=np.trace(sums.gripper, axis1=-2, axis2=-1) / sums.count,
            gripper_majority=sums.gripper.sum(axis=-1).max(axis=-1) / sums.count,
            gripper_f1=np.where(hits + misses > 0, 2 * hits / (2 * hits + alarms + misses), np.nan),
        )


def over_chunk(sums: Sums) -> Sums:
    """All chunk positions as one: every field loses its leading axis."""
    return Sums(*(field.sum(axis=0) for field in sums))


def scalars(summary: Summary | Sensitivity) -> dict[str, float]:
    """The single numbers of an overall summary by name, for loggers; nan is left out."""
    values = {name: float(x) for name, x in summary._asdict().items() if np.ndim(x) == 0}
    return {name: x for name, x in values.items() if not np.isnan(x)}


def language_sensitivity(predicted: ArrayLike, other: ArrayLike, mask: ArrayLike, units: ArrayLike) -> Sensitivity:
    """Compare predictions for the same frames under the right instruction and under another one.

    Args:
      predicted, other: float[N, W, C, 7] in dataset units.
      mask, units: as `measure` takes them.
    Raises:
      ValueError: shapes that do not belong together, or a mask that leaves nothing.
    """
    mask = np.asarray(mask, bool)
    (arm, is_open), (other_arm, other_open) = _split(predicted, mask, units), _split(other, mask, units)
    if not mask.any():
        raise ValueError("the mask leaves no prediction to compare.")
    arm, other_arm = arm[mask], other_arm[mask]  # [entries, 6]
    change = np.abs(arm - other_arm).mean(axis=0)
    both = np.concatenate([arm, other_arm])
    spread = np.abs(both - both.mean(axis=0)).mean(axis=0)
    return Sensitivity(
        translation_m=float(change[:3].mean()),
        rotation_rad=float(change[3:].mean()),
        relative=float(np.divide(change, spread, out=np.zeros_like(change), where=spread > 0).mean()),
        gripper_flips=float((is_open != other_open)[mask].mean()),
    )


def _one_hot(is_open: np.ndarray) -> np.ndarray:
    return np.stack([is_open, ~is_open], axis=-1).astype(int)


def _split(actions: ArrayLike, mask: np.ndarray, units: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Arm in metres and radians, 0 outside the mask, float64[N, W, C, 6]; is the gripper open, bool[N, W, C]."""
    actions, units = np.asarray(actions, np.float64), np.asarray(units, np.float64)
    if (
        mask.ndim != 3
        or actions.shape != (*mask.shape, interface.ACTION_DIM)
        or units.shape != (interface.ACTION_DIM - 1,)
    ):
        raise ValueError(
            "expected actions [N, W, C, 7], mask [N, W, C] and units [6]; "
            f"got {actions.shape}, {mask.shape} and {units.shape}."
        )
    return np.where(mask[..., None], actions[..., :-1] * units, 0), actions[..., -1] > 0
