"""Record scripted demonstrations on PlayTable in CALVIN's on-disk layout, ready to train on.

    python -m experiments.record_playtable --episodes 2000 --out data/playtable

An episode is a chain of tasks, each done in the state the one before it left, as a person would play; every task that
the checker calls done is an annotated segment. Training scenes and validation scene differ, and so do their phrasings.
A recording that was stopped (killed, full disk) goes on when the same command is given again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tqdm
import tyro

from experiments import pack_calvin
from robovlms_jax.envs import tasks
from robovlms_jax.envs.playtable import env, experts, physics

FIXTURE_TASKS = (
    *("open_drawer", "close_drawer", "move_slider_left", "move_slider_right"),
    *("turn_on_lightbulb", "turn_off_lightbulb", "turn_on_led", "turn_off_led"),
)
HOLD_STEPS = 2
"""Steps recorded after a task is done, as CALVIN's segments have them."""
RENDER_BATCH = 32
_JOURNAL = "recording.jsonl"


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """How many demonstrations, of what, where."""

    out: str
    """Directory to make; gets training/ and validation/."""
    episodes: int = 2000
    """Training chains."""
    validation_episodes: int = 100
    """Validation chains."""
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    """Task ids to demonstrate; all 34 by default."""
    scenes: tuple[str, ...] = ("A", "B", "C")
    """Tables of the training split; chains take turns."""
    validation_scene: str = "D"
    """Table of the validation split."""
    chain_length: int = 5
    """Tasks per chain; a chain ends early when no task of the list is possible or the expert fails."""
    max_steps: int = 200
    """Control steps an expert may take for one task."""
    image_size: tuple[int, int] = (200, 84)
    """Pixels of static and wrist camera."""
    tables: int = 16
    """Tables simulated side by side."""
    seed: int = 0
    pack: bool = False
    """Pack both splits afterwards (`experiments.pack_calvin`) and drop the npz files."""

    def __post_init__(self):
        for field in ("episodes", "validation_episodes", "chain_length", "max_steps", "tables"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        unknown = sorted(set(self.tasks) - set(tasks.TASKS))
        if unknown or not self.tasks:
            raise ValueError(f"tasks has unknown {unknown}; known: {', '.join(tasks.TASKS)}.")
        bad = sorted({*self.scenes, self.validation_scene} - set(tasks.SCENES))
        if bad or not self.scenes:
            raise ValueError(f"scenes {bad} are unknown; known: {', '.join(tasks.SCENES)}.")


class Segment(NamedTuple):
    """One demonstrated task. images: camera -> uint8[T, size, size, 3]; arrays: CALVIN field -> float64[T, d]."""

    chain: int
    task: str
    images: Mapping[str, np.ndarray]
    arrays: Mapping[str, np.ndarray]


def record(config: RecordConfig) -> dict[str, int]:
    """Write both splits. Returns demonstrations attempted, recorded and frames, for the report.

    What an interrupted call recorded stays: the same call goes on from there, also towards more episodes.

    Raises:
      FileExistsError: `out` holds something else than a recording with these settings.
      OSError: `out` cannot be written, or the disk is full; what was recorded so far is complete and can be read.
    """
    out = pathlib.Path(config.out)
    target = out / "npz" if config.pack else out
    _require_ours(out, target)
    counts = {"attempted": 0, "recorded": 0, "frames": 0}
    plan = (
        ("training", config.scenes, config.episodes, config.seed, False),
        ("validation", (config.validation_scene,), config.validation_episodes, config.seed + 1, True),
    )
    for split, scenes, episodes, seed, held_out in plan:
        writer = _SplitWriter(target / split, _settings(config, split), held_out=held_out)
        done = writer.num_chains
        try:
            with tqdm.tqdm(total=max(episodes, done), initial=done, unit="chain", desc=split) as bar:
                for segments, attempted in _chains(config, scenes, episodes, seed, done):
                    writer.write(segments, attempted)
                    bar.update()
        except OSError as error:
            writer.discard_unfinished()  # which also makes room for the index
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()
            raise OSError(
                f"{error}. {target / split} keeps the {writer.num_chains} chains recorded so far; make room, and the "
                "same command goes on from there."
            ) from error
        for name, count in writer.close().items():
            counts[name] += count
    if config.pack:
        pack_calvin.main(pack_calvin.Args(root=target, out=out))
        shutil.rmtree(target)
    return counts


def _require_ours(out: pathlib.Path, target: pathlib.Path) -> None:
    """A new or empty directory, or a recording that was begun there."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a new directory.")
    if out.exists() and any(out.iterdir()) and not (target / "training" / _JOURNAL).exists():
        raise FileExistsError(f"{out} is not empty and holds no recording to go on with; choose a new directory.")


def _settings(config: RecordConfig, split: str) -> dict[str, Any]:
    """What has to be the same for a recording to be continued; how long it is does not."""
    skipped = {"out", "pack", "episodes", "validation_episodes"}
    skipped |= {"validation_scene"} if split == "training" else {"scenes"}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in skipped}
    return json.loads(json.dumps(values))


def _chains(
    config: RecordConfig, scenes: tuple[str, ...], episodes: int, seed: int, begin: int
) -> Iterator[tuple[list[Segment], int]]:
    """Chains number `begin` and up: the segments of each in order, and how many tasks were attempted."""
    if begin >= episodes:
        return
    names = sorted(tasks.SCENES)  # all of them, so that both splits run the same compiled programs
    stacked = env.stack_scenes(names)
    backdrops = env.backdrops(stacked, config.image_size[0])
    for first in range(begin - begin % config.tables, episodes, config.tables):
        rng = np.random.default_rng([seed, first])  # so that a recording can begin at any group
        size = min(config.tables, episodes - first)
        which = np.array([names.index(scenes[(first + i) % len(scenes)]) for i in range(config.tables)], np.int32)
        conditions = [tasks.initial_conditions()[rng.integers(len(tasks.initial_conditions()))] for _ in which]
        starts = [tasks.initial_state(c, names[w]) for c, w in zip(conditions, which)]
        robot, scene = (np.stack(x).astype(np.float32) for x in zip(*starts))
        states = env.reset_batch(stacked, which, robot, scene)
        alive = np.arange(config.tables) < size
        segments: list[list[Segment]] = [[] for _ in range(size)]
        attempted = np.zeros(size, int)
        for _ in range(config.chain_length):
            chosen = [_choose(c, config.tasks, rng) if live else None for c, live in zip(conditions, alive)]
            alive &= np.array([task is not None for task in chosen])
            if not alive.any():
                break
            numbers = np.array([experts.TASKS.index(task) if task else 0 for task in chosen], np.int32)
            keys = jax.random.split(jax.random.key(rng.integers(2**31)), config.tables)
            demos = _demonstrate(stacked, which, states, numbers, keys, config.max_steps)
            done = np.asarray(demos.done)  # [T, tables]
            last = np.where(done.any(0), done.argmax(0) + HOLD_STEPS, config.max_steps)
            attempted[alive[:size]] += 1
            alive &= last < config.max_steps
            for table in np.flatnonzero(alive):
                demo = jax.tree.map(lambda x, table=table, end=last[table]: x[: end + 1, table], demos)
                segments[table].append(
                    _segment(first + table, chosen[table], demo, stacked, which[table], backdrops, config)
                )
                conditions[table] = tasks.successors(conditions[table], chosen[table])[0]
            ends = np.minimum(last + 1, config.max_steps - 1)
            states = jax.tree.map(lambda x, ends=ends: x[ends, np.arange(config.tables)], demos.states)
        yield from list(zip(segments, attempted.tolist(), strict=True))[max(begin - first, 0) :]


def _choose(condition: tasks.Condition, names: tuple[str, ...], rng: np.random.Generator) -> str | None:
    possible = [name for name in names if len(tasks.successors(condition, name)) == 1]
    return possible[rng.integers(len(possible))] if possible else None


@functools.partial(jax.jit, static_argnums=5)
def _demonstrate(stacked: Any, which: Any, states: Any, numbers: Any, keys: Any, steps: int) -> experts.Demonstration:
    """`experts.demonstrate` on every table; leaves [T, tables, ...]."""

    def one(index, state, number, key):
        return experts.demonstrate(jax.tree.map(lambda x: x[index], stacked), state, number, key, steps)

    return jax.vmap(one, out_axes=1)(which, states, numbers, keys)


def _segment(
    chain: int, task: str, demo: experts.Demonstration, stacked: Any, which: int, backdrops: Any, config: RecordConfig
) -> Segment:
    """Render and measure the states of one demonstration."""
    length = len(demo.actions)
    padded = -(-length // RENDER_BATCH) * RENDER_BATCH
    states = jax.tree.map(lambda x: x[np.minimum(np.arange(padded), length - 1)], demo.states)
    parts: dict[str, list[np.ndarray]] = {"static": [], "wrist": []}
    index = np.full(RENDER_BATCH, which, np.int32)
    for begin in range(0, padded, RENDER_BATCH):
        some = jax.tree.map(lambda x, begin=begin: x[begin : begin + RENDER_BATCH], states)
        for camera, size in zip(("static", "wrist"), config.image_size):
            parts[camera].append(np.asarray(env.render_batch(stacked, index, some, camera, size, backdrops)))
    info = env.info_batch(stacked, np.full(padded, which, np.int32), states)
    robot, scene = (np.asarray(info[name], np.float64)[:length] for name in ("robot_obs", "scene_obs"))
    relative = np.asarray(demo.actions, np.float64)
    scaled = relative * np.array([*[physics.TRANSLATION_M] * 3, *[physics.ROTATION_RAD] * 3, 1.0])
    target = scaled + np.concatenate([robot[:, :6], np.zeros((length, 1))], axis=1)
    images = {camera: np.concatenate(x)[:length] for camera, x in parts.items()}
    return Segment(
        chain, task, images, {"rel_actions": relative, "actions": target, "robot_obs": robot, "scene_obs": scene}
    )


class _SplitWriter:
    """CALVIN's layout: one npz per frame, spans of sessions, language annotations.

    A journal beside them has one line per finished chain, from which the rest is written at the end; so whenever
    recording stops, it can go on after the last line.

    Raises:
      ValueError: the directory's journal was begun with other settings, or is damaged.
    """

    def __init__(self, directory: pathlib.Path, settings: Mapping[str, Any], *, held_out: bool):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._held_out = directory, held_out
        self._journal = directory / _JOURNAL
        self._chains: list[dict[str, Any]] = []
        text = self._journal.read_bytes() if self._journal.exists() else b""
        complete = text[: text.rfind(b"\n") + 1]  # without a line that was being written
        if not complete:
            self._journal.write_text(json.dumps({"settings": settings}) + "\n")
            return
        self._chains = self._read(complete.decode(), settings)
        if len(complete) < len(text):
            self._journal.write_bytes(complete)
        self.discard_unfinished()

    @property
    def num_chains(self) -> int:
        return len(self._chains)

    @property
    def _frame(self) -> int:
        """Number of the next frame."""
        return sum(chain["frames"] for chain in self._chains)

    def write(self, segments: list[Segment], attempted: int) -> None:
        """One chain's segments, one session."""
        frame, begin, written = self._frame, self._frame, []
        texts = sum(len(chain["segments"]) for chain in self._chains)
        for segment in segments:
            length = len(segment.arrays["rel_actions"])
            for t in range(length):
                np.savez(
                    self._path(frame + t),
                    rgb_static=segment.images["static"][t],
                    rgb_gripper=segment.images["wrist"][t],
                    **{name: x[t] for name, x in segment.arrays.items()},
                )
            text = tasks.instruction(segment.task, held_out=self._held_out, variant=texts + len(written))
            written.append({"span": [frame, frame + length - 1], "task": segment.task, "text": text})
            frame += length
        row = {"frames": frame - begin, "attempted": attempted, "segments": written}
        with self._journal.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._chains.append(row)

    def discard_unfinished(self) -> None:
        """Remove frames of a chain that is not in the journal, and the journal's torn last line."""
        for path in self._directory.glob("episode_*.npz"):
            if int(path.stem.removeprefix("episode_")) >= self._frame:
                path.unlink()
        text = self._journal.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(self._journal, text.rfind(b"\n") + 1)

    def close(self) -> dict[str, int]:
        """Write what describes the frames. Returns demonstrations attempted, recorded and frames.

        Raises:
          RuntimeError: not a single demonstration succeeded.
        """
        segments = [segment for chain in self._chains for segment in chain["segments"]]
        if not segments:
            raise RuntimeError(f"{self._directory}: no demonstration succeeded; raise max_steps or choose other tasks.")
        annotations = {
            "language": {
                "ann": [segment["text"] for segment in segments],
                "task": [segment["task"] for segment in segments],
                "emb": np.zeros((len(segments), 1, 384), np.float32),
            },
            "info": {"episodes": [], "indx": [tuple(segment["span"]) for segment in segments]},
        }
        lengths = np.array([chain["frames"] for chain in self._chains if chain["frames"]])
        ends = np.cumsum(lengths)
        (self._directory / "lang_annotations").mkdir(exist_ok=True)
        np.save(self._directory / "lang_annotations" / "auto_lang_ann.npy", annotations, allow_pickle=True)
        np.save(self._directory / "ep_start_end_ids.npy", np.stack([ends - lengths, ends - 1], axis=1))
        np.save(self._directory / "ep_lens.npy", lengths)
        attempted = sum(chain["attempted"] for chain in self._chains)
        return {"attempted": attempted, "recorded": len(segments), "frames": int(ends[-1])}

    def _path(self, frame: int) -> pathlib.Path:
        return self._directory / f"episode_{frame:07d}.npz"

    def _read(self, text: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            first, *rows = map(json.loads, text.splitlines())
            theirs = first["settings"]
            assert all({"frames", "attempted", "segments"} <= set(row) for row in rows)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{self._journal} is damaged; record into a new directory.") from error
        differing = sorted(key for key in {*theirs, *settings} if theirs.get(key) != settings.get(key))
        if differing:
            changes = ", ".join(f"{key}: {theirs.get(key)} there, {settings.get(key)} here" for key in differing)
            raise ValueError(f"{self._directory} was begun with other settings ({changes}); use a new directory.")
        return rows


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = tyro.cli(Annotated[RecordConfig, tyro.conf.AvoidSubcommands], description=__doc__)
    try:
        counts = record(config)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    logging.info(
        "recorded %(recorded)d of %(attempted)d demonstrations, %(frames)d frames, in %(out)s",
        counts | {"out": config.out},
    )


if __name__ == "__main__":
    main()
