"""The table as data: boxes, joints, colours and block sizes of the four variants A, B, C and D.

World frame as in CALVIN: metres, x to the right seen from the front, y to the back, z up; the robot's base stands at
`kinematics.BASE`. The cabinet's front leans back by 30 degrees: the sliding door and the lever lie in that plane.
A `Scene` is a pytree of arrays with the same shapes for every variant, so that `vmap` runs over different scenes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.types import Array

BLOCKS = tasks.BLOCKS
"""Colours of the blocks in the order they have in every array of this package: red, blue, pink."""

JOINTS = ("slider", "drawer", "button", "switch")
"""Mechanisms, in the order of scene_obs[0:4]."""

SLIDER, DRAWER, BUTTON, SWITCH = range(4)

TABLE_TOP_M = 0.44
SHELF_TOP_M = 0.441
DRAWER_FLOOR_M = 0.342
PANEL_Y_M = 0.0225
"""Where the leaning front of the cabinet meets the table top."""
LEAN = np.array([0.0, 0.5, np.sqrt(0.75)])
"""Direction up along the leaning front."""
OUTWARD = np.array([0.0, -np.sqrt(0.75), 0.5])
"""Direction out of the leaning front, towards the robot."""
_LEANING = np.stack([[1.0, 0.0, 0.0], -OUTWARD, LEAN], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boxes:
    """N oriented boxes.

    center: float[N, 3], m. rotation: float[N, 3, 3], columns are the box axes in the world. half: float[N, 3], half
    extents along the box axes, m.
    """

    center: Array
    rotation: Array
    half: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """One variant of the table.

    table: the fixed and moving boxes with all joints at zero; `BOX_BODY` and `BOX_JOINT` say what each one is.
    joint_axis: float32[4, 3], world direction in which each of `JOINTS` moves as it grows.
    joint_range: float32[4], m; joints go from 0 to here.
    block_half: float32[3, 3], half extents of the blocks, m.
    block_slot: int32[3], which of the three places of scene_obs[6:24] belongs to the red, blue and pink block.
    box_color: float32[N, 3], albedo of `table` in [0, 1].
    grain: float32[64, 64], brightness of the wood, 1 on average; repeats.
    anchors: places that experts need.
    appearance: how it looks where it is not as usual; None: as usual.
    """

    table: Boxes
    joint_axis: Array
    joint_range: Array
    block_half: Array
    block_slot: Array
    box_color: Array
    grain: Array
    anchors: Anchors
    appearance: Appearance | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Appearance:
    """Light, camera and things that are drawn only; see `envs.looks`.

    light: float32[3], unit vector towards the light. tint: float32[3], factor of all colours, by channel.
    static_eye: float32[3], m; static_axes: float32[3, 3], see `cameras.Camera`. things: K boxes; things_color:
    float32[K, 3].
    """

    light: Array
    tint: Array
    static_eye: Array
    static_axes: Array
    things: Boxes
    things_color: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
    """Named places, with all joints at zero: float32[3], m. `handle` points are the middles of the bars.

    shelf: float32[2, 2], x range (m) of free space in the left and in the right half of the shelf.
    area: float32[2, 2], x range and y range (m) of the part of the table top where blocks start.
    switch_half: float32[], half the length of the lever's bar, m.
    """

    slider_handle: Array
    drawer_handle: Array
    button_top: Array
    switch_handle: Array
    shelf: Array
    area: Array
    switch_half: Array


class _Layout(NamedTuple):
    """What differs between variants: x positions in metres, sizes, colours (albedo, 0 to 255)."""

    button: float
    switch: float
    slider: float
    slider_range: float
    drawer: float
    panels: tuple[float, float]
    area: tuple[float, float]
    sizes: tuple[str, str, str]
    wood: tuple[int, int, int]
    front: tuple[int, int, int]
    grain: tuple[float, float, float]


_BLOCKS_X_M = {name: layout.table_x_m for name, layout in initial_states.SCENES.items()}
# fmt: off
_LAYOUTS: Mapping[str, _Layout] = {
    # panels: right edge of the left and left edge of the right cabinet part, measured in frames of the real scenes
    "A": _Layout(-0.28, 0.30, -0.10, 0.28, 0.10, (-0.336, 0.175), _BLOCKS_X_M["A"], ("middle", "big", "small"),
                 (131, 77, 50), (125, 72, 47), (2.0, 0.10, 0.7)),
    "B": _Layout(0.28, -0.32, 0.09, 0.30, 0.18, (-0.18, 0.365), _BLOCKS_X_M["B"], ("small", "big", "middle"),
                 (247, 198, 139), (240, 190, 132), (6.0, 0.05, 0.3)),
    "C": _Layout(-0.12, -0.32, 0.06, 0.24, 0.10, (-0.18, 0.335), _BLOCKS_X_M["C"], ("big", "small", "middle"),
                 (158, 107, 64), (125, 72, 47), (4.0, 0.10, 0.4)),
    "D": _Layout(-0.12, 0.30, -0.10, 0.28, 0.18, (-0.336, 0.175), _BLOCKS_X_M["D"], ("middle", "small", "big"),
                 (150, 110, 72), (150, 110, 72), (1.0, 0.16, 2.0)),
}
# fmt: on
SCENES = tuple(_LAYOUTS)
RANDOM = "random-"
"""Names of random tables begin so; see `make_scene`."""
_LEVER_HALF_M = 0.078
_BUTTON_M = {"A": (-0.30, -0.06), "B": (0.05, 0.30)}  # x of a random table's button, where no block starts

_LENGTH_M = {"small": 0.04, "middle": 0.056, "big": 0.08}
_COLORS = {"handle": (100, 100, 100), "lamp": (235, 235, 235), "black": (5, 5, 5), "floor": (240, 240, 240)}
_JOINT_OF_BODY = {"door": SLIDER, "drawer": DRAWER, "button": BUTTON, "switch": SWITCH}


class _Part(NamedTuple):
    body: str
    material: str
    center: np.ndarray
    half: tuple[float, float, float]
    leaning: bool = False


def _span(body: str, material: str, x: tuple, y: tuple, z: tuple) -> _Part:
    """An upright box from its x, y and z ranges."""
    low, high = np.array([x, y, z]).T
    return _Part(body, material, (low + high) / 2, tuple((high - low) / 2))


def _lean(body: str, material: str, x: tuple, up: tuple, out: tuple) -> _Part:
    """A leaning box from its ranges along x, up the cabinet's front and out of it."""
    (x0, x1), (up0, up1), (out0, out1) = x, up, out
    center = np.array([0.0, PANEL_Y_M, TABLE_TOP_M]) + LEAN * (up0 + up1) / 2 + OUTWARD * (out0 + out1) / 2
    center[0] = (x0 + x1) / 2
    return _Part(body, material, center, ((x1 - x0) / 2, (out1 - out0) / 2, (up1 - up0) / 2), leaning=True)


