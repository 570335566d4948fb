"""Skills for blocks: pushing, turning, lifting, placing, stacking; the waypoints of each task from the corridor on."""

from __future__ import annotations

import jax.numpy as jnp

from robovlms_jax.actions import rotations
from robovlms_jax.playtable.experts import cases, mechanisms, waypoints
from robovlms_jax.playtable.experts.cases import Case, Step
from robovlms_jax.playtable.scene import DRAWER, DRAWER_FLOOR_M, SHELF_TOP_M, SLIDER
from robovlms_jax.types import Array

_GRASP_M = -0.003  # tool centre point relative to the centre of a grasped block


def push(case: Case) -> list[Step]:
    """side +1: to the right, from the left; -1: the other way."""
    x, y, z = case.state.block_position[case.block]
    side = case.side.astype(jnp.float32)
    begin = x - side * (cases.reach_along(case, 0) + cases.PAIR_M + 0.022)
    end = x + side * (0.10 + 0.035 - 0.02 - cases.PAIR_M)
    y = y + 0.003 * case.noise[0]
    down = cases.angles(cases.DOWN_RAD[2] + 0.05 * case.noise[1], cases.lean(jnp.maximum(begin, end)))
    return [
        Step(cases.at(begin, y, case.height), down, waypoints.CLOSED),
        Step(cases.at(begin, y, z), down, waypoints.CLOSED, 2),
        Step(cases.at(end, y, z), down, waypoints.CLOSED, 3, 0.6),
        Step(cases.at(end - side * 0.02, y, case.height), down, waypoints.CLOSED),
    ]


def _pick_yaw(case: Case, near: Array | float) -> Array:
    """Hand yaw that takes the block across its short side, the one nearest to `near`.

    In the drawer, where the table's edge leaves no room to turn, also across a longer side that fits.
    """
    yaw = cases.yaw_of(case.state.block_rotation[case.block])
    in_drawer = case.state.block_position[case.block, 2] < 0.42
    either = case.scene.block_half[case.block, 0] < jnp.where(in_drawer, 0.03, 0.021)
    turn = jnp.where(either, jnp.pi / 2, jnp.pi)
    return near + jnp.mod(yaw - near + turn / 2, turn) - turn / 2


def _pick(
    case: Case, yaw: Array, tilt: Array | float | None = None, higher: Array | float = 0.0
) -> tuple[list[Step], Array]:
    """Waypoints from above a block to holding it, `higher` (m) than usual, and where the hand is then."""
    x, y, z = case.state.block_position[case.block]
    tilt = cases.lean(x) if tilt is None else tilt
    angles = cases.angles(yaw, tilt)
    # a leaning finger's lower edge reaches deeper
    at = cases.at(x, y + 0.003 * case.noise[0], z + _GRASP_M + higher + 0.01 * jnp.abs(tilt) + 0.002 * case.noise[1])
    over = at.at[2].set(jnp.maximum(case.height, z + 0.1))
    return [
        Step(over, angles, waypoints.OPEN, 1),
        Step(at, angles, waypoints.OPEN, 3, 0.8),
        Step(at, angles, waypoints.CLOSED, 5),
    ], at


def rotate(case: Case) -> list[Step]:
    """side +1: to the right (yaw shrinks). Just off the table, so that it stands free when it is let go."""
    turn = -case.side.astype(jnp.float32) * (1.3 + 0.1 * case.noise[2])
    yaw = _pick_yaw(case, cases.DOWN_RAD[2] - turn / 2)
    steps, at = _pick(case, yaw)
    raised = at.at[2].add(0.008)
    turned = steps[0].euler.at[2].add(turn)
    return [
        *steps,
        Step(raised, steps[0].euler, waypoints.CLOSED, 2),
        Step(raised, turned, waypoints.CLOSED, 3),
        Step(raised, turned, waypoints.OPEN, 4),
        Step(at.at[2].set(case.height), turned, waypoints.OPEN),
    ]


def lift(case: Case) -> list[Step]:
    """From table or drawer, where the palm has to stay above the edge of the table."""
    in_drawer = case.state.block_position[case.block, 2] < 0.42
    steps, at = _pick(case, _pick_yaw(case, cases.DOWN_RAD[2]), higher=jnp.where(in_drawer, 0.008, 0.0))
    return [*steps, Step(at.at[2].add(0.12), steps[-1].euler, waypoints.CLOSED, 3, 0.8)]


