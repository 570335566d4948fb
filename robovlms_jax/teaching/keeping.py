"""Trials in which a person took over, on the disk: a training split as scripted demonstrations have it."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robovlms_jax.playtable import demonstrations, splits
from robovlms_jax.teaching.lesson import Exercise, Kept, Step
from robovlms_jax.training.directory import claim

log = logging.getLogger(__name__)

SPLIT = "training"


class Keeper:
    """Writes trials one by one; each is safe when `keep` returns, and can be trained on at once.

    Frames lie in CALVIN's layout, a file each, with the field `splits.INTERVENTION` beside CALVIN's own. All steps of a
    trial are kept; annotated, and so learned from, are those of the person.
    """

    def __init__(self, out: pathlib.Path, settings: Mapping[str, Any], tables: Sequence[str], size: tuple[int, int]):
        sentences = splits.own_sentences(held_out=False)
        self._journal = splits.Journal(splits.directory(out, SPLIT), settings, sentences, durable=True)
        self._frames = splits.NpzFrames(out / SPLIT, size, durable=True)
        self._renderer, self._tables = demonstrations.Renderer(tables, size), tuple(tables)
        if splits.NpzFrames.unfinished(out / SPLIT, self._journal):  # it was killed behind its last line
            splits.finish(self._journal, self._frames)
        else:
            self._frames.discard(self._journal.num_frames)

    @property
    def numbers(self) -> set[int]:
        """Of the trials that have ended."""
        return self._journal.numbers

    @property
    def kept(self) -> Kept:
        counts = self._journal.counts()
        return Kept(len(self._journal.chains), counts["recorded"], counts["frames"])

    def warm_up(self, state: Any) -> None:
        """Compiles what makes pictures. state: any, of bodies."""
        zeros = np.zeros(7, np.float32)
        self._segments(self._tables[0], "", [Step(state, np.zeros(15), np.zeros(24), zeros, False, False)])

    def keep(self, exercise: Exercise, steps: Sequence[Step]) -> Kept:
        """See `lesson.Keep`. Raises OSError where it cannot be written; what was there before stays."""
        segments = self._segments(exercise.table, exercise.task, steps) if steps else []
        self._frames.discard(self._journal.num_frames)  # of a trial that could not be written
        try:
            self._journal.write(exercise.number, segments, 1, self._frames)
        except OSError:
            with contextlib.suppress(OSError):
                self._frames.discard(self._journal.num_frames)  # which also makes room
            raise
        if segments:
            try:
                self._frames.finish(self._journal)
            except OSError:  # the trial is safe; its line in the journal is what counts
                log.exception("what describes the frames could not be written; the next trial, or start, does it")
        return self.kept

    def _segments(self, table: str, task: str, steps: Sequence[Step]) -> list[demonstrations.Segment]:
        """One, with its pictures."""
        columns = list(zip(*steps, strict=True))
        states = jax.tree.map(lambda *leaves: np.stack(leaves), *columns[0])
        robot, scene, actions, by_person, done = (np.stack(column) for column in columns[1:])
        demo = demonstrations.Demo(task, demonstrations.Steps(states, robot, scene, actions, done))
        chain = demonstrations.Chain(0, self._tables.index(table), np.random.default_rng(0), {}, np.zeros(3))
        chain.demos.append(demo)
        ((_, (segment,), _),) = self._renderer.segments([chain])
        whose = {splits.INTERVENTION: by_person[:, None].astype(np.float64)}
        return [segment._replace(arrays={**segment.arrays, **whose})]


@contextlib.contextmanager
def keeper(
    out: pathlib.Path, settings: Mapping[str, Any], tables: Sequence[str], size: tuple[int, int]
) -> Iterator[Keeper]:
    """The only one who writes there.

    Raises:
      ValueError: it was begun with other settings, or another process writes there.
      OSError: something else is there, or it cannot be written.
    """
    splits.require_ours(out)
    with claim(out):
        yield Keeper(out, settings, tables, size)