def _parts(at: _Layout) -> list[_Part]:
    """All boxes of a variant. Measured in frames of the real scenes through the known static camera, to about 5 mm."""
    left, right = at.panels
    door, bar, lever, drawer = at.slider + 0.13, at.slider + 0.14, at.switch, at.drawer
    return [
        _span("ground", "floor", (-3, 3), (-3, 3), (-1, 0)),  # drawn as an endless chequered plane
        _span("base", "wood", (-0.44, 0.44), (-0.18, 0.24), (0.40, TABLE_TOP_M)),
        _span("base", "wood", (-0.44, drawer - 0.2), (-0.18, -0.15), (0.32, 0.40)),
        _span("base", "wood", (drawer + 0.2, 0.44), (-0.18, -0.15), (0.32, 0.40)),
        _span("base", "wood", (-0.44, -0.40), (-0.178, -0.138), (0.0, 0.40)),
        _span("base", "wood", (0.40, 0.44), (-0.178, -0.138), (0.0, 0.40)),
        _span("base", "wood", (-0.44, -0.40), (0.20, 0.24), (0.0, 0.40)),
        _span("base", "wood", (0.40, 0.44), (0.20, 0.24), (0.0, 0.40)),
        _lean("base", "wood", (-0.44, left), (0.0, 0.228), (-0.12, 0.0)),
        _lean("base", "wood", (right, 0.44), (0.0, 0.228), (-0.12, 0.0)),
        _span("base", "wood", (-0.44, 0.44), (0.163, 0.24), (TABLE_TOP_M, 0.636)),
        _span("base", "wood", (-0.44, 0.44), (0.140, 0.21), (0.636, 0.655)),
        _span("base", "pedestal", (at.button - 0.033, at.button + 0.033), (-0.153, -0.087), (TABLE_TOP_M, 0.463)),
        _span("shelf", "wood", (left, right), (0.03, 0.163), (TABLE_TOP_M, SHELF_TOP_M)),
        _lean("door", "front", (door - 0.143, door + 0.143), (0.003, 0.222), (0.002, 0.012)),
        _lean("door", "handle", (bar - 0.021, bar + 0.021), (0.030, 0.190), (0.045, 0.072)),
        _lean("door", "handle", (bar - 0.016, bar + 0.016), (0.030, 0.048), (0.012, 0.045)),
        _lean("door", "handle", (bar - 0.016, bar + 0.016), (0.172, 0.190), (0.012, 0.045)),
        _span("drawer", "front", (drawer - 0.197, drawer + 0.197), (-0.171, 0.11), (0.326, DRAWER_FLOOR_M)),
        _span("drawer", "front", (drawer - 0.197, drawer + 0.197), (-0.181, -0.171), (0.305, 0.3995)),
        _span("drawer", "front", (drawer - 0.197, drawer - 0.157), (-0.171, 0.11), (DRAWER_FLOOR_M, 0.396)),
        _span("drawer", "front", (drawer + 0.157, drawer + 0.197), (-0.171, 0.11), (DRAWER_FLOOR_M, 0.396)),
        _span("drawer", "front", (drawer - 0.157, drawer + 0.157), (0.09, 0.11), (DRAWER_FLOOR_M, 0.396)),
        _span("drawer", "handle", (drawer - 0.125, drawer + 0.125), (-0.265, -0.235), (0.345, 0.375)),
        _span("drawer", "handle", (drawer - 0.125, drawer - 0.098), (-0.235, -0.181), (0.345, 0.375)),
        _span("drawer", "handle", (drawer + 0.098, drawer + 0.125), (-0.235, -0.181), (0.345, 0.375)),
        _span("button", "black", (at.button - 0.03, at.button + 0.03), (-0.15, -0.09), (0.455, 0.4864)),
        _lean("switch", "handle", (lever - _LEVER_HALF_M, lever + _LEVER_HALF_M), (0.065, 0.095), (0.032, 0.062)),
        _lean("switch", "handle", (lever - 0.060, lever - 0.040), (0.072, 0.088), (0.0, 0.032)),
        _lean("switch", "handle", (lever + 0.040, lever + 0.060), (0.072, 0.088), (0.0, 0.032)),
        _span("led", "lamp", (at.button - 0.08, at.button + 0.08), (0.142, 0.192), (0.655, 0.667)),
        _span("lightbulb", "lamp", (lever - 0.03, lever + 0.03), (0.145, 0.205), (0.655, 0.71)),
    ]


