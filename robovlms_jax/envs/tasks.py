"""CALVIN's 34 tasks: when each is done, how it is asked for, the 1000 evaluation chains and where they start.

Written from the published rules (Mees et al. 2022, arXiv:2112.03227). Nothing here knows a simulator: every CALVIN-like
environment reports a `SceneInfo`, and the conditions are pure array functions of two of them (NumPy or jax, with any
leading batch axes, jit-able).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from robovlms_jax.envs import phrasings

# ---------------------------------------------------------------------------------------------------------------------
# What an environment reports

BLOCKS = phrasings.COLORS
"""Order of the blocks in `SceneInfo`, in every scene. `scene_obs` has its own order, see `SceneLayout.block_order`."""

_TABLE = ("base", "drawer", "shelf", "door", "button", "switch", "led", "lightbulb")
BODIES = ("robot", *(f"{color}_block" for color in BLOCKS), *_TABLE, "ground")
"""What can be touched: columns of `SceneInfo.contacts`. `base` to `lightbulb` are the links of CALVIN's one table body:
the fixed table, the drawer, the board of the shelf (its `plank_link`), the sliding door, button, lever and lights."""

_ROBOT, _BASE, _DRAWER, _SHELF = (BODIES.index(name) for name in ("robot", "base", "drawer", "shelf"))
_GROUND = BODIES.index("ground")
_BLOCKS = slice(1, 4)


class SceneInfo(TypedDict):
    """`Env.info` of a CALVIN-like environment; leading batch axes are welcome, further keys are ignored.

    Positions in metres in the world frame, NumPy or jax arrays (scalars may be plain numbers). A body counts as touched
    when there is a contact point, at any force.
    """

    slider: Any
    """float[], joint of the sliding door in m: 0 at the right, growing to the left."""
    drawer: Any
    """float[], joint of the drawer in m: 0 closed."""
    lightbulb: Any
    """int[], 1 = on."""
    led: Any
    """int[], 1 = on."""
    block_position: Any
    """float[3, 3], xyz of the red, blue and pink block."""
    block_rotation: Any
    """float[3, 4], unit quaternion (x, y, z, w) of each block."""
    block_velocity: Any
    """float[3, 6], linear (m/s) then angular (rad/s) velocity of each block."""
    contacts: Any
    """bool[4, 13]: does the robot, the red, blue, pink block (rows) touch each of `BODIES` (columns)?"""


# ---------------------------------------------------------------------------------------------------------------------
# When a task is done

_TURN_RAD = np.deg2rad(60.0)
_TILT_RAD = np.deg2rad(30.0)
_TURN_DRIFT_M = 0.1
_PUSH_M = 0.1
_SLIDER_M = 0.15
_DRAWER_M = 0.12
_LIFT_M = {"table": 0.05, "slider": 0.03, "drawer": 0.05}
_AT_REST = 1.0  # m/s and rad/s, per component


def conditions(start: SceneInfo, now: SceneInfo, *, as_released: bool = False) -> Any:
    """Which tasks were done between two moments.

    Args:
      start: the scene when the instruction was given.
      now: the scene now.
      as_released: decide `push_into_drawer` as CALVIN's released checker does, which accepts a block that the robot
        still touches (its test compares a body number with (body, link) pairs and never fires). Use it for numbers
        that stand beside published ones; the default follows the documented rule.
    Returns:
      bool[..., 34] in the order of `TASKS`.
    """
    xp = now["contacts"].__array_namespace__()
    before, touching = xp.asarray(start["contacts"]), xp.asarray(now["contacts"])
    block_before, block_now = before[..., _BLOCKS, :], touching[..., _BLOCKS, :]  # [..., 3, 13]
    things_before, things_now = block_before[..., 1:], block_now[..., 1:]  # without the robot
    moved = xp.asarray(now["block_position"]) - xp.asarray(start["block_position"])  # [..., 3, 3]

    # rotate: yaw turned, not tipped over, not dragged away, standing on something
    roll, pitch, yaw = _turn(xp, start["block_rotation"], now["block_rotation"])  # each [..., 3]
    upright = (abs(roll) < _TILT_RAD) & (abs(pitch) < _TILT_RAD)
    in_place = xp.sqrt(xp.sum(moved**2, axis=-1)) <= _TURN_DRIFT_M
    turned = upright & in_place & xp.any(things_now, axis=-1)
    rotate = _pair(xp, turned & (yaw < -_TURN_RAD), turned & (yaw > _TURN_RAD))

    # push: what it stood on at the start it still stands on
    kept = xp.all(~things_before | things_now, axis=-1)
    supported = kept & xp.any(things_before, axis=-1) & xp.any(things_now, axis=-1)
    push = _pair(xp, supported & (moved[..., 0] > _PUSH_M), supported & (moved[..., 0] < -_PUSH_M))

    slid = xp.asarray(now["slider"]) - xp.asarray(start["slider"])
    drawn = xp.asarray(now["drawer"]) - xp.asarray(start["drawer"])
    mechanisms = [slid > _SLIDER_M, slid < -_SLIDER_M, drawn > _DRAWER_M, drawn < -_DRAWER_M]

    held = block_now[..., _ROBOT] & ~xp.any(things_now, axis=-1)  # touches the robot and nothing else
    lift = xp.stack(
        [
            held & (moved[..., 2] > _LIFT_M[place]) & block_before[..., link]
            for place, link in (("table", _BASE), ("slider", _SHELF), ("drawer", _DRAWER))
        ],
        axis=-1,
    )

    # place: the robot held one block and touched nothing else, and has let go of it
    robot_before = before[..., 0, :]
    bodies_before = xp.sum(robot_before[..., :_BASE], axis=-1) + robot_before[..., _GROUND]
    only_one_body = bodies_before + xp.any(robot_before[..., _BASE:_GROUND], axis=-1) == 1
    held_before = block_before[..., _ROBOT] & ~xp.any(things_before, axis=-1)
    placed = only_one_body[..., None] & robot_before[..., _BLOCKS] & held_before & ~touching[..., 0, _BLOCKS]
    place = [xp.any(placed & block_now[..., link], axis=-1) for link in (_SHELF, _DRAWER)]

    # stack: from touching no block to touching nothing but blocks, at rest; unstack: the other way round
    on_blocks_before, on_blocks_now = _only_blocks(xp, block_before), _only_blocks(xp, block_now)
    near_block_before = xp.any(block_before[..., _BLOCKS], axis=-1)
    near_block_now = xp.any(block_now[..., _BLOCKS], axis=-1)
    rest_before, rest_now = (
        xp.all(abs(xp.asarray(info["block_velocity"])) < _AT_REST, axis=-1) for info in (start, now)
    )
    stack = xp.any(~near_block_before & on_blocks_now & rest_now, axis=-1)
    unstack = xp.any(on_blocks_before & rest_before & ~near_block_now, axis=-1)

    lights = []
    for light in ("lightbulb", "led"):
        was_on, is_on = xp.asarray(start[light]) == 1, xp.asarray(now[light]) == 1
        lights += [~was_on & is_on, was_on & ~is_on]

    only_base = block_before[..., _BASE] & (xp.sum(block_before, axis=-1) == 1)
    released = xp.ones_like(only_base) if as_released else ~block_now[..., _ROBOT]
    push_into = xp.any(only_base & block_now[..., _DRAWER] & released, axis=-1)

    blocks = [x.reshape(*x.shape[:-2], -1) for x in (rotate, push, lift)]
    singles = [xp.stack(group, axis=-1) for group in (mechanisms, [*place, stack, unstack, *lights, push_into])]
    return xp.concatenate([blocks[0], blocks[1], singles[0], blocks[2], singles[1]], axis=-1)


def completed_tasks(start: SceneInfo, now: SceneInfo, *, as_released: bool = False) -> set[str]:
    """Names of the tasks done between `start` and `now`, one scene each (no batch axes); see `conditions`."""
    return completed_in_each([start], [now], as_released=as_released)[0]


def completed_in_each(
    starts: Sequence[SceneInfo], nows: Sequence[SceneInfo], *, as_released: bool = False
) -> list[set[str]]:
    """`completed_tasks` of many scenes at once: a hundred scenes take hardly longer than one."""
    if not starts:
        return []
    keys = SceneInfo.__annotations__
    start, now = ({key: np.stack([info[key] for info in infos]) for key in keys} for infos in (starts, nows))
    names = np.array(list(TASKS))
    return [set(names[done].tolist()) for done in conditions(start, now, as_released=as_released)]


def _turn(xp: Any, start: Any, now: Any) -> tuple[Any, Any, Any]:
    """Roll, pitch, yaw (rad, about fixed x then y then z) of the rotation from `start` to `now`, float[..., 4] each."""
    start, now = xp.asarray(start), xp.asarray(now)
    ax, ay, az, aw = (now[..., i] for i in range(4))
    bx, by, bz, bw = (start[..., i] * sign for i, sign in enumerate((-1, -1, -1, 1)))
    x = aw * bx + ax * bw + ay * bz - az * by
    y = aw * by - ax * bz + ay * bw + az * bx
    z = aw * bz + ax * by - ay * bx + az * bw
    w = aw * bw - ax * bx - ay * by - az * bz
    roll = xp.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = xp.arcsin(xp.clip(2 * (w * y - z * x), -1.0, 1.0))
    yaw = xp.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return roll, pitch, yaw


def _pair(xp: Any, right: Any, left: Any) -> Any:
    return xp.stack([right, left], axis=-1)


def _only_blocks(xp: Any, contacts: Any) -> Any:
    """bool[..., 3]: touches at least one block and nothing else."""
    others = contacts[..., _ROBOT] | xp.any(contacts[..., _BASE:], axis=-1)
    return xp.any(contacts[..., _BLOCKS], axis=-1) & ~others


# ---------------------------------------------------------------------------------------------------------------------
# The registry: names, categories, phrasings


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: what kind it is and the ways people ask for it."""

    name: str
    category: str
    """A chain asks for at most one task of each category."""
    phrasings: tuple[str, ...]
    """Instructions for training."""
    held_out: tuple[str, ...]
    """Instructions that never occur in training; the first is the default of evaluations with new wording."""


