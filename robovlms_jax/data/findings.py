"""What an `inspection.Inspection` means: problems, what is worth a look, what is fine, a sentence each."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from robovlms_jax.actions import statistics
from robovlms_jax.data import inspection, pairing

Level = Literal["problem", "look", "fine"]
LEVELS: tuple[Level, ...] = get_args(Level)

FASTEST_M_S = 3.0
"""Faster than arms move; the 99 % quantile of commanded translations above it means another unit or another rate."""
SATURATED = 0.05
"""Share of values at one bound above which it looks like clipping."""
LEAST_PAIRS = 30
"""Neighbouring pictures, and steps, below which a correlation says nothing."""
FOLLOWS = 0.3
"""Correlation of command and state change that is expected at least in one translation."""
LONG_INSTRUCTION = 200


@dataclasses.dataclass(frozen=True)
class Finding:
    """topic: what it is about, a word or two. message: a sentence or two, with the numbers."""

    level: Level
    topic: str
    message: str


def find(found: inspection.Inspection, notes: Sequence[tuple[str, str]] = (), refusal: str = "") -> tuple[Finding, ...]:
    """All findings, problems first, then in the order of the page.

    Args:
      notes: (level name, text) that the reader logged: a warning there is worth a look.
      refusal: why a training run would not take the dataset; "" where it would.
    """
    parts = (
        [Finding("problem", "training refuses it", refusal)] if refusal else [],
        _description(found),
        _episodes(found),
        _instructions(found),
        _numbers(found),
        _columns(found),
        _gripper(found),
        _follow(found),
        _cameras(found),
        (Finding("look", "reader", text) for level, text in notes if level != "INFO"),
    )
    listed = tuple(itertools.chain(*parts))
    return tuple(finding for level in LEVELS for finding in listed if finding.level == level)


def _description(found: inspection.Inspection) -> Iterator[Finding]:
    if not found.described:
        yield Finding(
            "look",
            "robot",
            "the reader knows nothing about the robot; units are taken to be metres, radians and gripper 1 = open.",
        )
    for part, dimensions in (("action", found.robot.action), ("state", found.robot.state)):
        unknown = [dimension.name for dimension in dimensions if not dimension.unit]
        if unknown:
            listed = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            message = f"none is known for {counted(len(unknown), 'number')} of the {part} in the files ({listed})."
            yield Finding("look", "units", message)
    if not found.robot.rate_hz:
        yield Finding("look", "rate", "the control rate is unknown; a policy must run at the rate it was recorded at.")


def _episodes(found: inspection.Inspection) -> Iterator[Finding]:
    for name, split in found.splits.items():
        lengths, median = split.lengths, float(np.median(split.lengths))
        empty, far = int((lengths < 1).sum()), int((lengths > 10 * median).sum())
        if empty:
            yield Finding("look", "episodes", f"{name}: {empty} of {len(lengths)} episodes have no step to learn from.")
        if far:
            yield Finding(
                "look",
                "episodes",
                f"{name}: {counted(far, 'episode')} more than ten times as long as the median of {median:g} steps "
                f"(up to {lengths.max()}); was a recording not cut?",
            )
    if "validation" not in found.splits:
        yield Finding("look", "splits", "there is no validation split.")
    training = found.splits["training"]
    yield Finding(
        "fine",
        "episodes",
        f"{counted(len(training.lengths), 'training episode')}, {counted(training.num_steps, 'step')}.",
    )


def _instructions(found: inspection.Inspection) -> Iterator[Finding]:
    for name, split in found.splits.items():
        words = split.instructions
        if words.blank:
            yield Finding(
                "problem", "instructions", f"{name}: {counted(words.blank, 'episode')} without an instruction."
            )
        if words.odd:
            yield Finding(
                "problem", "instructions", f"{name}: {_listed(words.odd)} look like a program's values, not sentences."
            )
        if words.twins:
            yield Finding(
                "look",
                "instructions",
                f"{name}: {len(words.twins)} sentences are written in several ways, such as {_listed(words.twins[0])}.",
            )
        if len(words.longest) > LONG_INSTRUCTION:
            yield Finding("look", "instructions", f"{name}: the longest has {len(words.longest)} characters.")
    training = found.splits["training"].instructions
    if len(training.counts) == 1 and len(found.splits["training"].lengths) > 1:
        yield Finding("look", "instructions", "every episode has the same sentence; language cannot be learned.")
    else:
        yield Finding("fine", "instructions", f"{counted(len(training.counts), 'distinct sentence')}.")
    if "validation" in found.splits:
        known = {sentence for sentence, _ in training.counts}
        asked = [sentence for sentence, _ in found.splits["validation"].instructions.counts]
        new = [sentence for sentence in asked if sentence not in known]
        if new:
            message = f"{len(new)} of {len(asked)} validation sentences never occur in training, such as {new[0]!r}."
            yield Finding("look", "splits", message)


def _numbers(found: inspection.Inspection) -> Iterator[Finding]:
    bad = {field: value for field, value in found.unreadable.items() if value[0]}
    for field, (count, message) in bad.items():
        text = f"{field} of {count} of {found.num_sampled} frames cannot be used. The first: {message}"
        yield Finding("problem", "unreadable numbers", text)
    if not bad:
        message = f"no NaN and nothing unreadable among {found.num_sampled:,} frames of numbers."
        yield Finding("fine", "numbers", message)
    if not found.states:
        message = found.unreadable.get("state", (0, ""))[1]
        yield Finding("look", "state", f"no robot state can be read. {message}".strip())
    if found.still_share > 0.3:
        yield Finding(
            "look",
            "still steps",
            f"in {found.still_share:.0%} of the steps the arm is told not to move; a policy learns to stand still.",
        )


def _columns(found: inspection.Inspection) -> Iterator[Finding]:
    said: dict[tuple[str, bool], list[str]] = {}
    for finding in found.lint:
        if finding.dimension != "gripper" or found.gripper is None or math.isnan(found.gripper.correlation):
            said.setdefault((finding.message, finding.refused), []).append(finding.dimension)
    for (message, refused), names in said.items():
        yield Finding("problem" if refused else "look", f"action {', '.join(names)}", f"{message}.")
    named = {name for names in said.values() for name in names}
    fine = not named
    for part, columns in (("action", found.actions), ("state", found.states)):
        rest = [column for column in columns if part != "action" or column.dimension.name not in named]
        for level, check, message in _CHECKS:
            told_of = [(column.dimension.name, text) for column in rest if (text := check(column))]
            if told_of:
                fine = False
                listed = "; ".join(f"{name} {text}" for name, text in told_of)
                yield Finding(level, f"{part} ranges", f"{message}: {listed}.")
    fastest = _fastest(found)
    if fastest > FASTEST_M_S:
        yield Finding(
            "problem",
            "action units",
            f"1 % of the commanded translations are faster than {fastest:.3g} m/s at {found.robot.rate_hz:g} Hz; "
            "no arm is. Are they millimetres, absolute positions, or another rate?",
        )
    elif fine:
        yield Finding("fine", "ranges", "no constant, saturated or out-of-range dimension.")


def _unread(column: inspection.Column) -> str:
    return "" if column.distinct else "(none)"


def _outside(column: inspection.Column) -> str:
    low, high = column.dimension.low, column.dimension.high
    values = f"min {column.summary['min']:.4g}, max {column.summary['max']:.4g}"
    return f"{column.outside:.1%} outside of {low:g} to {high:g} ({values})" if column.outside else ""


def _constant(column: inspection.Column) -> str:
    return f"(always {column.summary['min']:.4g})" if column.distinct == 1 else ""


def _narrow(column: inspection.Column) -> str:
    values = column.summary
    if column.distinct < 2 or values["q01"] != values["q99"]:
        return ""
    return f"{values['q01']:.4g} (min {values['min']:.4g}, max {values['max']:.4g})"


def _saturated(column: inspection.Column) -> str:
    if column.distinct <= 10 or column.dimension.quantity == "gripper" or _narrow(column):
        return ""
    least = max(SATURATED, 10 / column.counts.sum())  # a few equal values are chance
    ends = ((column.at_min, "min"), (column.at_max, "max"))
    return ", ".join(f"{share:.0%} at {column.summary[end]:.4g}" for share, end in ends if share > least)


_CHECKS: tuple[tuple[Level, Callable[[inspection.Column], str], str], ...] = (
    ("problem", _unread, "not one value can be read of"),
    ("problem", _outside, "values that the robot's description rules out"),
    ("look", _constant, "never changes"),
    ("look", _narrow, "q01 = q99, so that scaling by quantiles clips everything else away"),
    ("look", _saturated, "values pile up at their smallest or largest, as if clipped there"),
)
"""Level, what is wrong with one dimension ("" = nothing), and what the sentence about all of them begins with."""


def _fastest(found: inspection.Inspection) -> float:
    """m/s, the largest 99 % quantile of the commanded translations; NaN where units or rate are unknown."""
    speeds = [math.nan]
    for column in found.actions:
        scale = pairing.unit_scale(column.dimension.unit)
        if column.dimension.kind == "delta" and column.dimension.quantity == "position" and scale is not None:
            largest = max(abs(column.summary["q01"]), abs(column.summary["q99"]))
            speeds.append(largest * scale * (found.robot.rate_hz or math.nan))
    return max(speeds[1:], default=math.nan)


def _gripper(found: inspection.Inspection) -> Iterator[Finding]:
    grip = found.gripper
    if grip is None:
        return
    if math.isnan(grip.correlation):
        yield Finding(
            "look",
            "gripper",
            "its sign cannot be checked: no recorded opening that changes with the command. See in the pictures "
            f"whether 1 is open; {grip.open_share:.0%} of the commands are.",
        )
    else:
        numbers = (
            f"fingers are {grip.opened:.3g} apart while the command is open and {grip.closed:.3g} while it is closed "
            f"(correlation {grip.correlation:+.2f})"
        )
        if grip.correlation <= statistics.INVERTED:
            yield Finding("problem", "gripper", f"means the opposite: {numbers}. Expected open at 1.")
        elif grip.correlation < 0.3:
            yield Finding("look", "gripper", f"follows its command hardly: {numbers}.")
        else:
            yield Finding("fine", "gripper", f"1 is open: {numbers}.")
    if grip.transitions > 10:
        message = f"changes {grip.transitions:.1f} times per episode; noise around the threshold?"
        yield Finding("look", "gripper", message)
    if grip.never > 0.9 and found.num_runs > 1:
        yield Finding("look", "gripper", f"never opens or closes in {grip.never:.0%} of the episodes.")


def _follow(found: inspection.Inspection) -> Iterator[Finding]:
    follow = found.follow
    known = [d for d in follow.dimensions if math.isfinite(d.correlation)]
    best = max((d.correlation for d in known), default=math.nan)
    if not known or found.num_sampled < LEAST_PAIRS:
        yield Finding("look", "state and action", "cannot be compared: no dimension that both have and that moves.")
        return
    lag = follow.best_lag
    at_zero = follow.lags[pairing.LAGS.index(0)]
    peak = np.nanmax(follow.lags, initial=-1.0)
    clear = peak > max(FOLLOWS, 4 / math.sqrt(found.num_sampled)) and peak > at_zero + 0.1  # not by chance
    if lag is not None and (lag < 0 or lag > 3) and clear:
        direction = f"{counted(abs(lag), 'step')} {'before' if lag < 0 else 'after'}"
        yield Finding(
            "problem" if lag < 0 else "look",
            "state and action",
            f"the state moves {direction} its command (correlation {peak:.2f}, {at_zero:.2f} in the same "
            "step): rows of actions and states may be shifted.",
        )
    elif best < FOLLOWS:
        listed = ", ".join(f"{d.name} {d.correlation:+.2f}" for d in known)
        yield Finding(
            "look",
            "state and action",
            f"the state hardly follows the commands ({listed}): another frame or unit of the axes, or rows that do not "
            "belong together.",
        )
    else:
        flipped = [f"{d.name} {d.correlation:+.2f}" for d in known if d.correlation < -FOLLOWS]
        if flipped:
            yield Finding(
                "problem", "state and action", f"the state moves against its command in {', '.join(flipped)}."
            )
        gains = [d for d in known if d.correlation > 0.5 and math.isfinite(d.gain)]
        odd = [f"{d.name} {d.gain:.3g}" for d in gains if not 0.2 < d.gain < 3]
        if odd:
            yield Finding(
                "look",
                "action units",
                f"measured motion per commanded motion is {', '.join(odd)}, expected about 1: another unit?",
            )
        message = f"the state follows the commands (correlation up to {best:.2f})."
        if min(d.correlation for d in known) > 0.9999:
            message = "the state is exactly as commanded: computed from it, the actions are compared with themselves."
        yield Finding("fine", "state and action", message)


def _cameras(found: inspection.Inspection) -> Iterator[Finding]:
    for left, right in found.same_pictures:
        yield Finding("problem", "cameras", f"{left} and {right} always show the same picture.")
    if found.shown_share < 1:
        yield Finding(
            "look",
            "pictures",
            f"{found.shown_share:.1%} of the frames have pictures, as with picture_every of a recorder; windows begin "
            "there alone, so that policy.window must be 1.",
        )
    for camera in found.cameras:
        topic, total = f"{camera.name} camera", camera.read + camera.unreadable + camera.missing
        clean = True
        for level, count, text in (
            ("problem", camera.unreadable, f"pictures cannot be decoded. The first: {camera.message}"),
            ("look", camera.missing, "pictures are missing; they are black and masked."),
            ("look", camera.flat, f"pictures have one colour (mean brightness {camera.brightness:.0f} of 255)."),
        ):
            if count:
                clean = False
                yield Finding(level, topic, f"{count} of {total} {text}")
        if camera.frozen > 0.2 * max(camera.pairs, 1):
            clean = False
            yield Finding(
                "problem",
                topic,
                f"stands still in {camera.frozen} of {camera.pairs} pairs of frames between which the arm is told to "
                "move: is its video slower than the rows?",
            )
        if camera.cuts:
            clean = False
            yield Finding(
                "look",
                topic,
                f"the picture changes abruptly inside {counted(len(camera.cuts), 'episode')}, first before frame "
                f"{camera.cuts[0]}: is part of it another recording?",
            )
        if camera.pairs >= LEAST_PAIRS and camera.correlation < 0.05:
            clean = False
            yield Finding(
                "look",
                topic,
                "pictures do not change more where the arm is told to move more (rank correlation "
                f"{camera.correlation:+.2f}): do they belong to these rows?",
            )
        if clean and camera.read:
            related = f", rank correlation with the action {camera.correlation:+.2f}"
            known = camera.pairs >= LEAST_PAIRS and math.isfinite(camera.correlation)
            yield Finding("fine", topic, f"{camera.read} pictures decoded{related if known else ''}.")


def counted(number: int, noun: str) -> str:
    """ "1 step", "1,200 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(sentences: Sequence[str]) -> str:
    shown = ", ".join(repr(sentence if len(sentence) < 80 else sentence[:77] + "...") for sentence in sentences[:3])
    return shown + (f" and {len(sentences) - 3} more" if len(sentences) > 3 else "")
