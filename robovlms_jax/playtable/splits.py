"""One split of a recording on disk: its journal, and its frames in CALVIN's layout or packed.

Whatever plays the chains, `record` takes them as they end. A recording that was stopped (killed, full disk) goes on
after the last line of its journal.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from robovlms_jax import atomic, bars, json_files, json_lines
from robovlms_jax.data import base, calvin, language, packed, packing, spool
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable import demonstrations
from robovlms_jax.training.directory import LOCK, OWNER

logger = logging.getLogger(__name__)

_IMPLIED = {"picture_every": 1}
"""What settings mean that leave it out, as those of earlier versions do."""

_JOURNAL = "recording.jsonl"
INTERVENTION = "intervention"
"""Array float64[T, 1] of a segment in which a person took over from a policy: 1 where a frame's action is the person's.
Frames in CALVIN's layout have it as a field."""
_CHAIN = ("number", "frames", "attempted", "segments")
"""Fields of a chain's line in the journal."""


def directory(out: pathlib.Path, split: str) -> pathlib.Path:
    """Where a split's journal is: beside the frames, so that it does not disturb the packed layout's directory."""
    return out / "journal" / split


def require_ours(out: pathlib.Path) -> None:
    """A new or empty directory, or a recording that was begun there."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a new directory.")
    if (
        out.exists()
        and any(path.name not in (LOCK, OWNER) for path in out.iterdir())
        and not (directory(out, "training") / _JOURNAL).exists()
    ):
        raise FileExistsError(f"{out} is not empty and holds no recording to go on with; choose a new directory.")


def require_room(picture_every: int, *, pack: bool) -> None:
    """Raise ValueError where frames without pictures are asked for in CALVIN's layout."""
    if picture_every != 1 and not pack:
        raise ValueError(
            f"picture_every={picture_every} leaves frames without pictures, for which CALVIN's layout has no room; add "
            "--pack."
        )


Chains = Iterable[tuple[int, Sequence[demonstrations.Segment], int]]
"""As they end: number, segments, tasks attempted."""


def record(
    journal: Journal,
    directory: pathlib.Path,
    count: int,
    image_size: tuple[int, int],
    play: Callable[[list[int], bars.Bar], Chains],
    *,
    pack: bool,
    unit: str = "chain",
    first: str = "compiling the simulator",
) -> None:
    """Record what is missing of `count` chains, or do what is left of a recording that was stopped after its last one.

    Args:
      directory: of the frames; its name is the split's. image_size: px of static and wrist camera.
      play: plays the chains of these numbers; told what to say meanwhile by way of the bar.
      pack: write the packed layout instead of one npz per frame. unit: what a chain is called. first: what the bar says
        before there is any.
    Raises:
      OSError: the disk is full or cannot be written; the chains before stay.
      RuntimeError: no demonstration of them succeeded, now or when they were recorded.
    """
    kind = SpooledFrames if pack else NpzFrames
    missing, done = sorted(set(range(count)) - journal.numbers), len(journal.numbers)
    if missing:
        frames = kind(directory, image_size)
        with bars.Bar(done + len(missing), unit, first, initial=done, desc=directory.name) as bar:
            _write(journal, frames, play(missing, bar), bar, directory.name)
    elif kind.unfinished(directory, journal):
        finish(journal, kind(directory, image_size))
    else:
        _require_success(journal, directory)


def finish(journal: Journal, frames: Frames) -> None:
    """What is left to do for a recording that was stopped after its last chain."""
    frames.discard(journal.num_frames)
    frames.finish(journal)


def _write(journal: Journal, frames: Frames, chains: Chains, bar: bars.Bar, split: str) -> None:
    """Chains as they come, then what describes the frames."""
    frames.discard(journal.num_frames)  # of a chain that was being written when a call before was stopped
    try:
        for number, segments, attempted in chains:
            journal.write(number, segments, attempted, frames)
            bar.update()
        frames.finish(journal)
    except OSError as error:
        frames.discard(journal.num_frames)  # which also makes room
        with contextlib.suppress(OSError, RuntimeError):
            frames.abandon(journal)
        raise OSError(
            f"{error}. {journal.out} keeps the {len(journal.numbers)} chains of {split} recorded so far; make room, "
            "and the same command goes on from there."
        ) from error


def own_sentences(*, held_out: bool) -> dict[str, tuple[str, ...]]:
    """This project's phrasings by task, those for training or those that it never uses."""
    return {name: task.held_out if held_out else task.phrasings for name, task in tasks.TASKS.items()}