TASKS: Mapping[str, Task] = {
    family.name.format(**words): Task(
        family.name.format(**words),
        family.category.format(**words),
        tuple(text.format(**words) for text in family.phrasings),
        tuple(text.format(**words) for text in family.held_out),
    )
    for family in phrasings.FAMILIES
    for words in family.members
}
"""The 34 tasks by name. The order is the published one: chains are drawn by position, and `conditions` returns it."""


def instruction(task: str, *, held_out: bool = False, variant: int = 0) -> str:
    """One way to ask for `task`; `variant` counts on past the last phrasing from the first again."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(TASKS)}.")
    texts = TASKS[task].held_out if held_out else TASKS[task].phrasings
    return texts[variant % len(texts)]


# ---------------------------------------------------------------------------------------------------------------------
# Chains

Condition = Mapping[str, int | str]
"""A symbolic scene: {"led": 1, "lightbulb": 0, "slider": "left", "drawer": "closed", "red_block": "table", ...}."""

_VALUES: Mapping[str, tuple[int | str, ...]] = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    **{f"{color}_block": ("table", "slider_right", "slider_left") for color in BLOCKS},
    "grasped": (0,),
}
_BLOCK_KEYS = tuple(f"{color}_block" for color in BLOCKS)

CHAIN_LENGTH = 5
CHAINS_SHA256 = "90191d9ac76baecb4f292ab766bbbf3ae65dbf43a83bbe5c376d99db10fd6446"
_CHAINS_FILE = pathlib.Path(__file__).with_name("chains.json")


@dataclasses.dataclass(frozen=True)
class Chain:
    """Five tasks asked one after the other, the scene left as the previous one left it."""

    index: int
    condition: Condition
    tasks: tuple[str, ...]


@functools.cache
def initial_conditions() -> tuple[Condition, ...]:
    """The 192 symbolic scenes chains start from: 1 or 2 blocks on the table, at most one in each half of the shelf."""
    scenes = (dict(zip(_VALUES, values)) for values in itertools.product(*_VALUES.values()))
    return tuple(scene for scene in scenes if _is_initial([scene[key] for key in _BLOCK_KEYS]))


def _is_initial(places: list) -> bool:
    return places.count("table") in (1, 2) and places.count("slider_right") < 2 and places.count("slider_left") < 2


@functools.cache
def official_chains() -> tuple[Chain, ...]:
    """The 1000 chains of CALVIN's evaluation, as published; read from chains.json and verified."""
    remedy = f"restore it from the repository or rewrite it with `python -m {__spec__.name if __spec__ else __name__}`"
    try:
        rows = json.loads(_CHAINS_FILE.read_text())
        pairs = [(initial_conditions()[row[0]], [list(TASKS)[i] for i in row[1:]]) for row in rows]
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{_CHAINS_FILE} is missing or not a list of chains ({error}); {remedy}.") from error
    found = chains_hash(pairs)
    if found != CHAINS_SHA256:
        raise ValueError(
            f"{_CHAINS_FILE} was edited: its {len(pairs)} chains hash to {found}, the published 1000 to "
            f"{CHAINS_SHA256}. Results would not be comparable; {remedy}."
        )
    return tuple(Chain(index, condition, tuple(names)) for index, (condition, names) in enumerate(pairs))