_MADE = _parts(_LAYOUTS["D"])
BOX_BODY = np.array([tasks.BODIES.index(part.body) for part in _MADE])
"""int[N]: what each box of `Scene.table` belongs to, index into `tasks.BODIES`; the same in every variant."""
BOX_JOINT = np.array([_JOINT_OF_BODY.get(part.body, -1) for part in _MADE])
"""int[N]: the mechanism each box moves with, index into `JOINTS`; -1 = none."""
BOX_MATERIAL = np.array([part.material for part in _MADE])
"""str[N]: "wood", "front" (wood of door and drawer), "pedestal", "handle", "lamp", "black" or "floor"."""


class _Variant(NamedTuple):
    """A layout, and which of A to D its table top and its cabinet are like."""

    layout: _Layout
    table: str
    cabinet: str
    shift: float
    """m, how far the cabinet's parts are moved along x."""


def random_tables(first: int, count: int) -> tuple[str, ...]:
    """Names of so many random tables, from number `first` on."""
    return tuple(f"{RANDOM}{number}" for number in range(first, first + count))


def check_name(name: str) -> None:
    """Raises ValueError for what `make_scene` does not know."""
    number = name.removeprefix(RANDOM)
    is_random = number != name and number.isdecimal() and number == str(int(number))  # one name for each
    if name not in _LAYOUTS and not is_random:
        raise ValueError(f"unknown scene {name!r}; known scenes: {', '.join(SCENES)}, {RANDOM}0, {RANDOM}1, ...")


def _variant(name: str) -> _Variant:
    check_name(name)
    if name in _LAYOUTS:
        return _Variant(_LAYOUTS[name], name, name, 0.0)
    rng = np.random.default_rng(int(name.removeprefix(RANDOM)))
    table, cabinet = rng.choice(["A", "B"]), rng.choice(["A", "B", "C"])
    top, back = _LAYOUTS[table], _LAYOUTS[cabinet]
    button = float(rng.uniform(*_BUTTON_M[table]))
    shift, switch = (float(x) for x in rng.uniform(-0.02, 0.02, 2))
    woods = np.array([_LAYOUTS[seen].wood for seen in "ABC"])
    wood = np.clip(rng.dirichlet(np.ones(3)) @ woods + rng.normal(0.0, 15.0, 3), 30, 250)
    layout = _Layout(
        button=button,
        switch=back.switch + switch,
        slider=back.slider + shift,
        slider_range=back.slider_range,
        drawer=float(rng.uniform(0.09, 0.19)),
        panels=(back.panels[0] + shift, back.panels[1] + shift),
        area=top.area,
        sizes=tuple(str(size) for size in rng.permutation(list(_LENGTH_M))),
        wood=tuple(wood),
        front=tuple(wood * rng.uniform(0.85, 1.0)),
        grain=(float(rng.integers(1, 7)), rng.uniform(0.05, 0.16), rng.uniform(0.3, 2.0)),
    )
    return _Variant(layout, table, cabinet, shift)


