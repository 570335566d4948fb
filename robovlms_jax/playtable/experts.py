"""Scripted experts for CALVIN's 34 tasks: pure functions, so that thousands of tables run in one jitted call.

`plan` turns scene, state and task into a list of waypoints once, when a task begins; `act` walks along it, closing the
loop on where the hand is. Whether a task is done is not the expert's opinion: `perform` asks `tasks.conditions`.

Plans know the table, so they stay out of its way: up, back from the cabinet, over to the goal, down. Random choices
(speed, where exactly to touch, how high to travel) come from a key; failures are for the caller to discard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import rotations
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable import physics
from robovlms_jax.playtable.scene import (
    BLOCKS,
    BOX_BODY,
    DRAWER,
    DRAWER_FLOOR_M,
    LEAN,
    SHELF_TOP_M,
    SLIDER,
    SWITCH,
    TABLE_TOP_M,
    Scene,
)
from robovlms_jax.types import Array

TASKS = tuple(tasks.TASKS)
"""Names by task number, the order of `tasks.conditions`."""

MAX_STEPS = 360
"""CALVIN's limit for one task."""

_WAYPOINTS = 20
_OPEN, _CLOSED = 1.0, -1.0
_DOWN_RAD = (3.09, -0.03, 1.5)  # hand pointing down, opening along x: the posture chains begin with
_SHELF_TILT_RAD = -0.5  # leaning back, so that the palm stays outside of the cabinet
_LEVER_TILT_RAD = -0.33
_TRAVEL_M = 0.57  # height to travel at
_CORRIDOR_M = -0.08  # y in front of everything that sticks out of the cabinet
_TIP_M = 0.0156  # fingers reach this far beyond the tool centre point
_PAIR_M, _FINGER_M = 0.0175, 0.011  # half extents of the closed fingers along the opening and across it
_GRASP_M = -0.003  # tool centre point relative to the centre of a grasped block
_PATIENCE = 12  # steps to wait for a hand that does not get to where it was sent
_NEAR_M = 0.006
_TABLE_BOX = int(np.flatnonzero(np.isin(BOX_BODY, tasks.BODIES.index("base")))[0])  # the table top
_BLOCK_SUPPORT = len(BOX_BODY)  # `State.support` of what stands on the red block; blue and pink follow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """K waypoints for the tool centre point, visited in order; the last is held.

    position: float32[K, 3], m. euler: float32[K, 3], rad. gripper: float32[K], +1 open or -1 closed.
    wait: int32[K], steps to stay before going on. speed: float32[K], share of the largest action.
    """

    position: Array
    euler: Array
    gripper: Array
    wait: Array
    speed: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an expert is: waypoint int32[], steps spent at it int32[]."""

    waypoint: Array
    waited: Array


def begin() -> Progress:
    return Progress(jnp.int32(0), jnp.int32(0))


def act(plan: Plan, progress: Progress, state: physics.State) -> tuple[Array, Progress]:
    """The next action float32[7] (column 6 exactly +1 or -1) and the progress after it."""
    k = progress.waypoint
    shift = plan.position[k] - state.target_position
    turn = jnp.mod(plan.euler[k] - state.target_euler + jnp.pi, 2 * jnp.pi) - jnp.pi
    step = jnp.concatenate([shift / physics.TRANSLATION_M, turn / physics.ROTATION_RAD])
    step = step * jnp.minimum(1.0, plan.speed[k] / jnp.maximum(jnp.abs(step).max(), 1e-6))
    action = jnp.append(step, plan.gripper[k])
    there = jnp.abs(jnp.concatenate([shift, turn])).max() < 2e-3
    near = jnp.linalg.norm(plan.position[k] - state.position) < _NEAR_M
    waited = jnp.where(there, progress.waited + 1, 0)
    go_on = there & (waited >= plan.wait[k]) & (near | (plan.wait[k] == 0) | (waited >= _PATIENCE))
    waypoint = jnp.where(go_on, jnp.minimum(k + 1, _WAYPOINTS - 1), k)
    return action, Progress(waypoint, jnp.where(go_on, 0, waited))


