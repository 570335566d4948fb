"""The play table as `Env` (one table) and as `VectorEnv` (many tables in one jitted call), both NumPy outside."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax import cores
from robovlms_jax.control import interface
from robovlms_jax.control import robot as robots
from robovlms_jax.envs import looks
from robovlms_jax.envs.calvin import initial_states, tasks
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable import appearance
from robovlms_jax.playtable.mechanics import bodies, physics
from robovlms_jax.playtable.pictures import cameras, render, tiles
from robovlms_jax.playtable.scene import Scene, neutral_scene_obs, stack_scenes
from robovlms_jax.types import Array

ROBOT_OBS_DIM, SCENE_OBS_DIM = 15, 24


class _Rendering(NamedTuple):
    """How pictures are made on one kind of processor.

    tiled: see `render.render`. pixels: about as many are traced at a time, a picture at least; None: one picture at a
    time, and only those that are wanted. batch: room for pictures in one call; None: for all of them, rounded up to a
    power of two. threads: calls at a time.
    """

    tiled: bool
    pixels: int | None
    batch: int | None
    threads: int


def _rendering(platform: str) -> _Rendering:
    if platform == "cpu":
        # What one picture needs stays in the cache. A program with room for sixteen makes any smaller number as well.
        return _Rendering(tiled=True, pixels=None, batch=16, threads=cores.usable())
    return _Rendering(tiled=False, pixels=2**24, batch=None, threads=1)  # a few gigabytes


# ---------------------------------------------------------------------------------------------------------------------
# Many tables, functional: scenes have a leading axis, one per table, unless `which` int32[B] says which a table has


def pick(stacked: Any, which: Array) -> Any:
    """Rows of every leaf."""
    return jax.tree.map(lambda leaf: leaf[which], stacked)


@functools.partial(cpu.jit, kind="tiny_run_once")  # compiled in 1.4 instead of 6 s
def reset_batch(scenes: Scene, robot_obs: Array, scene_obs: Array) -> bodies.State:
    """`physics.reset` of B tables: robot_obs float[B, 15], scene_obs float[B, 24]."""
    return jax.vmap(physics.reset)(scenes, robot_obs, scene_obs)


def step_batch(scenes: Scene, states: bodies.State, actions: Array) -> bodies.State:
    """`physics.step` of B tables: actions float[B, 7]."""
    return _step(scenes, states, actions)


STEP_KIND: cpu.Kind = "tiny_kernels"
"""What programs are like that step tables. XLA's newer generator takes seven times as long for eight tables."""

_step = cpu.jit(physics.step_tables, STEP_KIND)


@jax.jit
def info_batch(scenes: Scene, states: bodies.State) -> tasks.SceneInfo:
    """`physics.info` of B tables, with `robot_obs` [B, 15] and `scene_obs` [B, 24] added."""

    def one(scene, state):
        obs = {"robot_obs": physics.robot_obs(state), "scene_obs": physics.scene_obs(scene, state)}
        return {**physics.info(scene, state), **obs}

    return jax.vmap(one)(scenes, states)


@functools.partial(jax.jit, static_argnums=(1, 2))
def backdrops(scenes: Scene, size: int, camera: str = "static") -> tiles.Backdrop:
    """`render.backdrop` of every scene, to be kept."""
    return jax.vmap(lambda scene: render.backdrop(scene, size, camera))(scenes)