def initial_obs(condition: task_chains.Condition, name: str) -> tuple[np.ndarray, np.ndarray]:
    """`initial_states.initial_state` for random tables too: robot_obs float64[15], scene_obs float64[24]."""
    variant = _variant(name)
    robot_obs, scene_obs = initial_states.initial_state(condition, variant.table)
    table, cabinet = initial_states.SCENES[variant.table], initial_states.SCENES[variant.cabinet]
    scene_obs[0] = cabinet.slider_left_m if condition["slider"] == "left" else 0.0
    for color in BLOCKS:
        place = condition[f"{color}_block"]
        if place != "table":
            slot = 6 + 6 * table.block_order.index(color)
            scene_obs[slot] = cabinet.shelf_x_m[place == "slider_right"] + variant.shift
    return robot_obs, scene_obs


def make_scene(name: str) -> Scene:
    """The table "A", "B", "C" or "D", or "random-N", drawn from the seed N: a cabinet like that of A, B or C, moved by
    up to 2 cm, button and drawer anywhere in their ranges, sizes of blocks exchanged, other colours.
    """
    return jax.tree.map(jnp.asarray, draw_up(name))


def stack_scenes(names: Sequence[str]) -> Scene:
    """`make_scene` of each, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *map(draw_up, names))


def draw_up(name: str) -> Scene:
    """`make_scene` in NumPy."""
    at, table, _, _ = _variant(name)
    parts = _parts(at)
    colors = {**_COLORS, "wood": at.wood, "pedestal": at.wood, "front": at.front}
    rotation = np.stack([_LEANING if part.leaning else np.eye(3) for part in parts])
    front = np.array([0.0, PANEL_Y_M, TABLE_TOP_M])
    scene = Scene(
        table=Boxes(np.stack([part.center for part in parts]), rotation, np.array([part.half for part in parts])),
        joint_axis=np.array([[-1, 0, 0], [0, -1, 0], [0, 0, -1], LEAN]),
        joint_range=np.array([at.slider_range, 0.22, 0.02, 0.088]),
        block_half=np.array([[_LENGTH_M[size] / 2, 0.02, 0.02] for size in at.sizes]),
        block_slot=np.array([initial_states.SCENES[table].block_order.index(color) for color in BLOCKS], np.int32),
        box_color=np.array([colors[part.material] for part in parts]) / 255,
        grain=wood_grain(*at.grain),
        anchors=Anchors(
            slider_handle=front + [at.slider + 0.14, 0, 0] + 0.11 * LEAN + 0.0585 * OUTWARD,
            drawer_handle=np.array([at.drawer, -0.25, 0.36]),
            button_top=np.array([at.button, -0.12, 0.4864]),
            switch_handle=front + [at.switch, 0, 0] + 0.08 * LEAN + 0.047 * OUTWARD,
            shelf=np.array([[at.panels[0], at.slider - 0.013], [at.slider + 0.013, at.panels[1]]]),
            area=np.array([at.area, initial_states.TABLE_Y_M]),
            switch_half=np.array(_LEVER_HALF_M),
        ),
    )
    return in_single_precision(scene)


def in_single_precision(scene: Scene) -> Scene:
    """NumPy: float32, and int32 where numbers are whole."""
    return jax.tree.map(lambda x: np.asarray(x, np.int32 if x.dtype == np.int32 else np.float32), scene)


def neutral_scene_obs(name: str) -> np.ndarray:
    """float64[24]: everything closed and off, the blocks in a row on the table."""
    (low, high), y = draw_up(name).anchors.area
    obs = np.zeros(24)
    for i in range(3):
        x = low + (high - low) * (0.2 + 0.3 * i)
        obs[6 + 6 * i : 12 + 6 * i] = x, np.mean(y), TABLE_TOP_M + 0.02, 0.0, 0.0, np.pi / 2
    return obs


def wood_grain(frequency: float, contrast: float, waviness: float, size: int = 64) -> np.ndarray:
    """float[size, size], seamless grain along the first axis: `frequency` rings, each bent by `waviness` of a ring."""
    generator = np.random.default_rng(0)
    along, across = np.meshgrid(*[np.linspace(0, 2 * np.pi, size, endpoint=False)] * 2, indexing="ij")
    bend = waviness * (np.sin(along + 2 * np.sin(across)) + 0.5 * np.sin(2 * along + across + 1))
    rings = np.sin(frequency * across + bend) + 0.5 * np.sin((2 * frequency + 3) * across + 2 * bend)
    fibres = generator.normal(size=(size // 4, size)).repeat(4, axis=0)
    grain = 1 + contrast * (0.6 * rings + 0.4 * fibres)
    return grain / grain.mean()