# ---------------------------------------------------------------------------------------------------------------------
# Running experts


class Outcome(NamedTuple):
    """state: after the task, at the first step at which it was done. done: bool[]. steps: int32[]."""

    state: physics.State
    done: Array
    steps: Array


def perform(scene: Scene, state: physics.State, task: Array, key: Array, max_steps: int = MAX_STEPS) -> Outcome:
    """Let the expert try task number `task` int32[] until it is done, at most `max_steps` steps."""
    route = plan(scene, state, task, key)
    start = physics.info(scene, state)

    def unfinished(carry):
        _, _, done, steps = carry
        return ~done & (steps < max_steps)

    def advance(carry):
        state, progress, _, steps = carry
        action, progress = act(route, progress, state)
        state = physics.step(scene, state, action)
        return state, progress, tasks.conditions(start, physics.info(scene, state))[task], steps + 1

    state, _, done, steps = jax.lax.while_loop(unfinished, advance, (state, begin(), jnp.bool_(False), jnp.int32(0)))
    return Outcome(state, done, steps)


def possible(scene: Scene, state: physics.State) -> Array:
    """bool[34] in the order of `TASKS`: which tasks make sense now, for drawing what to demonstrate next.

    Says nothing about luck: an expert may still fail, say by pushing a block against another.
    """
    slider, drawer, _, _ = state.mechanisms
    empty, lit, led = state.held < 0, physics.bulb(state) > 0, state.led > 0
    bare = ~jnp.any(state.support[:, None] == _BLOCK_SUPPORT + jnp.arange(3), axis=0)  # nothing stands on it
    open_drawer = drawer > 0.12
    reachable = {
        "table": _stands_on_table(state) & bare,
        "slider": _stands_on("shelf", state) & bare,
        "drawer": _stands_on("drawer", state) & bare & open_drawer & (state.block_position[:, 1] < -0.2),
    }
    travel = scene.joint_range
    now = {
        "move_slider_left": empty & (travel[SLIDER] - slider > 0.16),
        "move_slider_right": empty & (slider > 0.16),
        "open_drawer": empty & (travel[DRAWER] - drawer > 0.13),
        "close_drawer": empty & (drawer > 0.13),
        "place_in_slider": ~empty,
        "place_in_drawer": ~empty & open_drawer,
        "stack_block": ~empty & jnp.any(reachable["table"]),
        "unstack_block": empty & jnp.any(state.support >= _BLOCK_SUPPORT),
        "turn_on_lightbulb": empty & ~lit,
        "turn_off_lightbulb": empty & lit,
        "turn_on_led": empty & ~led,
        "turn_off_led": empty & led,
        "push_into_drawer": empty & open_drawer & jnp.any(reachable["table"]),
    }
    for i, color in enumerate(BLOCKS):
        for task in TASKS:
            verb, *words = task.split("_")
            if words[:2] == [color, "block"]:
                place = words[2] if verb == "lift" else "table"
                now[task] = empty & reachable[place][i]
    return jnp.stack([now[task] for task in TASKS])


# ---------------------------------------------------------------------------------------------------------------------
# Planning


class _Step(NamedTuple):
    """One waypoint under construction."""

    position: Array
    euler: Array
    gripper: Array | float
    wait: Array | int = 0
    slow: float = 1.0
    use: Array | bool = True
    """False = left out."""


class _Case(NamedTuple):
    """What a family of tasks may look at."""

    scene: Scene
    state: physics.State
    block: Array
    side: Array
    noise: Array
    """float32[6], uniform in [-1, 1]."""
    height: Array
    """m, to travel at."""


