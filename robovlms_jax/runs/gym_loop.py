"""A run in a Gymnasium environment: an expert's demonstrations before it, the policy's own episodes after it."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from robovlms_jax import atomic, json_files, schema
from robovlms_jax.control.execution import BatchedPolicy, Execution
from robovlms_jax.control.robot import RobotSpec
from robovlms_jax.data import base, packed, packing, statistics
from robovlms_jax.envs import gym, vector
from robovlms_jax.evaluation import chains, filing, filmed, rollout
from robovlms_jax.evaluation.report import films as film_files
from robovlms_jax.evaluation.report import rollouts as rollout_report
from robovlms_jax.runs import robots
from robovlms_jax.schema import require

logger = logging.getLogger(__name__)

Expert = Callable[[Any], np.ndarray]
"""The environment's own observation -> the action float[A] to take; without memory."""

HEADING = "## Episodes in the environment"
"""Of the section that `evaluate` writes."""

_VALIDATION_SEEDS, _TRIAL_SEEDS = 10**6, 2 * 10**6
"""First seeds of the validation split and of the policy's episodes; demonstrations for training begin at 0."""


@dataclasses.dataclass(frozen=True)
@schema.checked("recording")
class RecordingConfig:
    """Demonstrations by an expert, recorded to data.root before the run unless they are there."""

    expert: str = ""
    """MODULE:FUNCTION, which is given an observation of the environment and returns an action."""
    episodes: int = 0
    """Of the training split; those that fail are left out. 0: nothing is recorded."""
    validation_episodes: int = 20
    noise: float = 0.0
    """Spread of what is added to executed actions, as a share of their range. Recorded is what the expert wanted, so
    that a policy sees how to come back (Laskey et al. 2017, arXiv:1703.09327)."""
    wander: int = 0
    """At most so many random actions before the expert's, drawn anew for each episode and not recorded. Where every
    episode begins at one pose, how far the robot has gone tells where the expert is going, and a policy reads it there
    instead of in the pictures."""
    max_steps: int = 50
    """Of the expert."""
    hold: int = 2
    """Frames after success, so that a policy learns to stay."""

    def __post_init__(self):
        for field in ("episodes", "hold", "wander"):
            require(getattr(self, field) >= 0, f"recording.{field}={getattr(self, field)} must not be negative.")
        for field in ("validation_episodes", "max_steps"):
            require(getattr(self, field) >= 1, f"recording.{field}={getattr(self, field)} must be at least 1.")
        require(0 <= self.noise <= 1, f"recording.noise={self.noise} must lie in [0, 1].")
        require(
            not self.episodes or self.expert.count(":") == 1,
            f"recording.expert={self.expert!r} must be MODULE:FUNCTION where episodes are to be recorded.",
        )


@dataclasses.dataclass(frozen=True)
@schema.checked("trials")
class TrialsConfig:
    """The policy's own episodes after training, from seeds that no recording has."""

    count: int = 100
    """0: none."""
    max_steps: int = 50
    """Control steps of each."""
    execution: Execution = Execution("receding", horizon=2)
    environments: int = 4
    """Side by side, in this process."""
    films: int = 4

    def __post_init__(self):
        for field in ("count", "films"):
            require(getattr(self, field) >= 0, f"trials.{field}={getattr(self, field)} must not be negative.")
        for field in ("max_steps", "environments"):
            require(getattr(self, field) >= 1, f"trials.{field}={getattr(self, field)} must be at least 1.")


def load_expert(name: str) -> Expert:
    """`MODULE:FUNCTION` as a function. Raises ValueError: there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"recording.expert={name!r} cannot be found: {error}.") from error


class _Episode(NamedTuple):
    """frames: camera -> uint8[T, height, width, 3]; state float32[T, P]; actions float32[T, A]."""

    frames: Mapping[str, np.ndarray]
    state: np.ndarray
    actions: np.ndarray
    instruction: str


def record(layout: gym.Layout, robot: RobotSpec, config: RecordingConfig, root: str) -> dict[str, int]:
    """Write both splits to `root` unless they are there. Returns how many episodes were attempted and recorded, and
    their frames; of what was there before, nothing is attempted.

    Raises ValueError, ImportError, OSError: no such expert or environment, `root` holds something else.
    """
    counts = {"attempted": 0, "recorded": 0, "frames": 0}
    splits = {"training": (config.episodes, 0), "validation": (config.validation_episodes, _VALIDATION_SEEDS)}
    _claim(pathlib.Path(root), layout, config)
    missing = [split for split in splits if not (pathlib.Path(root) / split / packed.META).exists()]
    if not missing:
        logger.info("%s holds demonstrations already; nothing is recorded", root)
        return counts
    expert, env = load_expert(config.expert), gym.GymEnv(layout, robot)
    try:
        for split in missing:
            count, first = splits[split]
            seeds = tqdm.trange(first, first + count, desc=f"{layout.id}, {split}")
            found = [x for seed in seeds if (x := _play(env, expert, layout, config, seed)) is not None]
            source = _Frames(f"{layout.id}, {split}", robot, found)
            packing.pack(source, pathlib.Path(root) / split, frame_ids=source.frame_ids)
            counts["attempted"] += count
            counts["recorded"] += len(found)
            counts["frames"] += len(source.frame_ids)
    finally:
        env.close()
    return counts


def _claim(root: pathlib.Path, layout: gym.Layout, config: RecordingConfig) -> None:
    """Write down what is recorded here. Raises ValueError: something else was."""
    asked = {"layout": layout.to_json(), "recording": schema.to_dict(config)}
    if not config.wander:  # as recordings of versions that knew no such thing
        del asked["recording"]["wander"]
    path = root / "recording.json"
    if path.exists():
        differing = json_files.differences(json_files.read_object(path, "a recording's settings"), asked)
        if differing:
            raise ValueError(f"{root} holds demonstrations of other settings ({differing}); choose another data.root.")
    elif any((root / split).exists() for split in ("training", "validation")):
        raise ValueError(f"{root} holds a dataset that was not recorded here; choose another data.root.")
    root.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, asked)


def _play(env: gym.GymEnv, expert: Expert, layout: gym.Layout, config: RecordingConfig, seed: int) -> _Episode | None:
    """The expert's episode of a seed; None: it failed."""
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    low, high = (np.array([getattr(d, end) for d in env.robot.action]) for end in ("low", "high"))
    for _ in range(rng.integers(config.wander, endpoint=True) if config.wander else 0):
        env.step(rng.uniform(low, high))
    seen, actions, after = [], [], 0
    instruction = env.info.get("instruction", layout.instruction)
    for _ in range(config.max_steps):
        action = np.clip(np.asarray(expert(env.raw), np.float64), low, high)
        seen.append(env.observe())
        actions.append(action.astype(np.float32))
        after = after + 1 if env.info["success"] else 0
        if after > config.hold:
            break
        env.step(action + config.noise * (high - low) * rng.normal(size=len(low)))
    if not env.info["success"]:
        return None
    frames = {camera: np.stack([x.images[camera] for x in seen]) for camera in layout.cameras}
    state = np.stack([np.zeros(0, np.float32) if x.proprio is None else x.proprio for x in seen])
    return _Episode(frames, state, np.stack(actions), instruction)


