"""Scripted demonstrations in CALVIN's on-disk layout, ready to train on.

An episode is a chain of tasks, each done in the state the one before it left, as a person would play; every task that
the checker calls done is an annotated segment. A recording that was stopped (killed, full disk) goes on when it is
asked for again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from robovlms_jax import bars, json_files, json_lines
from robovlms_jax.data import base, calvin, packing, spool
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable import demonstrations
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.playtable.scene import RANDOM, check_name
from robovlms_jax.training.directory import LOCK, OWNER, claim

_JOURNAL = "recording.jsonl"
_CHAIN = ("number", "frames", "attempted", "segments")
"""Fields of a chain's line in the journal."""
PACK_FRAMES = 20_000
"""Fewer are packed by one process: more of them first import everything (two: 32 000 frames in 18 instead of 20 s,
16 000 in 12 instead of 11; two threads of one x86 core)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordConfig(DemonstrationConfig):
    """How many demonstrations, of what, where."""

    out: str
    """Directory to make; gets training/ and validation/."""
    episodes: int = 2000
    """Training chains."""
    pack: bool = False
    """Write the packed layout, which trains faster (data/README.md), instead of one npz per frame."""

    def __post_init__(self):
        super().__post_init__()
        if self.episodes < 1:
            raise ValueError(f"episodes={self.episodes} must be at least 1.")
        unknown = sorted(set(self.tasks) - set(tasks.TASKS))
        if unknown:
            raise ValueError(f"tasks has unknown {unknown}; known: {', '.join(tasks.TASKS)}.")
        if not self.scenes:
            raise ValueError("scenes is empty; name at least one table.")
        for name in (*self.scenes, self.validation_scene):
            check_name(name)

    @property
    def training_scenes(self) -> tuple[str, ...]:
        return (*self.scenes, *(f"{RANDOM}{i}" for i in range(self.random_scenes)))


def record(config: RecordConfig) -> dict[str, int]:
    """Write both splits. Returns demonstrations attempted, recorded and frames, for the report.

    What an interrupted call recorded stays: the same call goes on from there, also towards more episodes. A complete
    recording is left as it is.

    Raises:
      FileExistsError: `out` holds something else than a recording.
      ValueError: `out` holds a recording with other settings, or another process is recording there.
      OSError: `out` cannot be written, or the disk is full; what was recorded so far stays.
    """
    out = pathlib.Path(config.out)
    plan = (
        ("training", config.training_scenes, config.episodes, config.seed, False),
        ("validation", (config.validation_scene,), config.validation_episodes, config.seed + 1, True),
    )
    _require_ours(out)
    counts = {"attempted": 0, "recorded": 0, "frames": 0}
    # Both splits have all tables, so that they run the same compiled programs.
    names = tuple(dict.fromkeys((*config.training_scenes, config.validation_scene)))
    with claim(out):
        renderer = demonstrations.Renderer(names, config.image_size)
        for split, scenes, episodes, seed, held_out in plan:
            writer = _Writer(_directory(out, split), _settings(config, split), held_out=held_out)
            missing = sorted(set(range(episodes)) - writer.numbers)
            kind = _SpooledFrames if config.pack else _NpzFrames
            if missing:
                frames = kind(out / split, config)
                numbers = [names.index(name) for name in scenes]
                tables = demonstrations.Tables(config, renderer.scenes, numbers, seed, missing)
                _record_split(writer, frames, split, tables, renderer)
            elif writer.num_frames and kind.unfinished(out / split, writer):  # stopped after the last chain
                frames = kind(out / split, config)
                frames.discard(writer.num_frames)
                frames.finish(writer)
            for name, count in writer.counts().items():
                counts[name] += count
    return counts


def _record_split(
    writer: _Writer, frames: _Frames, split: str, tables: demonstrations.Tables, renderer: demonstrations.Renderer
) -> None:
    frames.discard(writer.num_frames)  # of a chain that was being written when a call before was stopped
    done = len(writer.numbers)
    try:
        total = len(tables.numbers) + done
        with bars.Bar(total, "chain", "compiling the simulator", initial=done, desc=split) as bar:
            tables.watch = lambda steps: bar.say(f"{steps} steps simulated")
            for number, segments, attempted in demonstrations.rendered(tables, renderer):
                writer.write(number, segments, attempted, frames)
                bar.update()
        frames.finish(writer)
    except OSError as error:
        frames.discard(writer.num_frames)  # which also makes room
        with contextlib.suppress(OSError, RuntimeError):
            frames.abandon(writer)
        raise OSError(
            f"{error}. {tables.config.out} keeps the {len(writer.numbers)} chains of {split} recorded so far; make "
            "room, and the same command goes on from there."
        ) from error


def _directory(out: pathlib.Path, split: str) -> pathlib.Path:
    """Where a split's journal is: beside the frames, so that it does not disturb the packed layout's directory."""
    return out / "journal" / split


def _require_ours(out: pathlib.Path) -> None:
    """A new or empty directory, or a recording that was begun there."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a new directory.")
    if (
        out.exists()
        and any(path.name not in (LOCK, OWNER) for path in out.iterdir())
        and not (_directory(out, "training") / _JOURNAL).exists()
    ):
        raise FileExistsError(f"{out} is not empty and holds no recording to go on with; choose a new directory.")