def plan(scene: Scene, state: physics.State, task: Array, key: Array) -> Plan:
    """Waypoints for task number `task` (int32[], index into `TASKS`) from the given state."""
    keys = jax.random.split(key, 3)
    noise = jax.random.uniform(keys[0], (6,), minval=-1.0, maxval=1.0)
    speed = jax.random.uniform(keys[1], (), minval=0.7, maxval=1.0)
    height = _TRAVEL_M + 0.03 * jax.random.uniform(keys[2], ())
    task = jnp.asarray(task)
    family, block, side = (jnp.asarray(column)[task] for column in _TABLE)
    case = _Case(scene, state, block, side, noise, height)
    drops = (state.held >= 0) & ~jnp.asarray(_KEEPS)[family]
    retreat = _stack(_retreat(case, drops))
    case = case._replace(state=jax.tree.map(lambda new, old: jnp.where(drops, new, old), _after_drop(case), state))
    branches = [lambda case, make=make: _stack(_tail(make(case))) for make in _FAMILIES.values()]
    own = jax.lax.switch(family, branches, case)
    steps = jax.tree.map(lambda *parts: jnp.concatenate(parts), retreat, own)
    # those in use first, then the last of them again and again
    count = steps.use.sum()
    order = jnp.argsort(~steps.use, stable=True)[jnp.minimum(jnp.arange(_WAYPOINTS), count - 1)]
    position, euler, gripper, wait, slow, _ = jax.tree.map(lambda x: x[order], steps)
    return Plan(position, euler, gripper, wait, speed * slow)


def _stack(steps: list[_Step]) -> _Step:
    dtypes = (jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.float32, bool)
    return _Step(*(jnp.stack([jnp.asarray(x, dtype) for x in column]) for column, dtype in zip(zip(*steps), dtypes)))


_PREFIX = 6


def _tail(steps: list[_Step]) -> list[_Step]:
    return steps + [steps[-1]._replace(use=False)] * (_WAYPOINTS - _PREFIX - len(steps))


def _retreat(case: _Case, drops: Array) -> list[_Step]:
    """Up and back out of whatever the hand is in; with `drops`, put down what it holds."""
    state, height, here = case.state, case.height, case.state.target_euler
    x, y, z = state.position
    inside = y > _CORRIDOR_M + 0.03
    low = inside | (z < height - 0.05)
    up = _at(x, y, jnp.maximum(z, height))
    gripper = jnp.where(state.held >= 0, _CLOSED, state.command)
    spot, down = _free_table_spot(case), _angles(_DOWN_RAD[2])
    over, under = (_for_block(state, jnp.append(spot, h), down) for h in (height, TABLE_TOP_M + 0.023))
    return [
        _Step(up, here, gripper, use=low),
        _Step(up.at[1].set(_CORRIDOR_M), here, gripper, use=inside),
        _Step(over, down, _CLOSED, 1, use=drops),
        _Step(under, down, _CLOSED, 3, use=drops),
        _Step(under, down, _OPEN, 4, use=drops),
        _Step(over, down, _OPEN, use=drops),
    ]


def _after_drop(case: _Case) -> physics.State:
    """The state once the held block has been put down."""
    state = case.state
    held = jnp.arange(3) == state.held
    spot = jnp.append(_free_table_spot(case), TABLE_TOP_M + 0.02)
    rotation = rotations.from_euler(_angles(_DOWN_RAD[2])) @ state.hold_rotation
    return dataclasses.replace(
        state,
        block_position=jnp.where(held[:, None], spot, state.block_position),
        block_rotation=jnp.where(held[:, None, None], rotation, state.block_rotation),
        support=jnp.where(held, _TABLE_BOX, state.support),
        held=jnp.int32(-1),
    )


def _for_block(state: physics.State, center: Array, euler: Array) -> Array:
    """Where the tool has to be, at Euler angles `euler`, for the held block's centre to be at `center`."""
    return center - rotations.from_euler(euler) @ state.hold_position


def _angles(yaw: Array | float, tilt: Array | float = _DOWN_RAD[1]) -> Array:
    return jnp.stack([jnp.asarray(angle, jnp.float32) for angle in (_DOWN_RAD[0], tilt, yaw)])


