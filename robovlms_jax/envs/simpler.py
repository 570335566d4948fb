"""SimplerEnv (Li et al. 2024, arXiv:2405.05941) as an `Env`: WidowX and Google-robot tasks, visual-matching setup.

simpler_env is imported when an environment is built; it needs SAPIEN and a Vulkan driver. Its own action is in metres,
an axis-angle vector and a gripper command whose meaning differs between the two robots; this adapter takes the
project's action (Euler angles, gripper +1 open or -1 closed) and converts. `robot` describes it, for the two kinds of
policies that there are: those that act in metres and radians, and those that act in quantiles of their training data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal, Protocol

import numpy as np

from robovlms_jax import json_files
from robovlms_jax.actions import rotations
from robovlms_jax.control import robot as robots
from robovlms_jax.control.interface import ACTION_DIM, Observation
from robovlms_jax.envs import process

ARM_DIM = ACTION_DIM - 1
_GRID = [(x, y) for x in np.linspace(-0.35, -0.12, 5) for y in np.linspace(-0.02, 0.42, 5)]


@dataclasses.dataclass(frozen=True)
class SimplerTask:
    """One task of the benchmark."""

    instruction: str
    """What the environment asks; some fill in objects, so `info["instruction"]` is what counts."""
    max_steps: int
    layouts: int
    """Trials with different starts; further ones repeat them with another random seed (arm colour, lighting)."""
    starts: Literal["episode", "grid", "seed"]
    """How a layout is named to the simulator: by episode number, by the object's position, or by the random seed."""


_BRIDGE = functools.partial(SimplerTask, max_steps=60, layouts=24, starts="episode")
_DRAWER = functools.partial(SimplerTask, max_steps=113, layouts=9, starts="seed")
_CAN = SimplerTask("pick coke can", 80, 25, "grid")

TASKS: Mapping[str, SimplerTask] = {
    "widowx_spoon_on_towel": _BRIDGE("put the spoon on the towel"),
    "widowx_carrot_on_plate": _BRIDGE("put carrot on plate"),
    "widowx_stack_cube": _BRIDGE("stack the green block on the yellow block"),
    "widowx_put_eggplant_in_basket": _BRIDGE("put eggplant into yellow basket", max_steps=120),
    "google_robot_pick_coke_can": _CAN,
    "google_robot_pick_horizontal_coke_can": _CAN,
    "google_robot_pick_vertical_coke_can": _CAN,
    "google_robot_pick_standing_coke_can": _CAN,
    # two generations of the same scene; the reference scripts evaluate v0
    "google_robot_move_near": SimplerTask("move X near Y", 80, 60, "episode"),
    "google_robot_move_near_v0": SimplerTask("move X near Y", 80, 60, "episode"),
    **{
        f"google_robot_{verb}_{which}_drawer": _DRAWER(f"{verb} {which} drawer")
        for verb in ("open", "close")
        for which in ("top", "middle", "bottom")
    },
    "google_robot_place_apple_in_closed_top_drawer": SimplerTask("open top drawer", 200, 27, "seed"),
}