@functools.partial(jax.jit, static_argnames=("camera", "size", "platform"))
def render_batch(
    scenes: Scene,
    which: Array,
    states: bodies.State,
    camera: str,
    size: int,
    backdrops: tiles.Backdrop,
    platform: str,
    count: Array | int | None = None,
) -> Array:
    """uint8[B, size, size, 3]: the pictures of camera "static", "people" or "wrist" of B tables.

    Args:
      platform: where they are made, "cpu", "gpu" or "tpu"; by another's way they are the same, and slower.
      count: how many are wanted, the first ones; None: all. On CPUs the others are left black and cost nothing.
    """
    way = _rendering(platform)

    def one(args):
        i, state = args
        return render.render(pick(scenes, i), state, camera, size, pick(backdrops, i), tiled=way.tiled)

    if way.pixels is not None:
        return jax.lax.map(one, (which, states), batch_size=max(way.pixels // size**2, 1))

    def add(i, found):
        return jax.lax.dynamic_update_index_in_dim(found, one(pick((which, states), i)), i, 0)

    return jax.lax.fori_loop(
        0, len(which) if count is None else count, add, jnp.zeros((len(which), size, size, 3), jnp.uint8)
    )


def pictures(
    scenes: Scene, which: np.ndarray, states: bodies.State, sizes: Mapping[str, int], backdrops: tiles.Backdrop
) -> dict[str, np.ndarray]:
    """camera -> uint8[n, size, size, 3] of n tables, on all cores, by programs that other n use, too.

    Args:
      which: int[n], NumPy.
      sizes: camera -> px.
    """
    count, platform = len(which), cpu.default_platform()
    way = _rendering(platform)
    batch = way.batch or 2 ** (count - 1).bit_length()
    rounds = -(-count // (batch * way.threads))
    calls = min(rounds * way.threads, count)  # every core has as many as the others
    if way.batch:  # views, whose rows are picked at once
        scenes, states, backdrops = jax.device_get((scenes, states, backdrops))

    def look(rows: np.ndarray) -> dict[str, np.ndarray]:
        wanted, rows = len(rows), np.pad(rows, (0, batch - len(rows)), mode="edge")
        kinds, own = np.unique(which[rows], return_inverse=True)
        kinds = np.resize(kinds, 4 ** max(int(np.ceil(np.log2(len(kinds)) / 2)), 1))
        seen = (pick(scenes, kinds), own.astype(np.int32), pick(states, rows))
        known = pick(backdrops, kinds)
        looks = {camera: render_batch(*seen, camera, size, known, platform, wanted) for camera, size in sizes.items()}
        return {camera: np.asarray(made)[:wanted] for camera, made in looks.items()}

    shares = np.array_split(np.arange(count), calls)
    if calls == 1:  # a thread takes longer to start than a picture to make
        return look(shares[0])
    with concurrent.futures.ThreadPoolExecutor(way.threads) as pool:
        parts = list(pool.map(look, shares))
    return {camera: np.concatenate([part[camera] for part in parts]) for camera in sizes}


@jax.jit
def choose(chosen: Array, new: Any, old: Any) -> Any:
    """Rows of `new` where `chosen` bool[B], of `old` elsewhere, in every leaf."""
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


# ---------------------------------------------------------------------------------------------------------------------
# What evaluation sees, and what people see of it

VIEW_PX = 240
"""Side of the pictures that people are shown of a rollout."""


class Onlooker:
    """Draws what people see of a table that a policy acts on: the whole scene, both lamps in it (`cameras.camera`).

    Nothing is compiled before the first picture. scenes: leading axis, one of each kind.
    """

    def __init__(self, scenes: Scene):
        self._scenes = jax.device_get(scenes)

    @functools.cached_property
    def _backdrops(self) -> tiles.Backdrop:
        return jax.device_get(backdrops(self._scenes, VIEW_PX, "people"))

    def draw(self, kind: int, state: bodies.State) -> np.ndarray:
        """uint8[VIEW_PX, VIEW_PX, 3] of one table. kind: which of the scenes it is; state: with a leading axis of 1."""
        which = np.array([kind], np.int32)
        return pictures(self._scenes, which, state, {"people": VIEW_PX}, self._backdrops)["people"][0]


class PlayTables:
    """Tables stepped together, a `vector.VectorEnv`.

    Args:
      scenes: "A" to "D", one name for all tables or one per table.
      size: number of tables; may be left out when `scenes` names one per table.
      image_sizes: px of the square pictures of each camera.
      known_looks: ways the table may look; a trial names one of them (`reset`), and has the first if it names none.
        Needs one scene for all tables.
    """

    def __init__(
        self,
        scenes: str | Sequence[str] = "D",
        size: int | None = None,
        *,
        image_sizes: Mapping[str, int] | None = None,
        known_looks: Sequence[looks.Look] = (),
    ):
        names = [scenes] * (1 if size is None else size) if isinstance(scenes, str) else list(scenes)
        if not names or (size is not None and len(names) != size):
            raise ValueError(f"size={size} does not fit {len(names)} scenes; give one name, or one per table.")
        kinds = sorted(set(names))
        self.name = f"playtable-{''.join(kinds)}"
        self.about: dict[str, str] = {}  # nothing beyond this repository
        self.robot = robots.CALVIN
        self.size = len(names)
        if known_looks and len(kinds) > 1:
            raise ValueError(f"known_looks are of one scene, and scenes names {len(kinds)}: {', '.join(kinds)}.")
        self._looks = tuple(known_looks)
        self._which = np.array([kinds.index(name) for name in names], np.int32)
        self._neutral = [neutral_scene_obs(name) for name in names]
        self._kinds = _stacked([appearance.looking(kinds[0], look) for look in known_looks] or None, kinds)
        self._scenes = pick(self._kinds, self._which)
        self._image_sizes = _checked_sizes(image_sizes)
        self._states = reset_batch(
            self._scenes, np.tile(initial_states.INITIAL_ROBOT_OBS, (self.size, 1)), np.stack(self._neutral)
        )
        self._infos: Mapping[str, np.ndarray] | None = None

    @functools.cached_property
    def _backdrops(self) -> tiles.Backdrop:
        return backdrops(self._kinds, self._image_sizes["static"])

    @functools.cached_property
    def _onlooker(self) -> Onlooker:
        return Onlooker(self._kinds)

    @property
    def states(self) -> bodies.State:
        """All tables' states, leading axis `size`."""
        return self._states

    def reset(self, slots: Sequence[int], starts: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        """Put tables into given states: keyword arguments of `PlayTable.reset`, and `look`, one of `known_looks`."""
        robot, scene = np.zeros((self.size, ROBOT_OBS_DIM)), np.zeros((self.size, SCENE_OBS_DIM))
        for slot, start in zip(slots, starts, strict=True):
            state = {name: value for name, value in start.items() if name != "look"}
            robot[slot], scene[slot] = _checked_start(**state, neutral_scene_obs=self._neutral[slot])
            if self._looks or "look" in start:
                self._which[slot] = self._number_of(start.get("look"))
        if self._looks:
            self._scenes = pick(self._kinds, self._which)
        self._update(slots, reset_batch(self._scenes, robot, scene))
        return self.infos(slots)

    def step(self, slots: Sequence[int], actions: np.ndarray) -> list[dict[str, np.ndarray]]:
        """One action float[7] in each of the slots; see `PlayTable.step`."""
        every = np.zeros((self.size, interface.ACTION_DIM), np.float32)
        for slot, action in zip(slots, actions, strict=True):
            every[slot] = _checked_action(action)
        self._update(slots, step_batch(self._scenes, self._states, every))
        return self.infos(slots)

    def observe(self, slots: Sequence[int]) -> list[interface.Observation]:
        """Render these slots."""
        if not len(slots):
            return []
        rows = np.asarray(slots)
        states = pick(jax.device_get(self._states), rows)  # NumPy's rows; JAX takes 5 ms to pick those of every leaf
        images = pictures(self._kinds, self._which[rows], states, self._image_sizes, self._backdrops)
        return [
            interface.Observation({camera: pictures[i] for camera, pictures in images.items()}, info["robot_obs"])
            for i, info in enumerate(self.infos(slots))
        ]

    def views(self, slots: Sequence[int]) -> list[Callable[[], np.ndarray]]:
        """For each of these slots, what draws what people see of it as it is now; costs nothing until it is called."""
        states, draw = jax.device_get(self._states), self._onlooker.draw
        rows = [pick(states, np.array([slot])) for slot in slots]  # copies: the states go on
        return [functools.partial(draw, int(self._which[slot]), row) for slot, row in zip(slots, rows, strict=True)]

    def infos(self, slots: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """The scenes as the task conditions read them, plus `robot_obs` float32[15] and `scene_obs` float32[24]."""
        if self._infos is None:
            self._infos = jax.device_get(info_batch(self._scenes, self._states))
        return [{key: values[slot] for key, values in self._infos.items()} for slot in slots]

    def restart(self, slot: int) -> None:
        """Back to the neutral state; a table cannot break."""
        self.reset([slot], [{}])

    def _number_of(self, look: looks.Look | None) -> int:
        """Place among the known looks; of none, the first."""
        if look is not None and look not in self._looks:
            raise ValueError(f"the look {look} is none of the {len(self._looks)} that these tables were made with.")
        return 0 if look is None else self._looks.index(look)

    def _update(self, slots: Sequence[int], states: bodies.State) -> None:
        chosen = np.zeros(self.size, bool)
        chosen[list(slots)] = True
        self._states = choose(chosen, states, self._states)
        self._infos = None


class PlayTable:
    """One table, an `interface.Env`. Pictures are rendered in `observe` only.

    Args:
      scene: "A" to "D".
      image_sizes: px of the square pictures of each camera; CALVIN's 200 (static) and 84 (wrist) if left out.
    """

    def __init__(self, scene: str = "D", *, image_sizes: Mapping[str, int] | None = None):
        self._tables = PlayTables(scene, 1, image_sizes=image_sizes)
        self.name = self._tables.name

    def reset(self, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None) -> None:
        """Go to the given state (float[15], float[24], blocks in the scene's own order) or to the neutral one."""
        self._tables.reset([0], [{"robot_obs": robot_obs, "scene_obs": scene_obs}])

    def step(self, action: np.ndarray) -> None:
        """1/30 s of a relative action float[7]: 1.0 = 0.02 m or 0.05 rad, world frame; gripper exactly -1 or 1."""
        self._tables.step([0], np.asarray(action)[None])

    def observe(self) -> interface.Observation:
        """Static and wrist pictures uint8[size, size, 3]; proprio is robot_obs float32[15]."""
        return self._tables.observe([0])[0]

    @property
    def info(self) -> Mapping[str, Any]:
        """`tasks.SceneInfo`, plus `robot_obs` float32[15] and `scene_obs` float32[24]."""
        return self._tables.infos([0])[0]


def _stacked(dressed: Sequence[Scene] | None, names: Sequence[str]) -> Scene:
    """Scenes with a leading axis: those with looks, or the plain ones of these names."""
    return stack_scenes(names) if dressed is None else jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *dressed)


def _checked_sizes(sizes: Mapping[str, int] | None) -> Mapping[str, int]:
    sizes = {**cameras.SIZES, **(sizes or {})}
    unknown = sorted(set(sizes) - set(interface.CAMERAS))
    if unknown or any(not isinstance(size, int) or size < 1 for size in sizes.values()):
        raise ValueError(f"image_sizes={sizes} must give a positive whole number of px for {interface.CAMERAS}.")
    return sizes


def _checked_start(
    robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None, *, neutral_scene_obs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    given = []
    for name, value, neutral in (
        ("robot_obs", robot_obs, initial_states.INITIAL_ROBOT_OBS),
        ("scene_obs", scene_obs, neutral_scene_obs),
    ):
        value = np.asarray(neutral if value is None else value, np.float64)
        if value.shape != neutral.shape or not np.isfinite(value).all():
            raise ValueError(f"{name} has shape {value.shape}, expected {neutral.shape[0]} finite numbers.")
        given.append(value)
    return given[0], given[1]


def _checked_action(action: np.ndarray) -> np.ndarray:
    action = np.asarray(action, np.float64)
    if action.shape != (interface.ACTION_DIM,) or not np.isfinite(action).all():
        raise ValueError(f"action {action.tolist()} must be {interface.ACTION_DIM} finite numbers.")
    if action[6] not in (-1.0, 1.0):
        raise ValueError(f"action[6]={action[6]} must be exactly -1 (close) or 1 (open); binarise the gripper.")
    return action