def _lean(x: Array) -> Array:
    """Tilt that lets the arm reach the far right of the table, rad."""
    return _DOWN_RAD[1] - 0.45 * jnp.clip((x - 0.26) / 0.14, 0.0, 1.0)


def _at(x, y, z) -> Array:
    return jnp.stack([jnp.asarray(v, jnp.float32) for v in (x, y, z)])


def _yaw(rotation: Array) -> Array:
    """Direction of a block's long axis, rad."""
    return jnp.arctan2(rotation[1, 0], rotation[0, 0])


def _reach_along(case: _Case, axis: int) -> Array:
    """Half extent of the case's block along a world axis, m."""
    return (jnp.abs(case.state.block_rotation[case.block, axis]) * case.scene.block_half[case.block]).sum()


def _spread(points: Array, case: _Case, others: Array) -> Array:
    """The candidate float[P, 2] farthest from the blocks marked in `others` bool[3]; the earlier one when in doubt."""
    distance = jnp.linalg.norm(points[:, None] - case.state.block_position[None, :, :2], axis=-1)
    nearest = jnp.where(others, distance, 1.0).min(-1)
    return points[jnp.argmax(jnp.minimum(nearest, 0.13) - 1e-4 * jnp.arange(len(points)))]


def _free_table_spot(case: _Case) -> Array:
    (x0, x1), _ = case.scene.anchors.area
    xs = x0 + (x1 - x0) * jnp.linspace(0.1, 0.9, 9)
    points = jnp.stack([jnp.tile(xs, 2), jnp.repeat(jnp.array([-0.10, -0.06]), 9)], axis=-1)
    return _spread(points, case, jnp.arange(3) != case.state.held)


# One function per family of tasks: the waypoints from the corridor on.


def _drawer(case: _Case) -> list[_Step]:
    """side +1: hook the bar from behind and pull; -1: push it from the front."""
    x, bar, z = case.scene.anchors.drawer_handle
    x, bar = x + 0.06 * case.noise[0], bar - case.state.mechanisms[DRAWER]
    rear, front = bar + 0.015 + _FINGER_M + 0.006, bar - 0.015 - _FINGER_M - 0.02
    opened = case.state.mechanisms[DRAWER]
    end = jnp.where(case.side > 0, rear - (0.25 - opened), front + opened + 0.03)
    y = jnp.where(case.side > 0, rear, front)
    down = _angles(_DOWN_RAD[2])
    z = z + 0.005 + 0.004 * case.noise[1]
    return [
        _Step(_at(x, y, case.height), down, _CLOSED),
        _Step(_at(x, y, z), down, _CLOSED, 2),
        _Step(_at(x, end, z), down, _CLOSED, 3, 0.7),
        _Step(_at(x, end, case.height), down, _CLOSED),
    ]


def _slider(case: _Case) -> list[_Step]:
    """side +1: push the handle to the left, from its right; -1: the other way."""
    return _slide_door(case, case.side > 0, True)


def _slide_door(case: _Case, to_left: Array, use: Array | bool) -> list[_Step]:
    x, y, z = case.scene.anchors.slider_handle
    travel, now = case.scene.joint_range[SLIDER], case.state.mechanisms[SLIDER]
    side = jnp.where(to_left, 1.0, -1.0)
    holds = case.state.held >= 0
    gap = side * (0.021 + _PAIR_M + jnp.where(holds, case.state.width / 2, 0.0))
    begin = x - now + gap + side * (0.025 + 0.008 * case.noise[0])
    end = x - jnp.where(to_left, travel + 0.012, -0.012) + gap
    down = _angles(_DOWN_RAD[2] + 0.05 * case.noise[1])
    y, z = y - 0.036, z - 0.04 + 0.008 * case.noise[2]
    return [
        _Step(_at(begin, _CORRIDOR_M, case.height), down, _CLOSED, use=use),
        _Step(_at(begin, y, z), down, _CLOSED, 2, use=use),
        _Step(_at(end, y, z), down, _CLOSED, 3, 0.8, use=use),
        _Step(_at(end + 0.5 * gap, _CORRIDOR_M, z), down, _CLOSED, use=use),
        _Step(_at(end + 0.5 * gap, _CORRIDOR_M, case.height), down, _CLOSED, use=use),
    ]