def find_task(name: str) -> SimplerTask:
    """The task of that name; ValueError lists the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown SimplerEnv task {name!r}; known tasks: {', '.join(TASKS)}.")
    return TASKS[name]


METRES: tuple[tuple[float, ...], tuple[float, ...]] = ((-1.0,) * ARM_DIM, (1.0,) * ARM_DIM)
"""`low` and `high` with which an action means metres and radians as it is."""


def robot(task: str, *, scaled: bool) -> robots.RobotSpec:
    """What a task is driven as. scaled: by quantiles of the training data, so that an action has no unit; else in
    metres and radians."""
    find_task(task)
    name, rate_hz = ("WidowX", 5.0) if task.startswith("widowx") else ("Google robot", 3.0)
    units = ("1", "1") if scaled else ("m", "rad")
    return robots.end_effector(f"SimplerEnv's {name}", *units, rate_hz=rate_hz, cameras=("static",))


def simpler_env(
    task: str,
    *,
    low: Sequence[float],
    high: Sequence[float],
    gripper: Literal["fixed", "upstream"] = "fixed",
    python: str = sys.executable,
    timeout_s: float = 120.0,
) -> process.ProcessEnv:
    """One SimplerEnv in a process of its own, ready for `vector.EnvPool`; arguments as for `SimplerEnv`.

    Args:
      python: interpreter for the simulator, if this one has no simpler_env.
      timeout_s: a step or reset that takes longer counts as hung.
    """
    kwargs = {"task": task, "low": list(map(float, low)), "high": list(map(float, high)), "gripper": gripper}
    return process.ProcessEnv("robovlms_jax.envs.simpler:SimplerEnv", kwargs, python=python, timeout_s=timeout_s)


class SimplerEnv:
    """One task of SimplerEnv.

    Args:
      task: a name of `TASKS`.
      low, high: float[6], the 1 % and 99 % quantiles of the training data's arm actions (m, rad), which -1 and +1 of
        an action stand for; see `read_quantiles`. `METRES` where actions are in m and rad already.
      gripper: fixed: commands take effect at once, a change of mind is never lost. upstream: as RoboVLMs' published
        numbers were made, see `UpstreamWidowXGripper` and `UpstreamGoogleGripper`.
    Raises:
      ImportError: simpler_env is not installed. FileNotFoundError: its scanned table is not there.

    `about` says which versions of its packages numbers depend on.
    """

    def __init__(
        self, task: str, *, low: Sequence[float], high: Sequence[float], gripper: Literal["fixed", "upstream"] = "fixed"
    ):
        self._spec = find_task(task)
        self._low, self._high = (np.asarray(bound, np.float64) for bound in (low, high))
        for name, bound in (("low", self._low), ("high", self._high)):
            if bound.shape != (ARM_DIM,) or not np.isfinite(bound).all():
                raise ValueError(f"{name}={bound.tolist()} must be {ARM_DIM} finite numbers.")
        self._robot = "widowx" if task.startswith("widowx") else "google_robot"
        self._gripper = _GRIPPERS[self._robot, gripper]()
        self._task, self.name = task, f"SimplerEnv ({task})"
        # passed again because the package's own default is a tuple by mistake
        self._env = _import_simpler().make(task, obs_mode="rgbd")
        _require_stage(self._env.unwrapped, self._robot)
        self.about = _versions()
        self._pixels: np.ndarray | None = None
        self._info: dict[str, Any] = {}

    def reset(
        self, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None, *, layout: int = 0
    ) -> None:
        """Start trial number `layout`; states of other simulators cannot be asked for."""
        if robot_obs is not None or scene_obs is not None:
            raise ValueError("SimplerEnv starts from numbered layouts: reset(layout=...), not from a given state.")
        number = layout % self._spec.layouts
        options: dict[str, Any] = {}
        if self._spec.starts == "episode":
            options = {"obj_init_options": {"episode_id": number}}
        elif self._spec.starts == "grid":
            options = {"obj_init_options": {"init_xy": np.array(_GRID[number])}}
        obs, _ = self._env.reset(seed=layout, options=options)
        self._gripper.reset()
        self._remember(obs, success=False, stats={})

    def step(self, action: np.ndarray) -> None:
        """1/5 s (WidowX) or 1/3 s (Google robot) of float[7]: -1 to 1 for `low` to `high`, gripper exactly -1 or 1."""
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"action {action.tolist()} must be {ACTION_DIM} finite numbers.")
        if action[6] not in (-1.0, 1.0):
            raise ValueError(f"action[6]={action[6]} must be exactly -1 (close) or 1 (open); binarise the gripper.")
        arm = unnormalize(action[:ARM_DIM], self._low, self._high)
        command = np.concatenate(
            [arm[:3], rotations.to_axis_angle(rotations.from_euler(arm[3:])), [self._gripper(bool(action[6] > 0))]]
        )
        obs, _, done, _, info = self._env.step(command)
        stats = info.get("episode_stats", {})
        world = self._env.unwrapped
        # the policy cannot say that it is done with the first stage, so the open drawer does
        if not world.is_final_subtask() and stats.get("is_drawer_open", False):
            world.advance_to_next_subtask()
        self._remember(obs, success=bool(done), stats=stats)

    def observe(self) -> Observation:
        """{"static": uint8[height, width, 3]}: 480 x 640 for WidowX, 512 x 640 for the Google robot."""
        if self._pixels is None:
            raise RuntimeError("observe() before reset().")
        return Observation({"static": self._pixels})

    @property
    def info(self) -> Mapping[str, Any]:
        """task; success, now; instruction, now (two-stage tasks change it); partial: scores of parts of the task."""
        return self._info

    def _remember(self, obs: Mapping[str, Any], *, success: bool, stats: Mapping[str, Any]) -> None:
        camera = {"widowx": "3rd_view_camera", "google_robot": "overhead_camera"}[self._robot]
        self._pixels = np.asarray(obs["image"][camera]["rgb"], np.uint8)
        self._info = {
            "task": self._task,
            "success": success,
            "instruction": self._env.unwrapped.get_language_instruction(),
            "partial": {name: float(value) for name, value in stats.items()},
        }


def completed_in_each(starts: Sequence[Mapping[str, Any]], nows: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """The benchmark's own verdict, in the form rollouts ask for it."""
    return [{now["task"]} if now["success"] else set() for now in nows]


