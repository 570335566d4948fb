"""Scripted experts for CALVIN's 34 tasks: pure functions, so that thousands of tables run in one jitted call.

`plan` turns scene, state and task into a list of waypoints once, when a task begins; `waypoints.act` walks along it,
closing the loop on where the hand is. Whether a task is done is not the expert's opinion: ask `tasks.conditions`.

Random choices (speed, where exactly to touch, how high to travel) come from a key; failures are for the caller to
discard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import rotations
from robovlms_jax.envs.calvin import tasks, walking
from robovlms_jax.playtable.experts import blocks, cases, mechanisms, waypoints
from robovlms_jax.playtable.experts.cases import Case, Step
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.scene import BLOCKS, BOX_BODY, TABLE_TOP_M, Scene
from robovlms_jax.types import Array

TASKS = tuple(tasks.TASKS)
"""Names by task number, the order of `tasks.conditions`."""
MAX_STEPS = 360
"""CALVIN's limit for one task."""
_TRAVEL_M = 0.57  # height to travel at
_TABLE_BOX = int(np.flatnonzero(np.isin(BOX_BODY, tasks.BODIES.index("base")))[0])  # the table top
_PREFIX = 6  # waypoints of `_retreat`, which every plan begins with


def plan(scene: Scene, state: bodies.State, task: Array, key: Array) -> walking.Plan:
    """Waypoints for task number `task` (int32[], index into `TASKS`) from the given state."""
    keys = jax.random.split(key, 3)
    noise = jax.random.uniform(keys[0], (6,), minval=-1.0, maxval=1.0)
    speed = jax.random.uniform(keys[1], (), minval=0.7, maxval=1.0)
    height = _TRAVEL_M + 0.03 * jax.random.uniform(keys[2], ())
    task = jnp.asarray(task)
    family, block, side = (jnp.asarray(column)[task] for column in _TABLE)
    case = Case(scene, state, block, side, noise, height)
    drops = (state.held >= 0) & ~jnp.asarray(_KEEPS)[family]
    retreat = _stack(_retreat(case, drops))
    case = case._replace(state=jax.tree.map(lambda new, old: jnp.where(drops, new, old), _after_drop(case), state))
    branches = [lambda case, make=make: _stack(_tail(make(case))) for make in _FAMILIES.values()]
    own = jax.lax.switch(family, branches, case)
    steps = jax.tree.map(lambda *parts: jnp.concatenate(parts), retreat, own)
    # those in use first, then the last of them again and again
    count = steps.use.sum()
    order = jnp.argsort(~steps.use, stable=True)[jnp.minimum(jnp.arange(waypoints.NUM_WAYPOINTS), count - 1)]
    position, euler, gripper, wait, slow, _ = jax.tree.map(lambda x: x[order], steps)
    return walking.Plan(position, euler, gripper, wait, speed * slow)


def _stack(steps: list[Step]) -> Step:
    """One step whose fields have a leading axis."""
    dtypes = (jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.float32, bool)
    return Step(*(jnp.stack([jnp.asarray(x, dtype) for x in column]) for column, dtype in zip(zip(*steps), dtypes)))


def _tail(steps: list[Step]) -> list[Step]:
    """A skill's steps, filled up with unused ones to the length that all skills share."""
    return steps + [steps[-1]._replace(use=False)] * (waypoints.NUM_WAYPOINTS - _PREFIX - len(steps))


def _retreat(case: Case, drops: Array) -> list[Step]:
    """Up and back out of whatever the hand is in; with `drops`, put down what it holds."""
    state, height, here = case.state, case.height, case.state.target_euler
    x, y, z = state.position
    inside = y > cases.CORRIDOR_M + 0.03
    low = inside | (z < height - 0.05)
    up = cases.at(x, y, jnp.maximum(z, height))
    gripper = jnp.where(state.held >= 0, waypoints.CLOSED, state.command)
    spot, down = _free_table_spot(case), cases.angles(cases.DOWN_RAD[2])
    over, under = (cases.for_block(state, jnp.append(spot, h), down) for h in (height, TABLE_TOP_M + 0.023))
    return [
        Step(up, here, gripper, use=low),
        Step(up.at[1].set(cases.CORRIDOR_M), here, gripper, use=inside),
        Step(over, down, waypoints.CLOSED, 1, use=drops),
        Step(under, down, waypoints.CLOSED, 3, use=drops),
        Step(under, down, waypoints.OPEN, 4, use=drops),
        Step(over, down, waypoints.OPEN, use=drops),
    ]


def _after_drop(case: Case) -> bodies.State:
    """The state once the held block has been put down."""
    state = case.state
    held = jnp.arange(3) == state.held
    spot = jnp.append(_free_table_spot(case), TABLE_TOP_M + 0.02)
    rotation = rotations.from_euler(cases.angles(cases.DOWN_RAD[2])) @ state.hold_rotation
    return dataclasses.replace(
        state,
        block_position=jnp.where(held[:, None], spot, state.block_position),
        block_rotation=jnp.where(held[:, None, None], rotation, state.block_rotation),
        support=jnp.where(held, _TABLE_BOX, state.support),
        held=jnp.int32(-1),
    )


def _free_table_spot(case: Case) -> Array:
    """float32[2], x and y (m) of the starting area, far from all blocks but the held one."""
    (x0, x1), _ = case.scene.anchors.area
    xs = x0 + (x1 - x0) * jnp.linspace(0.1, 0.9, 9)
    points = jnp.stack([jnp.tile(xs, 2), jnp.repeat(jnp.array([-0.10, -0.06]), 9)], axis=-1)
    return cases.spread(points, case, jnp.arange(3) != case.state.held)


_FAMILIES: dict[str, Callable[[Case], list[Step]]] = {
    "rotate": blocks.rotate,
    "push": blocks.push,
    "slider": mechanisms.slider,
    "drawer": mechanisms.drawer,
    "lift": blocks.lift,
    "lift_shelf": blocks.lift_shelf,
    "place_shelf": blocks.place_shelf,
    "place_drawer": blocks.place_drawer,
    "stack": blocks.stack,
    "unstack": blocks.unstack,
    "lightbulb": mechanisms.lightbulb,
    "led": mechanisms.led,
    "push_into_drawer": blocks.push_into_drawer,
}
_KEEPS = np.array([name in ("place_shelf", "place_drawer", "stack") for name in _FAMILIES])
_NAMED = {
    "move_slider_left": ("slider", 1),
    "move_slider_right": ("slider", -1),
    "open_drawer": ("drawer", 1),
    "close_drawer": ("drawer", -1),
    "place_in_slider": ("place_shelf", 0),
    "place_in_drawer": ("place_drawer", 0),
    "stack_block": ("stack", 0),
    "unstack_block": ("unstack", 0),
    "turn_on_lightbulb": ("lightbulb", 1),
    "turn_off_lightbulb": ("lightbulb", -1),
    "turn_on_led": ("led", 0),
    "turn_off_led": ("led", 0),
    "push_into_drawer": ("push_into_drawer", 0),
}


def _describe(task: str) -> tuple[int, int, int]:
    """Family number, block number and side (+1 right or left, as the family says) of a task."""
    block = 0
    if task in _NAMED:
        family, side = _NAMED[task]
    else:
        verb, color, _, where = task.split("_")
        block = BLOCKS.index(color)
        family = "lift_shelf" if where == "slider" else verb
        side = {"right": 1, "left": -1}.get(where, 0)
    return list(_FAMILIES).index(family), block, side


_TABLE = np.array([_describe(task) for task in TASKS], np.int32).T
