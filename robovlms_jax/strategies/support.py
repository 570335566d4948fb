"""Which demonstrations a policy is given: drawn per task, and kept as files that data.episode_list reads."""

from __future__ import annotations

import difflib
import json
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from robovlms_jax import atomic

Support = Mapping[str, Sequence[tuple[int, int]]]
"""Task -> first and last frame of each of its demonstrations."""


class Demonstration(Protocol):
    """As datasets list them: first and last frame, and the task's name."""

    start: int
    end: int
    task: str


def by_task(episodes: Iterable[Demonstration]) -> dict[str, list[tuple[int, int]]]:
    """All demonstrations, in the order of the dataset."""
    found: dict[str, list[tuple[int, int]]] = {}
    for episode in episodes:
        found.setdefault(episode.task, []).append((int(episode.start), int(episode.end)))
    return found


def require_tasks(available: Collection[str], tasks: Sequence[str]) -> None:
    """Raise ValueError that names the first of `tasks` which is not `available`."""
    for task in tasks:
        if task not in available:
            near = difflib.get_close_matches(task, available, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"tasks: {sorted(available)}."
            raise ValueError(f"tasks has {task!r}, of which there is no demonstration; {hint}")


def draw(available: Support, tasks: Sequence[str], count: int, seed: int) -> dict[str, list[tuple[int, int]]]:
    """`count` demonstrations of each task, without repetition; 0: all there are.

    The first of a draw are those of the same draw with fewer, and a task's do not depend on what else is drawn.

    Raises:
      ValueError: names a task that is not there, or that has fewer.
    """
    require_tasks(available, tasks)
    out = {}
    for task in tasks:
        spans = sorted(available[task])
        if count > len(spans):
            raise ValueError(
                f"{count} demonstrations of {task!r} are asked for, and there are {len(spans)}; ask for fewer, or for "
                "0, which takes all."
            )
        order = np.random.default_rng([seed, *task.encode()]).permutation(len(spans))
        out[task] = [spans[index] for index in order[: count or len(spans)].tolist()]
    return out


def write(path: pathlib.Path, support: Support) -> str:
    """The file of a draw, for data.episode_list; returns its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({task: [list(span) for span in spans] for task, spans in support.items()})
    atomic.write_text(path, text + "\n")
    return str(path)