def _led(case: _Case) -> list[_Step]:
    x, y, z = case.scene.anchors.button_top
    x, y = x + 0.01 * case.noise[0], y + 0.01 * case.noise[1]
    down = _angles(_DOWN_RAD[2] + 0.1 * case.noise[2])
    return [
        _Step(_at(x, y, z + 0.06), down, _CLOSED, 1),
        _Step(_at(x, y, z + _TIP_M - 0.03), down, _CLOSED, 2, 0.6),
        _Step(_at(x, y, case.height), down, _CLOSED),
    ]


def _lightbulb(case: _Case) -> list[_Step]:
    """side +1: push the lever's bar up along the cabinet's front; -1: press it down from above."""
    at, on = case.state.mechanisms[SWITCH], case.side > 0
    lean = jnp.asarray(LEAN, jnp.float32)
    handle = case.scene.anchors.switch_handle
    far = handle[0] > 0  # at the right end of the table only a hand that leans back reaches the lever, at its near end
    x = jnp.where(far, -0.045, 0.0) + 0.025 * case.noise[0]
    bar = handle + lean * at + _at(x, 0.0, 0.0)
    yaw = jnp.where(far, 1.3, _DOWN_RAD[2]) + 0.05 * case.noise[1]
    angles = _angles(yaw, jnp.where(on, _LEVER_TILT_RAD, -0.5))
    # half extent of the bar along either direction: 0.021 m
    front, _, out = rotations.from_euler(angles).T
    below, above = bar - front * (0.021 + _FINGER_M + 0.012), bar - out * (0.021 + _TIP_M + 0.012)
    start, into = jnp.where(on, below, above), jnp.where(on, front, out)
    start = start.at[1].add(jnp.where(on, 0.0, 0.008))
    touch = start + 0.016 * into
    end = touch + lean * jnp.where(on, 0.108 - at, -0.02 - at)
    return [
        _Step(_at(start[0], _CORRIDOR_M, start[2] + 0.01), angles, _CLOSED),
        _Step(start, angles, _CLOSED, 2),
        _Step(touch, angles, _CLOSED, 0, 0.6),
        _Step(end, angles, _CLOSED, 3, 0.6),
        _Step(_at(end[0], _CORRIDOR_M, end[2] + 0.02), angles, _CLOSED),
    ]


def _push(case: _Case) -> list[_Step]:
    """side +1: to the right, from the left; -1: the other way."""
    x, y, z = case.state.block_position[case.block]
    side = case.side.astype(jnp.float32)
    begin = x - side * (_reach_along(case, 0) + _PAIR_M + 0.022)
    end = x + side * (0.10 + 0.035 - 0.02 - _PAIR_M)
    y = y + 0.003 * case.noise[0]
    down = _angles(_DOWN_RAD[2] + 0.05 * case.noise[1], _lean(jnp.maximum(begin, end)))
    return [
        _Step(_at(begin, y, case.height), down, _CLOSED),
        _Step(_at(begin, y, z), down, _CLOSED, 2),
        _Step(_at(end, y, z), down, _CLOSED, 3, 0.6),
        _Step(_at(end - side * 0.02, y, case.height), down, _CLOSED),
    ]


def _pick_yaw(case: _Case, near: Array | float) -> Array:
    """Hand yaw that takes the block across its short side, the one nearest to `near`.

    In the drawer, where the table's edge leaves no room to turn, also across a longer side that fits.
    """
    yaw = _yaw(case.state.block_rotation[case.block])
    in_drawer = case.state.block_position[case.block, 2] < 0.42
    either = case.scene.block_half[case.block, 0] < jnp.where(in_drawer, 0.03, 0.021)
    turn = jnp.where(either, jnp.pi / 2, jnp.pi)
    return near + jnp.mod(yaw - near + turn / 2, turn) - turn / 2


