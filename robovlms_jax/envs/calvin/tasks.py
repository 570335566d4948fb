"""CALVIN's 34 tasks: when each is done, and how it is asked for.

Written from the published rules (Mees et al. 2022, arXiv:2112.03227). Nothing here knows a simulator: every CALVIN-like
environment reports a `SceneInfo`, and the conditions are pure array functions of two of them (NumPy or jax, with any
leading batch axes, jit-able).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from robovlms_jax.actions import namespaces, rotations
from robovlms_jax.envs.calvin import phrasings

# ---------------------------------------------------------------------------------------------------------------------
# What an environment reports

BLOCKS = phrasings.COLORS
"""Order of the blocks in `SceneInfo`, in every scene. `scene_obs` has an order of its own, see
`initial_states.SceneLayout`."""

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
    xp = namespaces.of(now["contacts"])
    before, touching = xp.asarray(start["contacts"]), xp.asarray(now["contacts"])
    block_before, block_now = before[..., _BLOCKS, :], touching[..., _BLOCKS, :]  # [..., 3, 13]
    things_before, things_now = block_before[..., 1:], block_now[..., 1:]  # without the robot
    moved = xp.asarray(now["block_position"]) - xp.asarray(start["block_position"])  # [..., 3, 3]

    # rotate: yaw turned, not tipped over, not dragged away, standing on something
    turn = _turn(xp, start["block_rotation"], now["block_rotation"])  # [..., 3, 3]
    yaw = turn[..., 2]
    upright = xp.all(abs(turn[..., :2]) < _TILT_RAD, axis=-1)
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

    place = _placed(xp, before, touching)
    stacks = _stacked(xp, start, now, block_before, block_now)

    lights = []
    for light in ("lightbulb", "led"):
        was_on, is_on = xp.asarray(start[light]) == 1, xp.asarray(now[light]) == 1
        lights += [~was_on & is_on, was_on & ~is_on]

    only_base = block_before[..., _BASE] & (xp.sum(block_before, axis=-1) == 1)
    released = xp.ones_like(only_base) if as_released else ~block_now[..., _ROBOT]
    push_into = xp.any(only_base & block_now[..., _DRAWER] & released, axis=-1)

    blocks = [x.reshape(*x.shape[:-2], -1) for x in (rotate, push, lift)]
    singles = [xp.stack(group, axis=-1) for group in (mechanisms, [*place, *stacks, *lights, push_into])]
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


def _turn(xp: Any, start: Any, now: Any) -> Any:
    """Roll, pitch, yaw float[..., 3] (rad, about fixed x then y then z) of the rotation from `start` to `now`, unit
    quaternions float[..., 4]."""
    before, after = (rotations.from_quaternion(xp.asarray(quaternion)) for quaternion in (start, now))
    return rotations.to_euler(after @ xp.swapaxes(before, -1, -2))


def _placed(xp: Any, before: Any, touching: Any) -> list[Any]:
    """place_in_slider, place_in_drawer: the robot held one block and touched nothing else, and has let go of it; it
    touches the shelf or the drawer. Contacts bool[..., 4, 13] -> bool[...] each."""
    robot_before = before[..., 0, :]
    bodies_before = xp.sum(robot_before[..., :_BASE], axis=-1) + robot_before[..., _GROUND]
    only_one_body = bodies_before + xp.any(robot_before[..., _BASE:_GROUND], axis=-1) == 1
    block_before, block_now = before[..., _BLOCKS, :], touching[..., _BLOCKS, :]
    held_before = block_before[..., _ROBOT] & ~xp.any(block_before[..., 1:], axis=-1)
    placed = only_one_body[..., None] & robot_before[..., _BLOCKS] & held_before & ~touching[..., 0, _BLOCKS]
    return [xp.any(placed & block_now[..., link], axis=-1) for link in (_SHELF, _DRAWER)]


def _stacked(xp: Any, start: SceneInfo, now: SceneInfo, block_before: Any, block_now: Any) -> list[Any]:
    """stack_block: from touching no block to touching nothing but blocks, at rest; unstack_block: the other way round.
    Contacts of the blocks bool[..., 3, 13] -> bool[...] each."""
    on_blocks_before, on_blocks_now = _only_blocks(xp, block_before), _only_blocks(xp, block_now)
    near_block_before = xp.any(block_before[..., _BLOCKS], axis=-1)
    near_block_now = xp.any(block_now[..., _BLOCKS], axis=-1)
    rest_before, rest_now = (
        xp.all(abs(xp.asarray(info["block_velocity"])) < _AT_REST, axis=-1) for info in (start, now)
    )
    stack = xp.any(~near_block_before & on_blocks_now & rest_now, axis=-1)
    unstack = xp.any(on_blocks_before & rest_before & ~near_block_now, axis=-1)
    return [stack, unstack]


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


def require_known(task: str) -> None:
    """Raises ValueError for what is none of `TASKS`."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(TASKS)}.")


def instruction(task: str, *, held_out: bool = False, variant: int = 0) -> str:
    """One way to ask for `task`; `variant` counts on past the last phrasing from the first again."""
    require_known(task)
    texts = TASKS[task].held_out if held_out else TASKS[task].phrasings
    return texts[variant % len(texts)]
