"""PlayTable as a benchmark of vla-eval: the harness plays it against any of its model servers, ours at /vla-eval.

    vla-eval run --no-docker --config playtable.yaml

    server: {url: "ws://127.0.0.1:8000/vla-eval"}
    benchmarks:
      - benchmark: "experiments.vla_eval_playtable:PlayTableBenchmark"
        episodes_per_task: 5
        params: {tasks: [open_drawer, turn_on_led], image_size: [96, 64]}

Only what the harness asks for its formats imports vla_eval. Its numbers are PlayTable's, not CALVIN's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from robovlms_jax.control.robot import CALVIN
from robovlms_jax.envs.calvin import tasks as calvin_tasks
from robovlms_jax.evaluation import chains
from robovlms_jax.evaluation.rollout import Trial
from robovlms_jax.playtable.env import PlayTable


class PlayTableBenchmark:
    """Single tasks, each episode from another initial state; vla-eval 0.8's `Benchmark`, by its methods alone.

    Args:
      tasks: names of CALVIN's; none: all that are possible without a block in the hand.
      scene: "A" to "D".
      image_size: pixels of static and wrist camera.
      max_steps: control steps of an episode.
      episodes: initial states per task; episode n has state n modulo this.
    """

    render_backends: ClassVar[frozenset[str]] = frozenset({"cpu", "gpu"})

    def __init__(
        self,
        tasks: Sequence[str] = (),
        scene: str = "D",
        image_size: Sequence[int] = (200, 84),
        max_steps: int = 360,
        episodes: int = 50,
    ):
        names = tuple(tasks) or tuple(filter(_possible, calvin_tasks.TASKS))
        unknown = sorted(set(names) - set(calvin_tasks.TASKS))
        if unknown:
            raise ValueError(f"tasks has unknown {unknown}; known: {', '.join(calvin_tasks.TASKS)}.")
        chosen = chains.chain_trials(chains.single_tasks(names, len(names) * episodes), scene=scene)
        self._trials: dict[str, list[Trial]] = {}
        for trial in chosen:
            self._trials.setdefault(trial.tasks[0], []).append(trial)
        self._env = PlayTable(scene, image_sizes=dict(zip(("static", "wrist"), image_size, strict=True)))
        self._max_steps = max_steps
        self._asked: Trial | None = None

    @classmethod
    def configure_render(cls, mode: str) -> dict[str, str]:
        return {}  # JAX's own platform draws

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": name} for name in self._trials]

    def get_metadata(self) -> dict[str, Any]:
        return {"max_steps": self._max_steps}

    def get_metric_keys(self) -> dict[str, str]:
        return {"success": "mean"}

    async def start_episode(self, task: Mapping[str, Any], recorder: Any = None) -> None:
        trials = self._trials[task["name"]]
        self._asked = trials[int(task.get("episode_idx", 0)) % len(trials)]
        self._env.reset(**self._asked.start)
        self._start, self._began, self._steps = self._env.info, time.monotonic(), 0
        self._success = False

    async def get_observation(self) -> dict[str, Any]:
        """States are CALVIN's robot_obs float32[15]."""
        seen = self._env.observe()
        return {
            "images": {"rgb_static": seen.images["static"], "rgb_gripper": seen.images["wrist"]},
            "states": np.asarray(seen.proprio, np.float32),
            "task_description": self._asked.instructions[0],
        }

    async def apply_action(self, action: Mapping[str, Any]) -> None:
        """float[7], or the first of several: metres and radians relative to the last target, gripper above 0 opens."""
        values = np.asarray(action["actions"], np.float32).reshape(-1)[: len(CALVIN.action)]
        if values.shape != (len(CALVIN.action),) or not np.isfinite(values).all():
            raise ValueError(f"actions is {values.tolist()}; expected {len(CALVIN.action)} finite numbers.")
        scale = np.array([dimension.measure[0] for dimension in CALVIN.action], np.float32)
        own = np.clip(values / scale, -1, 1)
        own[-1] = 1.0 if values[-1] > 0 else -1.0
        self._env.step(own)
        self._steps += 1
        done = calvin_tasks.completed_in_each([self._start], [self._env.info])[0]
        self._success = self._asked.tasks[0] in done

    async def is_done(self) -> bool:
        return self._success or self._steps >= self._max_steps

    async def get_time(self) -> float:
        return time.monotonic() - self._began

    async def get_result(self) -> dict[str, Any]:
        return {"success": self._success}

    def get_action_spec(self) -> dict[str, Any]:
        from vla_eval import specs

        return {
            "position": specs.POSITION_DELTA,
            "rotation": specs.ROTATION_EULER,
            "gripper": specs.GRIPPER_CLOSE_NEG,
        }

    def get_observation_spec(self) -> dict[str, Any]:
        from vla_eval import specs

        return {"rgb_static": specs.IMAGE_RGB, "rgb_gripper": specs.IMAGE_RGB, "language": specs.LANGUAGE}

    def get_hold_action(self, last_action: Any) -> dict[str, Any]:
        """No motion; the gripper stays as it was asked for."""
        gripper = 1.0 if last_action is None else float(np.asarray(last_action["actions"]).reshape(-1)[6])
        return {"actions": np.array([0, 0, 0, 0, 0, 0, gripper], np.float32)}

    def render(self) -> np.ndarray:
        return self._env.observe().images["static"]

    def cleanup(self) -> None:
        """Nothing is held outside this process."""


def _possible(task: str) -> bool:
    try:
        return bool(chains.single_tasks([task], 1))
    except ValueError:
        return False
