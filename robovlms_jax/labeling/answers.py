"""Answers to "which of these two clips is better", in a file that grows by a line per answer and loses none.

The first line says of which rollouts and of how many control steps the segments are; an answer without that is worth
nothing. A line is on the disk before the person is told so.
"""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from robovlms_jax import json_files, json_lines
from robovlms_jax.rl import segments
from robovlms_jax.rl.segments import Rollouts, Segment
from robovlms_jax.schema import require

FILE = "answers.jsonl"
Answer = Literal["left", "right", "equal", "skip"]
"""Which clip is better; skip: they cannot be compared."""
FIRST_BETTER = {"left": 1.0, "right": 0.0, "equal": 0.5}
"""An answer as losses take it (`rl.preferences.Pairs`)."""
_VERSION = 1
_REMEDY = "Mend or remove that line; all others are whole."


class Pair(NamedTuple):
    """Two segments of the same task, as they stand on the page."""

    left: Segment
    right: Segment

    @property
    def key(self) -> frozenset[Segment]:
        """The same whichever stands left."""
        return frozenset(self)


class Given(NamedTuple):
    pair: Pair
    answer: Answer


class Answers:
    """Those of one file, and more to come.

    Args:
      about: what the segments are of, JSON values: `rollouts` (checksum), `steps` (of a segment), `every`.
    Raises:
      ValueError: the file is about something else, or has a damaged line; names both.
    """

    def __init__(self, path: pathlib.Path, about: Mapping[str, Any]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {"version": _VERSION, **about}
        found = read(path)
        if found is None:
            json_lines.append(path, head, durable=True)
        else:
            differing = json_files.differences(found[0], head)
            if differing:
                raise ValueError(
                    f"{path} has answers about other segments ({differing}); give the same rollouts, steps and every, "
                    "or choose another --out."
                )
        self.given: list[Given] = [] if found is None else found[1]

    @property
    def asked(self) -> set[frozenset[Segment]]:
        """Pairs that need not be asked about again, skipped ones included."""
        return {given.pair.key for given in self.given}

    def add(self, pair: Pair, answer: str) -> None:
        """Raises ValueError for what is no answer, OSError where it could not be written: then it was not given."""
        if answer not in get_args(Answer):
            raise ValueError(f"answer {answer[:40]!r} is none of {', '.join(get_args(Answer))}.")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"left": list(pair.left), "right": list(pair.right), "answer": answer, "time": now}
        json_lines.append(self.path, row, durable=True)
        self.given.append(Given(pair, answer))


def require_within(found: Rollouts, given: Sequence[Given], steps: int, path: pathlib.Path) -> None:
    """Raise ValueError for an answer about segments of `steps` control steps that these rollouts do not have, or that
    are of two tasks."""
    for number, each in enumerate(given, start=2):
        there = all(found.has(side, steps) for side in each.pair) and len(each.pair.key) == 2
        if not there or len({found.tasks[side.rollout] for side in each.pair}) > 1:
            raise ValueError(
                f"{path}, line {number} is about {list(each.pair.left)} and {list(each.pair.right)} (rollout, first "
                f"step), which are no two clips of {steps} steps of one task in {len(found)} rollouts. Remove that "
                "line; all others are whole."
            )


def read(path: pathlib.Path) -> tuple[dict[str, Any], list[Given]] | None:
    """What the segments are of, and the answers; None where there is no file, or nothing in it.

    A last line that a killed process left unfinished is left out, with a warning. Raises ValueError for another line
    that is damaged; names it.
    """

    def one(number: int, row: Any) -> Any:
        if number == 1:
            if row["version"] != _VERSION:
                raise ValueError(f"version {row['version']}, expected {_VERSION}")
            return row
        answer = row["answer"]
        if answer not in get_args(Answer):
            raise ValueError(f"answer {answer!r} is none of {get_args(Answer)}")
        return Given(Pair(*(Segment(*map(int, row[side])) for side in ("left", "right"))), answer)

    rows = json_lines.read(path, one, expected="an answer", remedy=_REMEDY)
    return (rows[0], rows[1:]) if rows else None


def of(folder: str | pathlib.Path, found: Rollouts, otherwise: str) -> tuple[dict[str, Any], list[Given]]:
    """What the segments are of, and the answers that say something about the rollouts `found` in a folder of
    experiments.label ("cannot say" is left out).

    Args:
      otherwise: what else somebody without answers can do, for the message.
    Raises:
      ValueError: there are none, they are about other rollouts, or damaged; names the file.
    """
    path = pathlib.Path(folder) / FILE
    known = read(path)
    none = f"{path} has no answers; give some (experiments.label), or {otherwise}."
    require(known is not None, none)
    head, given = known
    counts = [head.get(name) for name in ("steps", "every")]
    require(
        "rollouts" in head and all(type(count) is int and count > 0 for count in counts),
        f"{path}, line 1 does not say what its answers are about (rollouts, steps and every): {head}. Mend that line.",
    )
    require(
        head["rollouts"] == segments.identity(folder),
        f"{path} is about other rollouts ({head['rollouts']}) than those beside it; put the right file there.",
    )
    require_within(found, given, head["steps"], path)
    given = [each for each in given if each.answer != "skip"]
    require(len(given) > 0, none)
    return head, given