def chains_hash(pairs: Iterable[tuple[Condition, Sequence[str]]]) -> str:
    """SHA-256 of the compact JSON (sorted keys) of [[condition, tasks], ...]."""
    lists = [[dict(condition), list(names)] for condition, names in pairs]
    text = json.dumps(lists, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def generate_chains() -> list[tuple[Condition, list[str]]]:
    """Draw the 1000 chains anew, in the published order. Rejection sampling: about a minute."""
    quota, extra = divmod(1000, len(initial_conditions()))
    pairs = [
        (condition, names)
        for index, condition in enumerate(initial_conditions())
        for names in draw_chains(index, quota + (index < extra))
    ]
    np.random.RandomState(0).shuffle(pairs)
    return pairs


def draw_chains(condition_index: int, count: int) -> list[list[str]]:
    """The first `count` valid chains from one initial condition; that condition's number is the seed."""
    names = np.array(list(TASKS))
    generator = np.random.RandomState(condition_index)
    chains: list[list[str]] = []
    while len(chains) < count:
        draw = generator.choice(names, size=CHAIN_LENGTH, replace=False).tolist()
        if is_valid_chain(initial_conditions()[condition_index], draw):
            chains.append(draw)
    return chains


def is_valid_chain(condition: Condition, names: Sequence[str]) -> bool:
    """Is every task, in order, possible in exactly one way, and is no category asked for twice?"""
    if len({TASKS[name].category for name in names}) < len(names):
        return False
    for name in names:
        outcomes = successors(condition, name)
        if len(outcomes) != 1:
            return False
        condition = outcomes[0]
    return True


def successors(condition: Condition, task: str) -> list[Condition]:
    """The symbolic scenes that doing `task` can lead to; empty when the task is impossible in `condition`."""
    needs_grasp = task in ("place_in_slider", "place_in_drawer", "stack_block")
    if condition["grasped"] != int(needs_grasp):
        return []
    places = {key: condition[key] for key in _BLOCK_KEYS}
    slider, drawer = condition["slider"], condition["drawer"]
    held = [key for key, place in places.items() if place == "grasped"]
    words = task.split("_")
    changes: list[dict[str, int | str]] = []
    if words[0] in ("rotate", "push") and task != "push_into_drawer":
        changes = [{}] if places[f"{words[1]}_block"] == "table" else []
    elif task == "push_into_drawer":
        on_table = [key for key, place in places.items() if place == "table"]
        others_shelved = all(place in ("table", "slider_left", "slider_right") for place in places.values())
        if drawer == "open" and len(on_table) == 1 and others_shelved:
            changes = [{on_table[0]: "drawer"}]
    elif words[:2] == ["move", "slider"]:
        changes = [{"slider": words[2]}] if slider != words[2] else []
    elif words[1] == "drawer":
        wanted = {"open": "open", "close": "closed"}[words[0]]
        changes = [{"drawer": wanted}] if drawer != wanted else []
    elif words[0] == "lift":
        key, place = f"{words[1]}_block", words[3]
        reachable = {
            "table": places[key] == "table",
            # the door hides the half it stands in front of
            "slider": (places[key], slider) in (("slider_left", "right"), ("slider_right", "left")),
            "drawer": places[key] == "drawer" and drawer == "open",
        }[place]
        changes = [{key: "grasped", "grasped": 1}] if reachable else []
    elif task == "place_in_slider":
        # the published rule names the half the door is at, although the block physically ends in the open one
        changes = [{key: f"slider_{slider}", "grasped": 0} for key in held]
    elif task == "place_in_drawer":
        changes = [{key: "drawer", "grasped": 0} for key in held if drawer == "open"]
    elif task == "stack_block":
        below = [key for key, place in places.items() if place == "table"]
        changes = [{top: "stacked_top", bottom: "stacked_bottom", "grasped": 0} for top in held for bottom in below]
    elif task == "unstack_block":
        tops = [key for key, place in places.items() if place == "stacked_top"]
        bottoms = [key for key, place in places.items() if place == "stacked_bottom"]
        changes = [{top: "table", bottom: "table"} for top in tops for bottom in bottoms]
    else:
        _, verb, light = words
        lit = int(verb == "on")
        changes = [{light: lit}] if condition[light] != lit else []
    return [{**condition, **change} for change in changes]


# ---------------------------------------------------------------------------------------------------------------------
# From a symbolic scene to a simulator's state

INITIAL_ROBOT_OBS = np.array(
    [
        *(0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585),  # tool centre point: xyz, Euler xyz
        0.07999963,  # gripper opening
        *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928),  # arm joints
        1.0,  # last gripper command
    ]
)
"""float64[15], the robot at the start of every chain."""