def _settings(config: RecordConfig, split: str) -> dict[str, Any]:
    """What has to be the same for a recording to be continued. How long it is may change, unless it is packed."""
    skipped = {"out", "tables", "episodes", "validation_episodes"}
    skipped |= {"validation_scene"} if split == "training" else {"scenes", "random_scenes"}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in skipped}
    if config.pack:
        values["episodes"] = config.episodes if split == "training" else config.validation_episodes
    return json.loads(json.dumps(values))


class _Writer:
    """One split's journal: a line per finished chain. What describes the frames is made from it, so whenever
    recording stops, it can go on after the last line.

    Raises:
      ValueError: the journal was begun with other settings, or is damaged.
    """

    def __init__(self, directory: pathlib.Path, settings: Mapping[str, Any], *, held_out: bool):
        directory.mkdir(parents=True, exist_ok=True)
        self._journal, self._held_out = directory / _JOURNAL, held_out
        rows = json_lines.read(
            self._journal,
            lambda number, row: row["settings"] if number == 1 else {name: row[name] for name in _CHAIN},
            expected="a recorded chain",
            remedy="The journal is damaged; record into a new directory.",
        )
        if not rows:
            json_lines.append(self._journal, {"settings": settings})
            rows = [settings]
        differing = json_files.differences(rows[0], settings)
        if differing:
            raise ValueError(
                f"{directory} was begun with other settings ({differing}); use a new directory, or delete it."
            )
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

    def write(self, number: int, segments: Sequence[demonstrations.Segment], attempted: int, frames: _Frames) -> None:
        """One chain's segments, one session: first its frames, then its line."""
        frame, written = self.num_frames, []
        texts = sum(len(chain["segments"]) for chain in self.chains)
        for segment in segments:
            frames.save(frame, segment)
            last = frame + len(segment.arrays["rel_actions"]) - 1
            text = tasks.instruction(segment.task, held_out=self._held_out, variant=texts + len(written))
            written.append({"span": [frame, last], "task": segment.task, "text": text})
            frame = last + 1
        row = {"number": number, "frames": frame - self.num_frames, "attempted": attempted, "segments": written}
        json_lines.append(self._journal, row)
        self.chains.append(row)


class _Frames(Protocol):
    """Where frames go until they are all there."""

    def discard(self, first: int) -> None:
        """Forget frames from number `first` on."""

    def save(self, first: int, segment: demonstrations.Segment) -> None:
        """Write the frames of a segment; the first has number `first`."""

    def finish(self, writer: _Writer) -> None:
        """Write what describes the frames."""

    @staticmethod
    def unfinished(directory: pathlib.Path, writer: _Writer) -> bool:
        """Whether that is still to be done for the chains that are there."""

    def abandon(self, writer: _Writer) -> None:
        """Leave behind what can be used of an unfinished recording."""


