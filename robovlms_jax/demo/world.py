"""The table of the demonstration: PlayTable alone, one step at a time, with what a page wants to know beside it.

`PlayTable` picks its table out of many; here a picture is a program of its own, which takes less than half as long.
States are never changed in place, so that another thread draws one (`Painter`) while the next is being made.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from robovlms_jax.control.interface import Observation
from robovlms_jax.envs.calvin import task_chains, tasks
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable import env
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.pictures import cameras, render
from robovlms_jax.playtable.scene import JOINTS, SLIDER, initial_obs, make_scene
from robovlms_jax.types import Array

TABLES = ("D", "A", "B", "C")
"""In the order they are shown; training leaves D out."""
_ROOM_M = {"slider": 0.15, "drawer": 0.12}
"""How far a mechanism must still be able to move for its task to be possible: `envs.calvin.tasks` asks for as much."""


class Start(NamedTuple):
    """How a scene begins. table: "A" to "D". condition: see `task_chains.Condition`."""

    table: str
    condition: task_chains.Condition


EXAMPLE = "open_drawer"
"""What people are told to try first: the first scene is one in which it can be done."""


def starts(names: Sequence[str], seed: int) -> Iterator[Start]:
    """Scenes without end, tables taking turns, in each of which at least one of the tasks `names` is possible; in the
    first one EXAMPLE, where it is one of them."""
    rng = np.random.default_rng(seed)
    conditions = [c for c in task_chains.initial_conditions() if any(task_chains.successors(c, x) for x in names)]
    first = [c for c in conditions if EXAMPLE in names and task_chains.successors(c, EXAMPLE)] or conditions
    yield Start(TABLES[0], first[rng.integers(len(first))])
    for table in TABLES[1:]:
        yield Start(table, conditions[rng.integers(len(conditions))])
    while True:
        for table in TABLES:
            yield Start(table, conditions[rng.integers(len(conditions))])


class Frozen(NamedTuple):
    """A moment, to be drawn by whoever wants to. table: which; state: see `bodies.State`."""

    table: str
    state: bodies.State


class _Programs(NamedTuple):
    """Compiled for a kind of device. On a CPU these options compile in two thirds of the time, and draw faster."""

    picture: Any
    backdrop: Any


@functools.cache
def _programs(platform: str) -> _Programs:
    options = cpu.options("tiny_kernels", platform)

    def picture(scene: Any, state: bodies.State, camera: str, size: int, backdrop: Any) -> Array:
        return render.render(scene, state, camera, size, backdrop, tiled=platform == "cpu")

    fixed = ("camera", "size")
    return _Programs(
        jax.jit(picture, static_argnames=fixed, compiler_options=options),
        jax.jit(render.backdrop, static_argnames=fixed, compiler_options=options),
    )


class Painter:
    """Pictures of moments. Several threads may draw.

    Args:
      sizes: camera -> px.
      fixed: which fixed camera the one called "static" is, see `cameras.camera`.
    """

    def __init__(self, sizes: Mapping[str, int], fixed: Literal["static", "people"] = "static"):
        self.sizes, self._fixed = dict(sizes), fixed

    def draw(self, moment: Frozen, camera: str) -> np.ndarray:
        """uint8[size, size, 3]."""
        backdrop = _kept_backdrop(moment.table, self.sizes["static"], self._fixed)
        eye, draw = self._fixed if camera == "static" else camera, _programs(cpu.default_platform()).picture
        return np.asarray(
            draw(_scene(moment.table), moment.state, camera=eye, size=self.sizes[camera], backdrop=backdrop)
        )


@functools.cache
def _scene(table: str) -> Any:
    return make_scene(table)


@functools.cache
def _kept_backdrop(table: str, size: int, camera: str) -> Any:
    return _programs(cpu.default_platform()).backdrop(_scene(table), size=size, camera=camera)


class World:
    """One table and the robot at it.

    Args:
      image_sizes: camera -> px of the pictures that the policy sees.
    """

    rate_hz = 30.0

    def __init__(self, image_sizes: Mapping[str, int]):
        self._painter = Painter(image_sizes)
        self.reset(Start(TABLES[0], task_chains.initial_conditions()[0]))

    def reset(self, start: Start) -> None:
        self.put(start.table, *initial_obs(start.condition, start.table))

    def put(self, table: str, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
        """The named table in a given state: float[15] and float[24], see `PlayTable.reset`."""
        self.table, self._scenes = table, jax.tree.map(lambda x: x[None], _scene(table))
        self._take(env.reset_batch(self._scenes, robot_obs[None], scene_obs[None]))

    def step(self, action: np.ndarray) -> None:
        """1/30 s of a relative action float[7]; see `PlayTable.step`."""
        self._take(env.step_batch(self._scenes, self._states, np.asarray(action, np.float32)[None]))

    def observe(self) -> Observation:
        """As `PlayTable.observe`."""
        moment = self.frozen
        return Observation({name: self._painter.draw(moment, name) for name in self._painter.sizes}, self.robot_obs)

    @property
    def frozen(self) -> Frozen:
        return Frozen(self.table, self._state)

    @property
    def robot_obs(self) -> np.ndarray:
        """float32[15], see `physics.robot_obs`."""
        return self.info["robot_obs"]

    @property
    def target(self) -> np.ndarray:
        """float32[6]: where the hand was sent, m and Euler rad; the hand follows a few steps behind."""
        return np.concatenate([self._state.target_position, self._state.target_euler])

    def _take(self, states: bodies.State) -> None:
        self._states = states
        found = jax.device_get(env.info_batch(self._scenes, states))
        self.info = {key: values[0] for key, values in found.items()}
        self._state = jax.tree.map(lambda x: x[0], jax.device_get(states))

    def possible(self, names: Sequence[str]) -> list[str]:
        """Those of the tasks that can be done as the table stands now."""
        return [name for name in names if self._is_possible(name)]

    def _is_possible(self, name: str) -> bool:
        joints = dict(zip(JOINTS, self._state.mechanisms.tolist(), strict=True))
        reach = dict(zip(JOINTS, _scene(self.table).joint_range.tolist(), strict=True))
        left = {joint: reach[joint] - joints[joint] for joint in joints}
        moved = {
            "move_slider_left": left["slider"] > _ROOM_M["slider"],
            "move_slider_right": joints["slider"] > _ROOM_M["slider"],
            "open_drawer": left["drawer"] > _ROOM_M["drawer"],
            "close_drawer": joints["drawer"] > _ROOM_M["drawer"],
        }
        return moved[name] if name in moved else len(task_chains.successors(self._condition(), name)) == 1

    def _condition(self) -> task_chains.Condition:
        """The table in the words of `task_chains`; a block that stands on another is "stacked_top"."""
        info, reach = self.info, _scene(self.table).joint_range
        condition: dict[str, Any] = {
            "led": int(info["led"]),
            "lightbulb": int(info["lightbulb"]),
            "slider": "left" if info["slider"] > reach[SLIDER] / 2 else "right",
            "drawer": "open" if info["drawer"] > _ROOM_M["drawer"] else "closed",
        }
        middle = float(np.mean(_scene(self.table).anchors.shelf))
        bodies_touched = dict(zip(tasks.BODIES, np.asarray(info["contacts"]).T, strict=True))
        for row, color in enumerate(tasks.BLOCKS, start=1):
            on = {body: bool(touched[row]) for body, touched in bodies_touched.items()}
            others = any(on[f"{other}_block"] for other in tasks.BLOCKS)
            x, _, z = info["block_position"][row - 1]
            lowest = not any(on[body] for body in ("base", "drawer", "shelf"))
            if on["robot"] and lowest and not others:
                place = "grasped"
            elif others:
                place = "stacked_top" if z > np.sort(info["block_position"][:, 2])[0] + 0.02 else "stacked_bottom"
            elif on["shelf"]:
                place = "slider_left" if x < middle else "slider_right"
            else:
                place = "drawer" if on["drawer"] else "table"
            condition[f"{color}_block"] = place
        condition["grasped"] = int("grasped" in condition.values())
        return condition


def why_not(name: str) -> str:
    """Why a task that is not possible now is not."""
    if name.startswith(("turn_on", "turn_off", "open", "close", "move_slider")):  # one thing in one of two states
        return "that is so already"
    return "that cannot be done as the blocks lie now"


def project(points: np.ndarray) -> np.ndarray:
    """World points float[N, 3], m -> where people's picture has them, float[N, 2]: right and down, from 0 to 1."""
    eye, axes, focal = _people_camera()
    seen = (points - eye) @ axes
    return seen[:, :2] / seen[:, 2:] * focal + 0.5


@functools.cache
def _people_camera() -> tuple[np.ndarray, np.ndarray, float]:
    camera = cameras.camera(None, "people")
    return np.asarray(camera.eye), np.asarray(camera.rotation), float(cameras.focal(camera, 1))


def warm_up(image_sizes: Mapping[str, int], view_sizes: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
    """(what, a function that compiles it) of everything that is drawn or stepped; they may run in several threads."""
    start = Start(TABLES[0], task_chains.initial_conditions()[0])

    def simulator() -> None:
        World(image_sizes).step(np.array([0, 0, 0, 0, 0, 0, 1.0]))

    yield "the simulator's step", simulator
    scene = jax.tree.map(lambda x: x[None], make_scene(start.table))
    for painter, whose in ((Painter(image_sizes), "the policy's"), (Painter(view_sizes, "people"), "the page's")):
        for camera in painter.sizes:

            def draw(painter: Painter = painter, camera: str = camera) -> None:
                states = env.reset_batch(scene, *(obs[None] for obs in initial_obs(start.condition, start.table)))
                state = jax.tree.map(lambda x: x[0], jax.device_get(states))
                for table in TABLES:
                    painter.draw(Frozen(table, state), camera)

            yield f"{whose} picture of the {camera} camera", draw