def _pick(
    case: _Case, yaw: Array, tilt: Array | float | None = None, higher: Array | float = 0.0
) -> tuple[list[_Step], Array]:
    """Waypoints from above a block to holding it, `higher` (m) than usual, and where the hand is then."""
    x, y, z = case.state.block_position[case.block]
    tilt = _lean(x) if tilt is None else tilt
    angles = _angles(yaw, tilt)
    # a leaning finger's lower edge reaches deeper
    at = _at(x, y + 0.003 * case.noise[0], z + _GRASP_M + higher + 0.01 * jnp.abs(tilt) + 0.002 * case.noise[1])
    over = at.at[2].set(jnp.maximum(case.height, z + 0.1))
    return [
        _Step(over, angles, _OPEN, 1),
        _Step(at, angles, _OPEN, 3, 0.8),
        _Step(at, angles, _CLOSED, 5),
    ], at


def _rotate(case: _Case) -> list[_Step]:
    """side +1: to the right (yaw shrinks). Just off the table, so that it stands free when it is let go."""
    turn = -case.side.astype(jnp.float32) * (1.3 + 0.1 * case.noise[2])
    yaw = _pick_yaw(case, _DOWN_RAD[2] - turn / 2)
    steps, at = _pick(case, yaw)
    raised = at.at[2].add(0.008)
    turned = steps[0].euler.at[2].add(turn)
    return [
        *steps,
        _Step(raised, steps[0].euler, _CLOSED, 2),
        _Step(raised, turned, _CLOSED, 3),
        _Step(raised, turned, _OPEN, 4),
        _Step(at.at[2].set(case.height), turned, _OPEN),
    ]


def _lift(case: _Case) -> list[_Step]:
    """From table or drawer, where the palm has to stay above the edge of the table."""
    in_drawer = case.state.block_position[case.block, 2] < 0.42
    steps, at = _pick(case, _pick_yaw(case, _DOWN_RAD[2]), higher=jnp.where(in_drawer, 0.008, 0.0))
    return [*steps, _Step(at.at[2].add(0.12), steps[-1].euler, _CLOSED, 3, 0.8)]


_DOOR_M = 0.143  # half the door's width; its middle is 0.01 m left of the handle
_ROOM_M = 0.062  # what an open hand needs to either side


def _door(case: _Case) -> Array:
    """x of the middle of the door, m."""
    return case.scene.anchors.slider_handle[0] - 0.01 - case.state.mechanisms[SLIDER]


def _lift_shelf(case: _Case) -> list[_Step]:
    """Moves the door aside first if it is in the way."""
    # turned further, the palm would meet the cabinet; closing fingers turn the block the rest of the way
    yaw = jnp.clip(_pick_yaw(case, jnp.pi / 2), 1.40, 1.74)
    steps, _ = _pick(case, yaw, _SHELF_TILT_RAD)
    over, angles = steps[0].position, steps[0].euler
    x = over[0]
    to_left = x > case.scene.anchors.shelf[0, 1]
    blocked = jnp.abs(x - _door(case)) < _DOOR_M + _ROOM_M
    return [
        *_slide_door(case, to_left, blocked),
        _Step(over.at[1].set(_CORRIDOR_M), angles, _OPEN, 1),
        *steps,
        _Step(over, angles, _CLOSED, 1, 0.8),
        _Step(over.at[1].set(_CORRIDOR_M), angles, _CLOSED, 2),
    ]


def _put(case: _Case, center: Array, angles: Array, *, via: list[Array]) -> list[_Step]:
    """Carry the held block along `via` (its centre) to `center`, let go, and leave the way the hand came."""
    path = [_for_block(case.state, point, angles) for point in [*via, center]]
    return [
        *(_Step(point, angles, _CLOSED, 1) for point in path[:-1]),
        _Step(path[-1], angles, _CLOSED, 3, 0.6),
        _Step(path[-1], angles, _OPEN, 4),
        *(_Step(point, angles, _OPEN, 1) for point in path[-2::-1]),
    ]