_DOOR_M = 0.143  # half the door's width; its middle is 0.01 m left of the handle
_ROOM_M = 0.062  # what an open hand needs to either side


def _door(case: Case) -> Array:
    """x of the middle of the door, m."""
    return case.scene.anchors.slider_handle[0] - 0.01 - case.state.mechanisms[SLIDER]


def lift_shelf(case: Case) -> list[Step]:
    """Moves the door aside first if it is in the way."""
    # turned further, the palm would meet the cabinet; closing fingers turn the block the rest of the way
    yaw = jnp.clip(_pick_yaw(case, jnp.pi / 2), 1.40, 1.74)
    steps, _ = _pick(case, yaw, cases.SHELF_TILT_RAD)
    over, angles = steps[0].position, steps[0].euler
    x = over[0]
    to_left = x > case.scene.anchors.shelf[0, 1]
    blocked = jnp.abs(x - _door(case)) < _DOOR_M + _ROOM_M
    return [
        *mechanisms.slide_door(case, to_left, blocked),
        Step(over.at[1].set(cases.CORRIDOR_M), angles, waypoints.OPEN, 1),
        *steps,
        Step(over, angles, waypoints.CLOSED, 1, 0.8),
        Step(over.at[1].set(cases.CORRIDOR_M), angles, waypoints.CLOSED, 2),
    ]


def _put(case: Case, center: Array, angles: Array, *, via: list[Array]) -> list[Step]:
    """Carry the held block along `via` (its centre) to `center`, let go, and leave the way the hand came."""
    path = [cases.for_block(case.state, point, angles) for point in [*via, center]]
    return [
        *(Step(point, angles, waypoints.CLOSED, 1) for point in path[:-1]),
        Step(path[-1], angles, waypoints.CLOSED, 3, 0.6),
        Step(path[-1], angles, waypoints.OPEN, 4),
        *(Step(point, angles, waypoints.OPEN, 1) for point in path[-2::-1]),
    ]


def place_shelf(case: Case) -> list[Step]:
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
    x, _ = cases.spread(jnp.stack([xs, jnp.full_like(xs, y)], -1), case, in_shelf)
    angles = cases.angles(cases.DOWN_RAD[2], cases.SHELF_TILT_RAD)
    rotation = rotations.from_euler(angles) @ case.state.hold_rotation
    low_point = (jnp.abs(rotation[2]) * case.scene.block_half[held]).sum()
    bottom = cases.at(x, y, SHELF_TOP_M + low_point + 0.004)
    over = bottom.at[2].set(0.62)
    return [
        *mechanisms.slide_door(case, into_right, gap < high - low - 0.015),
        *_put(case, bottom, angles, via=[over.at[1].set(cases.CORRIDOR_M), over]),
    ]


def place_drawer(case: Case) -> list[Step]:
    x, _, _ = case.scene.anchors.drawer_handle
    xs = x + jnp.array([0.0, 0.05, -0.05, 0.085, -0.085])
    y = -0.185 - 0.46 * case.state.mechanisms[DRAWER] + 0.01 * case.noise[0]
    held = jnp.maximum(case.state.held, 0)
    in_drawer = (case.state.block_position[:, 2] < 0.42) & (jnp.arange(3) != held)
    x, y = cases.spread(jnp.stack([xs, jnp.full(5, y)], -1), case, in_drawer)
    angles = cases.angles(cases.DOWN_RAD[2])
    rotation = rotations.from_euler(angles) @ case.state.hold_rotation
    low_point = (jnp.abs(rotation[2]) * case.scene.block_half[held]).sum()
    bottom = cases.at(x, y, DRAWER_FLOOR_M + low_point + 0.004)
    return _put(case, bottom, angles, via=[bottom.at[2].set(case.height)])