# ---------------------------------------------------------------------------------------------------------------------
# Actions


def unnormalize(arm: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """float[..., 6] in -1 .. 1 -> the units of `low` and `high`. The gripper is a decision and stays out of this."""
    return (arm + 1) / 2 * (high - low) + low


def read_quantiles(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """q01 and q99 of the arm's six dimensions, from statistics as OXE tools store them: {"action": {"q01": [...]}}.

    Raises OSError, ValueError: no such file, or other content; names it.
    """
    action = json_files.read_object(path, "statistics").get("action")
    found = []
    for key in ("q01", "q99"):
        try:
            values = np.asarray(action[key], np.float64)[:ARM_DIM]
        except (KeyError, TypeError, ValueError):
            values = np.zeros(0)
        if values.shape != (ARM_DIM,) or not np.isfinite(values).all():
            raise ValueError(f"{path} lacks action.{key}, a list of at least {ARM_DIM} numbers.")
        found.append(values)
    low, high = found
    return low, high


# ---------------------------------------------------------------------------------------------------------------------
# Grippers: "should it be open?" once per step -> the simulator's command


class Gripper(Protocol):
    """A robot's gripper rule with its memory."""

    def reset(self) -> None:
        """Start an episode."""

    def __call__(self, is_open: bool) -> float:
        """The command for this step."""


class WidowXGripper:
    """Absolute: +1 open, -1 closed."""

    def reset(self) -> None:
        pass

    def __call__(self, is_open: bool) -> float:
        return 1.0 if is_open else -1.0


class UpstreamWidowXGripper:
    """Opens only at the second step in a row that asks for it; so the first step of an episode is always closed."""

    def reset(self) -> None:
        self._open_steps = 0

    def __call__(self, is_open: bool) -> float:
        self._open_steps = self._open_steps + 1 if is_open else 0
        return 1.0 if self._open_steps >= 2 else -1.0


class GoogleGripper:
    """Relative: +1 closes, -1 opens, 0 stays. A change is repeated for 15 steps, the time the gripper needs.

    A change asked for meanwhile follows as soon as the running one is complete.
    """

    _STEPS = 15

    def reset(self) -> None:
        self._commanded_open, self._left = True, 0  # episodes begin with an open gripper

    def __call__(self, is_open: bool) -> float:
        if self._left == 0 and is_open != self._commanded_open:
            self._commanded_open, self._left = is_open, self._STEPS
        if self._left == 0:
            return 0.0
        self._left -= 1
        return -1.0 if self._commanded_open else 1.0


class UpstreamGoogleGripper:
    """As upstream: repeats a change for 2 steps only, ignores changes meanwhile and what the first step asks for."""

    _STEPS = 2

    def reset(self) -> None:
        self._previous: bool | None = None
        self._command, self._left = 0.0, 0

    def __call__(self, is_open: bool) -> float:
        changed = self._previous is not None and is_open != self._previous
        self._previous = is_open
        if changed and self._left == 0:
            self._command, self._left = (-1.0 if is_open else 1.0), self._STEPS
        if self._left == 0:
            return 0.0
        self._left -= 1
        return self._command


_GRIPPERS: Mapping[tuple[str, str], type] = {
    ("widowx", "fixed"): WidowXGripper,
    ("widowx", "upstream"): UpstreamWidowXGripper,
    ("google_robot", "fixed"): GoogleGripper,
    ("google_robot", "upstream"): UpstreamGoogleGripper,
}


_STAGES = {"widowx": "bridge_table_1_v1", "google_robot": "google_pick_coke_can_1_v4"}
"""Of a task that names none."""


def _require_stage(world: Any, robot: str) -> None:
    """SAPIEN only logs that a scan cannot be loaded, and goes on without a table, through whose place objects fall."""
    root, name = getattr(world, "scene_root", None), getattr(world, "scene_name", None)
    if root is None or "dummy" in (name or ""):
        return
    path = pathlib.Path(root) / "stages" / f"{name or _STAGES[robot]}.glb"
    if not path.is_file():
        raise FileNotFoundError(
            f"SimplerEnv's scanned scene {path} is missing, and without it there is no table. Fetch the scans "
            "that ManiSkill2_real2sim keeps in its data folder (docs/how_to/simpler.md)."
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("sapien", "mani_skill2_real2sim", "simpler_env", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _import_simpler() -> Any:
    try:
        import simpler_env as package
    except ImportError as error:
        raise ImportError(
            f"SimplerEnv is not usable from {sys.executable} ({error}). Install it from its repository: "
            "`git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv`, then `pip install -e "
            "SimplerEnv/ManiSkill2_real2sim -e SimplerEnv`. It needs SAPIEN and Vulkan (docs/how_to/simpler.md)."
        ) from error
    return package