def write_paraphrases(
    out: pathlib.Path, training: Mapping[str, Sequence[str]], validation: Mapping[str, Sequence[str]]
) -> None:
    """Beside the splits, unless it is there, what `data.paraphrases` takes: of each training sentence, this project's
    own for its task; validation's are in it as what nobody is told, and both by their tasks. One that cannot be read is
    put aside."""
    if (path := out / language.PARAPHRASES).exists():
        try:
            language.read(str(path))
        except ValueError as error:
            aside = path.with_suffix(".damaged.json")
            path.replace(aside)
            logger.warning("%s It is put aside as %s, and another is written.", error, aside.name)
        else:
            return
    own = own_sentences(held_out=False)
    counts = collections.Counter(text for said in training.values() for text in said)
    others = {
        text: [other for other in own.get(task, ()) if other != text]
        for task, said in training.items()
        for text in said
        if counts[text] == 1  # of two tasks, it says neither
    }
    never = sorted({text for said in validation.values() for text in said})
    asked = {task: sorted({*said, *validation.get(task, ())}) for task, said in training.items()}
    atomic.write_json(path, {"templates": [], "sentences": others, "never": never, "tasks": asked})


class Journal:
    """One split's journal: a line per finished chain. What describes the frames is made from it, so whenever
    recording stops, it can go on after the last line.

    Args:
      sentences: task -> what its segments are annotated with, taking turns.
      durable: a chain that is written is safe from a power failure, too.
    Raises:
      ValueError: the journal was begun with other settings, or is damaged.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        settings: Mapping[str, Any],
        sentences: Mapping[str, Sequence[str]],
        *,
        durable: bool = False,
    ):
        directory.mkdir(parents=True, exist_ok=True)
        self._journal, self._sentences, self._durable = directory / _JOURNAL, sentences, durable
        rows = json_lines.read(
            self._journal,
            lambda number, row: row["settings"] if number == 1 else {name: row[name] for name in _CHAIN},
            expected="a recorded chain",
            remedy="The journal is damaged; record into a new directory.",
        )
        if not rows:
            json_lines.append(self._journal, {"settings": settings}, durable=durable)
            rows = [settings]
        differing = json_files.differences(_IMPLIED | rows[0], _IMPLIED | dict(settings))
        if differing:
            raise ValueError(
                f"{directory} was begun with other settings ({differing}); use a new directory (--data.root where "
                "training records, --out of a recorder), or delete it."
            )
        self.out = directory.parents[1]
        self.chains: list[dict[str, Any]] = rows[1:]

    @property
    def numbers(self) -> set[int]:
        """Of the finished chains."""
        return {chain["number"] for chain in self.chains}

    @property
    def num_frames(self) -> int:
        return sum(chain["frames"] for chain in self.chains)

    def episodes(self) -> list[base.Episode]:
        rows = [segment for chain in self.chains for segment in chain["segments"]]
        return [base.Episode(*row["span"], row["text"], row["task"]) for row in rows]

    def counts(self) -> dict[str, int]:
        attempted = sum(chain["attempted"] for chain in self.chains)
        return {"attempted": attempted, "recorded": len(self.episodes()), "frames": self.num_frames}

    def write(self, number: int, segments: Sequence[demonstrations.Segment], attempted: int, frames: Frames) -> None:
        """One chain's segments, one session: first its frames, then its line. What is annotated, and so learned from,
        is the whole of a segment, or the parts of it that its array `INTERVENTION` says a person did."""
        frame, written = self.num_frames, []
        texts = sum(len(chain["segments"]) for chain in self.chains)
        for segment in segments:
            frames.save(frame, segment)
            choices = self._sentences[segment.task]
            for first, last in _annotated(segment):
                text = choices[(texts + len(written)) % len(choices)]
                written.append({"span": [frame + first, frame + last], "task": segment.task, "text": text})
            frame += len(segment.arrays["rel_actions"])
        row = {"number": number, "frames": frame - self.num_frames, "attempted": attempted, "segments": written}
        json_lines.append(self._journal, row, durable=self._durable)
        self.chains.append(row)


def _annotated(segment: demonstrations.Segment) -> list[tuple[int, int]]:
    """First and last frame of what is to be learned from: the last frame of a span is where it led to."""
    length = len(segment.arrays["rel_actions"])
    by_person = segment.arrays.get(INTERVENTION)
    if by_person is None:
        return [(0, length - 1)]
    turns = np.flatnonzero(np.diff(by_person[:, 0] > 0.5, prepend=False, append=False)).reshape(-1, 2)
    return [(int(first), min(int(end), length - 1)) for first, end in turns if first < length - 1]


class Frames(Protocol):
    """Where frames go until they are all there."""

    def discard(self, first: int) -> None:
        """Forget frames from number `first` on."""

    def save(self, first: int, segment: demonstrations.Segment) -> None:
        """Write the frames of a segment; the first has number `first`."""

    def finish(self, journal: Journal) -> None:
        """Write what describes the frames."""

    @staticmethod
    def unfinished(directory: pathlib.Path, journal: Journal) -> bool:
        """Whether that is still to be done for the chains that are there."""

    def abandon(self, journal: Journal) -> None:
        """Leave behind what can be used of an unfinished recording."""


def _require_success(journal: Journal, directory: pathlib.Path) -> None:
    if not journal.num_frames and journal.chains and not journal.counts()["attempted"]:
        raise RuntimeError(
            f"{directory}: the policy did every task, which leaves nothing to show; ask for more chains (episodes, "
            "validation_episodes), or for fewer policy_steps in another directory."
        )
    if not journal.num_frames:
        raise RuntimeError(f"{directory}: no demonstration succeeded; raise max_steps or choose other tasks.")


class NpzFrames:
    """CALVIN's layout: one npz per frame, spans of sessions, language annotations. durable: frames that are saved are
    safe from a power failure, too."""

    def __init__(self, directory: pathlib.Path, image_size: tuple[int, int], *, durable: bool = False):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._durable = directory, durable

    def discard(self, first: int) -> None:
        for path in self._directory.glob("episode_*.npz"):
            if int(path.stem.removeprefix("episode_")) >= first:
                path.unlink()

    def save(self, first: int, segment: demonstrations.Segment) -> None:
        for t in range(len(segment.arrays["rel_actions"])):
            with open(self._directory / f"episode_{first + t:07d}.npz", "wb") as file:
                np.savez(
                    file,
                    rgb_static=segment.images["static"][t],
                    rgb_gripper=segment.images["wrist"][t],
                    **{name: x[t] for name, x in segment.arrays.items()},
                )
                if self._durable:
                    file.flush()
                    os.fsync(file.fileno())
        if self._durable:
            atomic.settle(self._directory)

    def abandon(self, journal: Journal) -> None:
        self.finish(journal)

    @staticmethod
    def unfinished(directory: pathlib.Path, journal: Journal) -> bool:
        lengths = directory / "ep_lens.npy"  # written last
        try:
            done = int(np.load(lengths).sum()) if lengths.exists() else 0
        except (ValueError, EOFError):  # a power failure may leave an empty file; it is written again
            return True
        return done != journal.num_frames

    def finish(self, journal: Journal) -> None:
        _require_success(journal, self._directory)
        episodes = journal.episodes()
        annotations = {
            "language": {
                "ann": [episode.instruction for episode in episodes],
                "task": [episode.task for episode in episodes],
                "emb": np.zeros((len(episodes), 1, 384), np.float32),
            },
            "info": {"episodes": [], "indx": [(episode.start, episode.end) for episode in episodes]},
        }
        lengths = np.array([chain["frames"] for chain in journal.chains if chain["frames"]])
        ends = np.cumsum(lengths)
        (self._directory / "lang_annotations").mkdir(exist_ok=True)
        for name, array in (
            ("lang_annotations/auto_lang_ann.npy", np.array(annotations)),
            ("ep_start_end_ids.npy", np.stack([ends - lengths, ends - 1], axis=1)),
            ("ep_lens.npy", lengths),
        ):
            with atomic.replacing(self._directory / name) as file:
                np.save(file, array)


class SpooledFrames:
    """The packed layout, by way of files of frames whose pictures are encoded already (`data.spool`)."""

    def __init__(self, directory: pathlib.Path, image_size: tuple[int, int]):
        sizes = {camera: (size, size) for camera, size in zip(("static", "wrist"), image_size, strict=True)}
        widths = {name: calvin.ARRAY_SIZES[name] for name in ("rel_actions", "actions", "robot_obs", "scene_obs")}
        self._directory = directory
        self._spool = spool.Spool(self._unpacked(directory), sizes, widths)

    @staticmethod
    def _unpacked(directory: pathlib.Path) -> pathlib.Path:
        return directory.with_name(f"{directory.name}.unpacked")

    def discard(self, first: int) -> None:
        self._spool.truncate(first)

    def save(self, first: int, segment: demonstrations.Segment) -> None:
        self._spool.add(segment.images, segment.arrays, segment.shown)

    def abandon(self, journal: Journal) -> None:
        pass  # the files of frames stay

    @staticmethod
    def unfinished(directory: pathlib.Path, journal: Journal) -> bool:
        left = SpooledFrames._unpacked(directory).exists()  # deleted when all is packed
        return journal.num_frames > 0 and (left or not (directory / packed.META).exists())

    def finish(self, journal: Journal) -> None:
        _require_success(journal, self._directory)
        self._spool.episodes = tuple(journal.episodes())
        packing.pack(self._spool, self._directory, frame_ids=np.arange(self._spool.num_frames))  # mere copying
        self._spool.delete()
