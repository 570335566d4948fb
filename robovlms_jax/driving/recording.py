"""Drives of the expert as a packed dataset, ready to train on. Pictures are rendered as they are packed."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from robovlms_jax import atomic, cores
from robovlms_jax.data import base, language, packing, statistics
from robovlms_jax.driving import camera, expert, instructions, scenarios, world
from robovlms_jax.driving.config import RecordingConfig

_SPAN, _PUSH = 4, np.array([0.35, 0.35, 0.9])
_CALM_M = 0.4
"""Gap to the cup below which nobody pushes."""
_NOISY = 0.5
"""Share of the wordings that have a meaningless word too many, or one too few."""
_STILL = 4
"""Frames after arriving, so that a policy learns to stay."""
_IN_PROCESSES = 5000
"""Fewer frames are packed by one process: more of them first import everything."""


@dataclasses.dataclass(frozen=True)
class Drive:
    """One episode: poses float[T, 3] in the room, odometry and actions float32[T, 3]."""

    layout: scenarios.Layout
    scenario: str
    seed: int
    poses: np.ndarray
    odometry: np.ndarray
    actions: np.ndarray


def record(config: RecordingConfig, root: str | os.PathLike[str], workers: int | None = None) -> dict[str, int]:
    """Write both splits to `root`, unless they are there; what was interrupted goes on. Returns episodes attempted,
    recorded (arrived as told, without a collision) and frames.

    Args:
      workers: processes; None: one per core, or one for little.
    Raises:
      ValueError: `root` holds something else, or a recording with other settings.
      OSError: it cannot be written.
    """
    root = pathlib.Path(root)
    root.mkdir(parents=True, exist_ok=True)
    # No templates, which would be English; each episode brings its own wordings.
    atomic.write_json(root / language.PARAPHRASES, {"templates": [], "sentences": {}})
    counts = {"attempted": 0, "recorded": 0, "frames": 0}
    plans = (("training", config.episodes, 0), ("validation", config.validation_episodes, 10**7))
    for split, episodes, first in plans:
        seeds = range(config.seed * 10**8 + first, config.seed * 10**8 + first + episodes)
        drives = drive(config, seeds)
        source = Frames(f"expert drives, {split}", drives, config.wordings)
        many = len(source.frame_ids) > _IN_PROCESSES
        count = workers or (cores.usable() if many else 1)
        packing.pack(source, root / split, frame_ids=source.frame_ids, workers=count)
        counts["attempted"] += episodes
        counts["recorded"] += len(drives)
        counts["frames"] += len(source.frame_ids)
    return counts


def drive(config: RecordingConfig, seeds: range) -> list[Drive]:
    """The expert in one room per seed, scenarios taking turns, all at once; those that end well."""
    names = list(scenarios.SCENARIOS)
    rooms = [names[i % len(names)] for i in range(len(seeds))]
    layouts = [scenarios.draw(name, seed) for name, seed in zip(rooms, seeds, strict=True)]
    layout = scenarios.stack(layouts)
    state, rng = world.reset(layout), np.random.default_rng(seeds.start)
    poses, odometry, actions, arrived = [], [], [], []
    push = np.zeros((len(seeds), 3))
    for step in range(config.max_steps):
        if step % _SPAN == 0:
            pushed = rng.random((len(seeds), 1)) < config.disturbance
            push = pushed * rng.uniform(-1, 1, (len(seeds), 3)) * _PUSH
        action = expert.act(layout, state)
        poses.append(state.pose)
        odometry.append(world.odometry(layout, state))
        actions.append(action.astype(np.float32))
        calm = world.cup_gap(layout, state.pose) < _CALM_M
        state = world.step(layout, state, action + np.where(calm[:, None], 0, push))
        arrived.append(world.succeeded(layout, state))
    arrived, good = np.array(arrived), ~state.collided
    length = np.minimum(arrived.argmax(axis=0) + 1 + _STILL, config.max_steps)
    columns = [np.stack(part, axis=1) for part in (poses, odometry, actions)]
    return [
        Drive(layouts[i], rooms[i], seed, *(part[i, : length[i]] for part in columns))
        for i, seed in enumerate(seeds)
        if arrived[:, i].any() and good[i]
    ]


class Frames:
    """Drives as what `packing.pack` reads: `packing.FrameSource`. Frame ids run on from drive to drive."""

    arrays = ("rel_actions", "robot_obs")
    action_units: tuple[float, ...] = ()

    def __init__(self, name: str, drives: list[Drive], wordings: int):
        if not drives:
            raise ValueError(f"{name}: no drive ended well; raise recording.episodes or recording.max_steps.")
        self.name, self._drives = name, drives
        self.robot = world.ROBOT
        self.image_sizes = {"front": camera.SIZE}
        ends = np.cumsum([len(drive.actions) for drive in drives])
        self._starts = np.concatenate([[0], ends[:-1]])
        self.frame_ids = np.arange(ends[-1])
        self.episodes = tuple(
            base.Episode(int(start), int(end) - 1, *_sentences(drive, wordings))
            for drive, start, end in zip(drives, self._starts, ends, strict=True)
        )
        self.statistics = statistics.compute(
            np.concatenate([drive.actions[:-1] for drive in drives]),
            np.concatenate([drive.odometry[:-1] for drive in drives]),
            len(drives),
            statistics.mask_of(self.robot),
        )

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        number = int(np.searchsorted(self._starts, frame_id, side="right")) - 1
        drive, step = self._drives[number], frame_id - int(self._starts[number])
        picture = camera.render(drive.layout, drive.poses[step])
        return {"front": picture}, {"rel_actions": drive.actions[step], "robot_obs": drive.odometry[step]}


def _sentences(drive: Drive, count: int) -> tuple[str, str, tuple[str, ...]]:
    """Instruction, task and rewordings of an episode: the first is the documents' sentence."""
    first = instructions.CANONICAL[drive.scenario]
    others = [instructions.ask(drive.scenario, drive.seed * 1000 + i, noisy_share=_NOISY) for i in range(count - 1)]
    return first, drive.scenario, tuple(dict.fromkeys(others))