@dataclasses.dataclass(frozen=True)
class SceneLayout:
    """Where the parts that initial states name are in one of the four scenes."""

    block_order: tuple[str, str, str]
    """Colours of the blocks in scene_obs[6:12], [12:18], [18:24]."""
    slider_left_m: float = 0.28
    """Joint value of the sliding door at its left end."""
    shelf_x_m: tuple[float, float] = (-0.240851662, 0.070341633)
    """x of a block in the left and the right half of the shelf."""
    table_spots_m: tuple[tuple[float, float, float], ...] = (
        (0.0500000896, -0.120000177, 0.459990009),
        (0.229995412, -0.11999514, 0.45999001),
    )
    """xyz of the two places for blocks on the table."""

    def __post_init__(self):
        if sorted(self.block_order) != sorted(BLOCKS):
            raise ValueError(f"block_order={self.block_order} must name each of {BLOCKS} once.")


# D is published. The evaluation has no official initial states in A, B and C: blocks stand where D's do relative to the
# shelf, and on the table where nothing else stands (B has button and lever on the other sides: its spots are mirrored).
SCENES: Mapping[str, SceneLayout] = {
    "A": SceneLayout(("pink", "blue", "red")),
    "B": SceneLayout(
        ("red", "blue", "pink"),
        slider_left_m=0.30,
        shelf_x_m=(-0.05, 0.26),
        table_spots_m=((-0.05, -0.12, 0.45999), (-0.23, -0.12, 0.45999)),
    ),
    "C": SceneLayout(("blue", "red", "pink"), slider_left_m=0.24, shelf_x_m=(-0.08, 0.23)),
    "D": SceneLayout(("red", "blue", "pink")),
}