def _require_success(writer: _Writer, directory: pathlib.Path) -> None:
    if not writer.num_frames:
        raise RuntimeError(f"{directory}: no demonstration succeeded; raise max_steps or choose other tasks.")


class _NpzFrames:
    """CALVIN's layout: one npz per frame, spans of sessions, language annotations."""

    def __init__(self, directory: pathlib.Path, config: RecordConfig):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def discard(self, first: int) -> None:
        for path in self._directory.glob("episode_*.npz"):
            if int(path.stem.removeprefix("episode_")) >= first:
                path.unlink()

    def save(self, first: int, segment: demonstrations.Segment) -> None:
        for t in range(len(segment.arrays["rel_actions"])):
            np.savez(
                self._directory / f"episode_{first + t:07d}.npz",
                rgb_static=segment.images["static"][t],
                rgb_gripper=segment.images["wrist"][t],
                **{name: x[t] for name, x in segment.arrays.items()},
            )

    def abandon(self, writer: _Writer) -> None:
        self.finish(writer)

    @staticmethod
    def unfinished(directory: pathlib.Path, writer: _Writer) -> bool:
        lengths = directory / "ep_lens.npy"  # written last
        return not lengths.exists() or int(np.load(lengths).sum()) != writer.num_frames

    def finish(self, writer: _Writer) -> None:
        _require_success(writer, self._directory)
        episodes = writer.episodes()
        annotations = {
            "language": {
                "ann": [episode.instruction for episode in episodes],
                "task": [episode.task for episode in episodes],
                "emb": np.zeros((len(episodes), 1, 384), np.float32),
            },
            "info": {"episodes": [], "indx": [(episode.start, episode.end) for episode in episodes]},
        }
        lengths = np.array([chain["frames"] for chain in writer.chains if chain["frames"]])
        ends = np.cumsum(lengths)
        (self._directory / "lang_annotations").mkdir(exist_ok=True)
        np.save(self._directory / "lang_annotations" / "auto_lang_ann.npy", annotations, allow_pickle=True)
        np.save(self._directory / "ep_start_end_ids.npy", np.stack([ends - lengths, ends - 1], axis=1))
        np.save(self._directory / "ep_lens.npy", lengths)


class _SpooledFrames:
    """The packed layout, by way of one file of raw frames."""

    def __init__(self, directory: pathlib.Path, config: RecordConfig):
        sizes = {camera: (size, size) for camera, size in zip(("static", "wrist"), config.image_size, strict=True)}
        widths = {name: calvin.ARRAY_SIZES[name] for name in ("rel_actions", "actions", "robot_obs", "scene_obs")}
        self._directory = directory
        self._spool = spool.Spool(self._raw(directory), sizes, widths)

    @staticmethod
    def _raw(directory: pathlib.Path) -> pathlib.Path:
        return directory.with_name(f"{directory.name}.raw")

    def discard(self, first: int) -> None:
        self._spool.truncate(first)

    def save(self, first: int, segment: demonstrations.Segment) -> None:
        self._spool.add(segment.images, segment.arrays)

    def abandon(self, writer: _Writer) -> None:
        pass  # the file of raw frames stays

    @staticmethod
    def unfinished(directory: pathlib.Path, writer: _Writer) -> bool:
        return _SpooledFrames._raw(directory).exists()  # deleted when all is packed

    def finish(self, writer: _Writer) -> None:
        _require_success(writer, self._directory)
        self._spool.episodes = tuple(writer.episodes())
        numbers = np.arange(self._spool.num_frames)
        workers = (os.cpu_count() or 1) if len(numbers) > PACK_FRAMES else 1
        packing.pack(self._spool, self._directory, frame_ids=numbers, workers=workers)
        self._spool.delete()
