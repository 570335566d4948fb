"""Record scripted demonstrations on PlayTable in CALVIN's on-disk layout, ready to train on.

    python -m experiments.record_playtable --episodes 2000 --out data/playtable

An episode is a chain of tasks, each done in the state the one before it left, as a person would play; every task that
the checker calls done is an annotated segment. Training scenes and validation scene differ, and so do their phrasings.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
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

    Raises:
      FileExistsError: `out` is not empty.
    """
    out = pathlib.Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose a new directory.")
    counts = {"attempted": 0, "recorded": 0, "frames": 0}
    plan = (
        ("training", config.scenes, config.episodes, config.seed, False),
        ("validation", (config.validation_scene,), config.validation_episodes, config.seed + 1, True),
    )
    target = out / "npz" if config.pack else out
    for split, scenes, episodes, seed, held_out in plan:
        writer = _SplitWriter(target / split, held_out=held_out)
        with tqdm.tqdm(total=episodes, unit="chain", desc=split) as bar:
            for segments, attempted in _chains(config, scenes, episodes, seed):
                counts["attempted"] += attempted
                counts["recorded"] += len(segments)
                counts["frames"] += writer.write(segments)
                bar.update()
        writer.close()
    if config.pack:
        pack_calvin.main(pack_calvin.Args(root=target, out=out))
        shutil.rmtree(target)
    return counts


def _chains(
    config: RecordConfig, scenes: tuple[str, ...], episodes: int, seed: int
) -> Iterator[tuple[list[Segment], int]]:
    """Per chain: its segments in order, and how many tasks were attempted."""
    rng = np.random.default_rng(seed)
    names = sorted(tasks.SCENES)  # all of them, so that both splits run the same compiled programs
    stacked = env.stack_scenes(names)
    backdrops = env.backdrops(stacked, config.image_size[0])
    for first in range(0, episodes, config.tables):
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
        yield from zip(segments, attempted.tolist(), strict=True)


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
    """CALVIN's layout: one npz per frame, spans of sessions, language annotations."""

    def __init__(self, directory: pathlib.Path, *, held_out: bool):
        directory.mkdir(parents=True)
        self._directory, self._held_out = directory, held_out
        self._frame = 0
        self._sessions: list[tuple[int, int]] = []
        self._spans: list[tuple[int, int]] = []
        self._texts: list[str] = []
        self._tasks: list[str] = []

    def write(self, segments: list[Segment]) -> int:
        """One chain's segments, one session. Returns frames written."""
        begin = self._frame
        for segment in segments:
            length = len(segment.arrays["rel_actions"])
            for t in range(length):
                np.savez(
                    self._directory / f"episode_{self._frame + t:07d}.npz",
                    rgb_static=segment.images["static"][t],
                    rgb_gripper=segment.images["wrist"][t],
                    **{name: x[t] for name, x in segment.arrays.items()},
                )
            self._spans.append((self._frame, self._frame + length - 1))
            variant = len(self._texts)
            self._texts.append(tasks.instruction(segment.task, held_out=self._held_out, variant=variant))
            self._tasks.append(segment.task)
            self._frame += length
        if self._frame > begin:
            self._sessions.append((begin, self._frame - 1))
        return self._frame - begin

    def close(self) -> None:
        """Write what describes the frames. Raises RuntimeError when not a single demonstration succeeded."""
        if not self._spans:
            raise RuntimeError(f"{self._directory}: no demonstration succeeded; raise max_steps or choose other tasks.")
        annotations = {
            "language": {"ann": self._texts, "task": self._tasks, "emb": np.zeros((len(self._texts), 1, 384))},
            "info": {"episodes": [], "indx": self._spans},
        }
        (self._directory / "lang_annotations").mkdir()
        np.save(self._directory / "lang_annotations" / "auto_lang_ann.npy", annotations, allow_pickle=True)
        np.save(self._directory / "ep_start_end_ids.npy", np.array(self._sessions))
        np.save(self._directory / "ep_lens.npy", np.array([last - first + 1 for first, last in self._sessions]))


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