_SHELF_YZ_M = (0.0924044687, 0.460990009)
_DRAWER_OPEN_M = 0.22
_SWITCH_ON_M = 0.088


def initial_state(condition: Condition, scene: str = "D") -> tuple[np.ndarray, np.ndarray]:
    """The simulator state a chain starts in.

    Args:
      condition: symbolic scene with the keys of `initial_conditions()`.
      scene: "A" to "D"; D gives the published evaluation's states, to the last digit.
    Returns:
      robot_obs float64[15] and scene_obs float64[24], in the layout of `Env.reset`.
    """
    if scene not in SCENES:
        raise ValueError(f"unknown scene {scene!r}; known scenes: {', '.join(SCENES)}.")
    _check_condition(condition)
    layout = SCENES[scene]
    generator = np.random.RandomState(condition_seed(condition))
    spots = [np.array(spot) for spot in layout.table_spots_m]
    generator.shuffle(spots)
    red_first = condition["red_block"] == "table"
    table = {"red": spots[0], "blue": spots[1] if red_first else spots[0], "pink": spots[1]}

    scene_obs = np.zeros(24)
    scene_obs[0] = layout.slider_left_m if condition["slider"] == "left" else 0.0
    scene_obs[1] = _DRAWER_OPEN_M if condition["drawer"] == "open" else 0.0
    scene_obs[3] = _SWITCH_ON_M if condition["lightbulb"] else 0.0
    scene_obs[4:6] = condition["lightbulb"], condition["led"]
    for color in BLOCKS:  # the order in which yaws are drawn, in every scene
        # the published bounds: pi/2 added after drawing differs in the last bit of 46 of the 1000 chains' states
        yaw = generator.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
        place = condition[f"{color}_block"]
        position = table[color] if place == "table" else (layout.shelf_x_m[place == "slider_right"], *_SHELF_YZ_M)
        start = 6 + 6 * layout.block_order.index(color)
        scene_obs[start : start + 6] = *position, 0.0, 0.0, yaw
    return INITIAL_ROBOT_OBS.copy(), scene_obs