def _place_shelf(case: _Case) -> list[_Step]:
    """Into the wider of the two gaps beside the door, which is first pushed out of the way if the gap is narrow."""
    door, (left, right) = _door(case), case.scene.anchors.shelf
    into_right = right[1] - (door + _DOOR_M) > (door - _DOOR_M) - left[0]
    low, high = jnp.where(into_right, right, left)
    gap = jnp.where(into_right, right[1] - (door + _DOOR_M), (door - _DOOR_M) - left[0])
    middle, room = (low + high) / 2, (high - low) / 2 - _ROOM_M
    xs = middle + room * jnp.array([0.0, 0.3, -0.3, 0.6, -0.6, 1.0, -1.0])
    y = jnp.float32(0.09)
    held = jnp.maximum(case.state.held, 0)
    in_shelf = (case.state.block_position[:, 1] > 0.02) & (jnp.arange(3) != held)
    x, _ = _spread(jnp.stack([xs, jnp.full_like(xs, y)], -1), case, in_shelf)
    angles = _angles(_DOWN_RAD[2], _SHELF_TILT_RAD)
    rotation = rotations.from_euler(angles) @ case.state.hold_rotation
    low_point = (jnp.abs(rotation[2]) * case.scene.block_half[held]).sum()
    bottom = _at(x, y, SHELF_TOP_M + low_point + 0.004)
    over = bottom.at[2].set(0.62)
    return [
        *_slide_door(case, into_right, gap < high - low - 0.015),
        *_put(case, bottom, angles, via=[over.at[1].set(_CORRIDOR_M), over]),
    ]


def _place_drawer(case: _Case) -> list[_Step]:
    x, _, _ = case.scene.anchors.drawer_handle
    xs = x + jnp.array([0.0, 0.05, -0.05, 0.085, -0.085])
    y = -0.185 - 0.46 * case.state.mechanisms[DRAWER] + 0.01 * case.noise[0]
    held = jnp.maximum(case.state.held, 0)
    in_drawer = (case.state.block_position[:, 2] < 0.42) & (jnp.arange(3) != held)
    x, y = _spread(jnp.stack([xs, jnp.full(5, y)], -1), case, in_drawer)
    angles = _angles(_DOWN_RAD[2])
    rotation = rotations.from_euler(angles) @ case.state.hold_rotation
    low_point = (jnp.abs(rotation[2]) * case.scene.block_half[held]).sum()
    bottom = _at(x, y, DRAWER_FLOOR_M + low_point + 0.004)
    return _put(case, bottom, angles, via=[bottom.at[2].set(case.height)])


def _stands_on(body: str, state: physics.State) -> Array:
    """bool[3]"""
    return jnp.isin(state.support, np.flatnonzero(np.isin(BOX_BODY, tasks.BODIES.index(body))))


def _stands_on_table(state: physics.State) -> Array:
    """bool[3]: on the table top, not on the cabinet, which is the same body."""
    return _stands_on("base", state) & (jnp.abs(state.block_position[:, 2] - TABLE_TOP_M - 0.03) < 0.015)


def _stack_up(case: _Case) -> list[_Step]:
    """Onto the nearest block on the table."""
    state, held = case.state, jnp.maximum(case.state.held, 0)
    usable = _stands_on_table(state) & (jnp.arange(3) != held)
    distance = jnp.linalg.norm(state.block_position[:, :2] - state.position[:2], axis=-1)
    below = jnp.argmin(jnp.where(usable, distance, 10.0 + distance))
    x, y, z = state.block_position[below]
    height = (jnp.abs(state.block_rotation[:, 2]) * case.scene.block_half).sum(-1)
    angles = _angles(_DOWN_RAD[2])
    rotation = rotations.from_euler(angles) @ state.hold_rotation
    low_point = (jnp.abs(rotation[2]) * case.scene.block_half[held]).sum()
    top = _at(x, y, z + height[below] + low_point + 0.003)
    return _put(case, top, angles, via=[top.at[2].set(jnp.maximum(case.height, top[2] + 0.04))])