def stack(case: Case) -> list[Step]:
    """Onto the nearest block on the table."""
    state, held = case.state, jnp.maximum(case.state.held, 0)
    usable = cases.stands_on_table(state) & (jnp.arange(3) != held)
    distance = jnp.linalg.norm(state.block_position[:, :2] - state.position[:2], axis=-1)
    below = jnp.argmin(jnp.where(usable, distance, 10.0 + distance))
    x, y, z = state.block_position[below]
    height = (jnp.abs(state.block_rotation[:, 2]) * case.scene.block_half).sum(-1)
    angles = cases.angles(cases.DOWN_RAD[2])
    rotation = rotations.from_euler(angles) @ state.hold_rotation
    low_point = (jnp.abs(rotation[2]) * case.scene.block_half[held]).sum()
    top = cases.at(x, y, z + height[below] + low_point + 0.003)
    return _put(case, top, angles, via=[top.at[2].set(jnp.maximum(case.height, top[2] + 0.04))])


def unstack(case: Case) -> list[Step]:
    """Push the upper block off, to where there is more room; briskly, so that it lands clear of the lower one."""
    state = case.state
    upper = jnp.argmax(state.support >= cases.BLOCK_SUPPORT)
    case = case._replace(block=upper)
    x, y, z = state.block_position[upper]
    landings = jnp.stack([x + jnp.array([0.08, -0.08]), jnp.full(2, y)], axis=-1)
    others = (jnp.arange(3) != upper) & (state.support[upper] != cases.BLOCK_SUPPORT + jnp.arange(3))
    side = jnp.where(cases.spread(landings, case, others)[0] > x, 1.0, -1.0)
    side = jnp.where(x + 0.1 > 0.42, -1.0, side)
    begin = x - side * (cases.reach_along(case, 0) + cases.PAIR_M + 0.022)
    end = x + side * (0.055 - cases.PAIR_M)
    z = z + 0.006  # fingertips above the lower block
    down = cases.angles(cases.DOWN_RAD[2], cases.lean(jnp.maximum(begin, end)))
    return [
        Step(cases.at(begin, y, z + 0.06), down, waypoints.CLOSED),
        Step(cases.at(begin, y, z), down, waypoints.CLOSED, 2),
        Step(cases.at(end, y, z), down, waypoints.CLOSED, 3),
        Step(cases.at(end, y, case.height), down, waypoints.CLOSED),
    ]


def push_into_drawer(case: Case) -> list[Step]:
    """Over the front edge of the table: sideways first where the drawer's walls would be in the way."""
    scene, state = case.scene, case.state
    middle = scene.anchors.drawer_handle[0]
    usable = cases.stands_on_table(state)
    block = jnp.argmin(jnp.where(usable, jnp.abs(state.block_position[:, 0] - middle), 10.0))
    case = case._replace(block=block)
    x, y, z = state.block_position[block]
    # sideways until the block is well between the drawer's walls
    side = jnp.sign(middle - x)
    shift = jnp.maximum(jnp.abs(middle - x) - 0.08, 0.0)
    aside, reach = shift > 0.0, cases.reach_along(case, 0)
    beside = cases.at(x - side * (reach + cases.PAIR_M + 0.022), y, z)
    moved = cases.at(x + side * (shift - reach - cases.PAIR_M), y, z)
    off = moved - side * cases.at(0.02, 0.0, 0.0)
    x = x + side * shift
    z = z - 0.004
    behind = cases.at(x, y + cases.reach_along(case, 1) + jnp.where(aside, 0.01, 0.0) + cases.FINGER_M + 0.02, z)
    end = behind.at[1].set(-0.185)
    back = end.at[1].add(0.04)
    sideways, down = (
        cases.angles(cases.DOWN_RAD[2], cases.lean(beside[0])),
        cases.angles(cases.DOWN_RAD[2], cases.lean(x)),
    )
    return [
        Step(beside.at[2].set(case.height), sideways, waypoints.CLOSED, use=aside),
        Step(beside, sideways, waypoints.CLOSED, 2, use=aside),
        Step(moved, sideways, waypoints.CLOSED, 3, 0.6, use=aside),
        Step(off, sideways, waypoints.CLOSED, 1, use=aside),
        Step(off.at[2].set(case.height), sideways, waypoints.CLOSED, use=aside),
        Step(behind.at[2].set(case.height), down, waypoints.CLOSED, 1),
        Step(behind, down, waypoints.CLOSED, 2),
        Step(end, down, waypoints.CLOSED, 4, 0.6),
        Step(back, down, waypoints.CLOSED, 1),
        Step(back.at[2].set(case.height), down, waypoints.CLOSED),
    ]