def condition_seed(condition: Condition) -> int:
    """Seed of an initial condition: FNV-1 (32 bit, offset basis 0) over UTF-16-LE of how Python prints its values.

    That is what the C++ hash of the published protocol computes when it is handed a Python string.
    """
    seed = 0
    for byte in f"dict_values({[condition[key] for key in _VALUES]!r})".encode("utf-16-le"):
        seed = (seed * 16777619 & 0xFFFFFFFF) ^ byte
    return seed


def _check_condition(condition: Condition) -> None:
    if set(condition) != set(_VALUES):
        raise ValueError(f"initial condition has keys {sorted(condition)}, expected {sorted(_VALUES)}.")
    for key, allowed in _VALUES.items():
        value = condition[key]
        # `True == 1`, but it prints differently and so would seed another state
        if value not in allowed or type(value) is not type(allowed[0]):
            raise ValueError(f"initial condition has {key}={value!r}, expected one of {allowed}.")
    if not _is_initial([condition[key] for key in _BLOCK_KEYS]):
        places = {key: condition[key] for key in _BLOCK_KEYS}
        raise ValueError(f"initial condition has {places}; expected 1 or 2 on the table, at most 1 per shelf half.")


def _write_chains() -> None:
    rows = [
        [initial_conditions().index(condition), *(list(TASKS).index(name) for name in names)]
        for condition, names in generate_chains()
    ]
    _CHAINS_FILE.write_text("[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n")


if __name__ == "__main__":
    _write_chains()