def _unstack(case: _Case) -> list[_Step]:
    """Push the upper block off, to where there is more room; briskly, so that it lands clear of the lower one."""
    state = case.state
    upper = jnp.argmax(state.support >= _BLOCK_SUPPORT)
    case = case._replace(block=upper)
    x, y, z = state.block_position[upper]
    landings = jnp.stack([x + jnp.array([0.08, -0.08]), jnp.full(2, y)], axis=-1)
    others = (jnp.arange(3) != upper) & (state.support[upper] != _BLOCK_SUPPORT + jnp.arange(3))
    side = jnp.where(_spread(landings, case, others)[0] > x, 1.0, -1.0)
    side = jnp.where(x + 0.1 > 0.42, -1.0, side)
    begin = x - side * (_reach_along(case, 0) + _PAIR_M + 0.022)
    end = x + side * (0.055 - _PAIR_M)
    z = z + 0.006  # fingertips above the lower block
    down = _angles(_DOWN_RAD[2], _lean(jnp.maximum(begin, end)))
    return [
        _Step(_at(begin, y, z + 0.06), down, _CLOSED),
        _Step(_at(begin, y, z), down, _CLOSED, 2),
        _Step(_at(end, y, z), down, _CLOSED, 3),
        _Step(_at(end, y, case.height), down, _CLOSED),
    ]


def _push_into_drawer(case: _Case) -> list[_Step]:
    """Over the front edge of the table: sideways first where the drawer's walls would be in the way."""
    scene, state = case.scene, case.state
    middle = scene.anchors.drawer_handle[0]
    usable = _stands_on_table(state)
    block = jnp.argmin(jnp.where(usable, jnp.abs(state.block_position[:, 0] - middle), 10.0))
    case = case._replace(block=block)
    x, y, z = state.block_position[block]
    # sideways until the block is well between the drawer's walls
    side = jnp.sign(middle - x)
    shift = jnp.maximum(jnp.abs(middle - x) - 0.08, 0.0)
    aside, reach = shift > 0.0, _reach_along(case, 0)
    beside = _at(x - side * (reach + _PAIR_M + 0.022), y, z)
    moved = _at(x + side * (shift - reach - _PAIR_M), y, z)
    off = moved - side * _at(0.02, 0.0, 0.0)
    x = x + side * shift
    behind = _at(x, y + _reach_along(case, 1) + jnp.where(aside, 0.01, 0.0) + _FINGER_M + 0.02, z)
    end = behind.at[1].set(-0.155)
    back = end.at[1].add(0.04)
    sideways, down = _angles(_DOWN_RAD[2], _lean(beside[0])), _angles(_DOWN_RAD[2], _lean(x))
    return [
        _Step(beside.at[2].set(case.height), sideways, _CLOSED, use=aside),
        _Step(beside, sideways, _CLOSED, 2, use=aside),
        _Step(moved, sideways, _CLOSED, 3, 0.6, use=aside),
        _Step(off, sideways, _CLOSED, 1, use=aside),
        _Step(off.at[2].set(case.height), sideways, _CLOSED, use=aside),
        _Step(behind.at[2].set(case.height), down, _CLOSED, 1),
        _Step(behind, down, _CLOSED, 2),
        _Step(end, down, _CLOSED, 4, 0.6),
        _Step(back, down, _CLOSED, 1),
        _Step(back.at[2].set(case.height), down, _CLOSED),
    ]


_FAMILIES: dict[str, Callable[[_Case], list[_Step]]] = {
    "rotate": _rotate,
    "push": _push,
    "slider": _slider,
    "drawer": _drawer,
    "lift": _lift,
    "lift_shelf": _lift_shelf,
    "place_shelf": _place_shelf,
    "place_drawer": _place_drawer,
    "stack": _stack_up,
    "unstack": _unstack,
    "lightbulb": _lightbulb,
    "led": _led,
    "push_into_drawer": _push_into_drawer,
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