class _Frames:
    """Episodes as what `packing.pack` reads: `packing.FrameSource`."""

    action_units: tuple[float, ...] = ()

    def __init__(self, name: str, robot: RobotSpec, episodes: Sequence[_Episode]):
        if not episodes:
            raise ValueError(
                f"{name}: no episode of the expert succeeded; raise recording.max_steps or lower its noise."
            )
        self.name, self.robot, self._episodes = name, robot, episodes
        self.arrays = ("rel_actions", "robot_obs") if robot.state else ("rel_actions",)
        self.image_sizes = {camera: frames.shape[1:3] for camera, frames in episodes[0].frames.items()}
        ends = np.cumsum([len(episode.actions) for episode in episodes])
        self._starts = np.concatenate([[0], ends[:-1]])
        self.frame_ids = np.arange(ends[-1])
        self.episodes = tuple(
            base.Episode(int(start), int(end) - 1, episode.instruction, name.partition(",")[0], ())
            for episode, start, end in zip(episodes, self._starts, ends, strict=True)
        )
        self.statistics = statistics.compute(
            np.concatenate([episode.actions for episode in episodes]),
            np.concatenate([episode.state for episode in episodes]),
            len(episodes),
            statistics.mask_of(robot),
        )

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        number = int(np.searchsorted(self._starts, frame_id, side="right")) - 1
        episode, step = self._episodes[number], frame_id - int(self._starts[number])
        arrays = {"rel_actions": episode.actions[step], "robot_obs": episode.state[step]}
        images = {camera: frames[step] for camera, frames in episode.frames.items()}
        return images, {name: arrays[name] for name in self.arrays}


def evaluate(
    policy: BatchedPolicy,
    layout: gym.Layout,
    robot: RobotSpec,
    config: TrialsConfig,
    output: pathlib.Path,
    checkpoint: str,
) -> str:
    """Episodes of the policy, which has a slot for each environment; what `output` has results of is not run again.
    Writes a report there and returns Markdown for the run's own.

    Args:
      checkpoint: what names the policy's parameters.
    """
    trials = [
        rollout.Trial(i, {"seed": _TRIAL_SEEDS + i}, (layout.id,), (layout.instruction or layout.id,))
        for i in range(config.count)
    ]
    protocol = schema.to_dict(config) | {"execution": config.execution.conditions(), "options": layout.options}
    conditions = {"checkpoint": checkpoint, "protocol": protocol}
    criterion = rollout.SuccessCriterion(config.max_steps, gym.completed_in_each)
    folder = filing.place(output / "rollouts", layout.id, conditions)
    kept = filmed.FailuresFirst(trials, config.films, every=1)
    envs = [gym.GymEnv(layout, robot) for _ in range(min(config.environments, config.count))]
    robots.require_same(policy.model.config, robot, f"{layout.id} is driven as")
    try:
        pool = vector.EnvPool(envs)
        settings = chains.Settings(checkpoint, config.execution, criterion, conditions)
        found = chains.evaluate(policy, pool, trials, folder, settings, films=kept.films)
    finally:
        for env in envs:
            env.close()
    recordings = kept.recordings()
    for recording in recordings:
        film_files.write_film(recording, folder / f"film_{recording.trial.index:04d}")
    rollout_report.write_report(
        folder, [found], title=f"{layout.id}, closed loop", films=sorted(folder.glob("film_*")), recordings=recordings
    )
    row = rollout_report.rows([found])[0]
    success = row.summary.in_a_row[0]
    low, high = success.interval
    relative = folder.relative_to(output).as_posix()
    logger.info("%s: %d of %d episodes succeed", layout.id, success.successes, success.attempts)
    outcome = f"{success.successes} of {success.attempts} episodes succeed"
    return (
        f"{HEADING}\n\n{layout.id}, execution {config.execution.label}, at most {config.max_steps} steps, seeds that "
        f"no recording has: **{outcome}**, {100 * success.value:.1f} % ({100 * low:.0f} to {100 * high:.0f}), after "
        f"{row.summary.steps_per_success:.1f} steps on average. Episodes to look through: "
        f"[rollouts.html]({relative}/rollouts.html).\n"
    )
