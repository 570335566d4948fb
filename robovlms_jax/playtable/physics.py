"""The play table's mechanics: quasi-static, position based, pure functions over a `State`.

Everything is an oriented box. A control step of 1/30 s is cut into `SUBSTEPS`; in each, the hand moves a few
millimetres towards where it is told to go, then everything that overlaps is pushed apart:

* doors, drawer, button and lever slide along their joint when the hand pushes them that way;
* blocks move sideways (and turn about the vertical) away from hand, walls and each other, and ride on their support;
* the hand gives way to all that cannot move.

If something still overlaps by more than `TOLERANCE_M`, the substep is undone: so nothing ever passes through anything.
Then blocks fall until they touch, slide off what does not carry their centre, and stand up straight. A block between
closing fingers is held rigidly until they open. See docs/playtable.md for what this leaves out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import rotations
from robovlms_jax.envs.calvin import initial_states, tasks
from robovlms_jax.playtable import kinematics
from robovlms_jax.playtable.scene import (
    BLOCKS,
    BOX_BODY,
    BOX_JOINT,
    BUTTON,
    DRAWER,
    JOINTS,
    SLIDER,
    SWITCH,
    Boxes,
    Scene,
)
from robovlms_jax.types import Array

RATE_HZ = 30
TRANSLATION_M = 0.02
ROTATION_RAD = 0.05
"""What an action of 1.0 moves the target pose by."""
OPEN_M = 0.08
"""Width of the open gripper."""
TOLERANCE_M = 1e-3
"""No two bodies ever overlap by more than this."""
TOUCH_M = 1e-3
"""Bodies closer than this are in contact."""

SUBSTEPS = 4
_SWEEPS = 6  # rounds of pushing apart per substep; in the last `_YIELDING` ones the hand gives way to blocks too
_YIELDING = 3
_LAG = 0.53  # share of the remaining way covered per step; this and the fingers' speed fit recordings of CALVIN
_MAX_TRANSLATION_M, _MAX_ROTATION_RAD = 0.025, 0.1  # per control step
_FINGER_LAG = 0.19  # per substep
_MAX_FINGER_M = 0.008  # change of width per substep
_FALL_M = 0.006  # per substep
_SLIDE_M = 0.002
_TILT_RAD = 0.06
_SPRING_M = 0.004
_FRICTION = 0.5  # between hand and blocks
_FLAT_RAD = 0.05  # faces tilted by less than this share the load between both ends of their overlap
_STEEP = 0.35  # a joint follows a push unless it is nearly at right angles to it
_LED_AT_M, _BULB_AT_M = 0.01, 0.044  # middles of travel of button and lever

# Boxes of the hand in the frame of the tool centre point (x thin, y opening, z to the tips): fingers, palm, wrist.
_HAND_CENTER = np.array([[0, 0, -0.033], [0, 0, -0.033], [0, 0, -0.111], [0, 0, -0.19]], np.float32)
HAND_HALF = np.array([[0.011, 0.00875, 0.0486], [0.011, 0.00875, 0.0486], [0.022, 0.1, 0.0295], [0.045, 0.045, 0.05]])
HAND_HALF = HAND_HALF.astype(np.float32)
_FINGER_SIDE = np.array([1.0, -1.0, 0.0, 0.0], np.float32)
_HAND, _TABLE = len(HAND_HALF), len(BOX_BODY)
_FREE = -1  # State.held when the hand is empty, State.support when a block hangs in the air or in the hand
_HOME = initial_states.INITIAL_ROBOT_OBS[7:14].astype(np.float32)
_ON_JOINT = np.equal.outer(BOX_JOINT, np.arange(len(JOINTS))).astype(np.float32)  # [N, 4]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes. Metres, rad, world frame; float32 unless said otherwise.

    position [3], rotation [3, 3]: the tool centre point; z of its frame points out of the hand, y along the opening.
    target_position [3], target_euler [3]: what actions accumulate on.
    width []: gripper opening. command []: last gripper command, +1 open or -1 closed.
    joints [7]: arm angles, consistent with the tool's pose.
    mechanisms [4]: the joints named in `scene.JOINTS`. led []: 1 = on.
    block_position [3, 3], block_rotation [3, 3, 3], block_velocity [3, 6] (m/s, rad/s), in the order of `scene.BLOCKS`.
    held: int32[], block in the hand, -1 none. hold_position [3], hold_rotation [3, 3]: its pose in the tool's frame.
    support: int32[3], what each block stands on: table box, or block (counted on after the boxes), -1 none.
    """

    position: Array
    rotation: Array
    target_position: Array
    target_euler: Array
    width: Array
    command: Array
    joints: Array
    mechanisms: Array
    led: Array
    block_position: Array
    block_rotation: Array
    block_velocity: Array
    held: Array
    hold_position: Array
    hold_rotation: Array
    support: Array


# ---------------------------------------------------------------------------------------------------------------------
# The public functions


def reset(scene: Scene, robot_obs: Array, scene_obs: Array) -> State:
    """The state with the given readings: robot_obs float[15], scene_obs float[24] as CALVIN defines them.

    The bulb follows the lever, so scene_obs[4] is not read. A block between closed fingers is held after a step.
    """
    robot, table = jnp.asarray(robot_obs, jnp.float32), jnp.asarray(scene_obs, jnp.float32)
    blocks = table[6:].reshape(3, 6)[scene.block_slot]
    rotation = rotations.from_euler(robot[3:6])
    state = State(
        position=robot[:3],
        rotation=rotation,
        target_position=robot[:3],
        target_euler=robot[3:6],
        width=jnp.clip(robot[6], 0.0, OPEN_M),
        command=jnp.where(robot[14] > 0, 1.0, -1.0),
        joints=robot[7:14],
        mechanisms=jnp.clip(table[:4], 0.0, scene.joint_range),
        led=jnp.where(table[5] > 0.5, 1.0, 0.0),
        block_position=blocks[:, :3],
        block_rotation=rotations.from_euler(blocks[:, 3:]),
        block_velocity=jnp.zeros((3, 6)),
        held=jnp.int32(_FREE),
        hold_position=jnp.zeros(3),
        hold_rotation=jnp.eye(3),
        support=jnp.full(3, _FREE),
    )
    arm = kinematics.forward(state.joints)
    off = jnp.maximum(jnp.abs(arm.origins[7] - state.position).max(), jnp.abs(arm.rotations[7] - rotation).max())
    solved = kinematics.inverse(state.joints, state.position, rotation, iterations=40)
    state = dataclasses.replace(state, joints=jnp.where(off > 2e-3, solved, state.joints))
    return dataclasses.replace(state, support=_fall(_block_boxes(scene, state), _obstacles(scene, state)).support)


def step(scene: Scene, state: State, action: Array) -> State:
    """One control step of 1/30 s. action: float[7], relative, 1.0 = 0.02 m or 0.05 rad; [6] > 0 opens, else closes."""
    action = jnp.asarray(action, jnp.float32)
    before = state
    state = dataclasses.replace(
        state,
        held=jnp.where(action[6] > 0, _FREE, state.held),
        target_position=state.target_position + TRANSLATION_M * action[:3],
        target_euler=state.target_euler + ROTATION_RAD * action[3:6],
        command=jnp.where(action[6] > 0, 1.0, -1.0),
    )
    shift = _limit(_LAG * (state.target_position - state.position), _MAX_TRANSLATION_M)
    turn = kinematics.to_vector(rotations.from_euler(state.target_euler) @ state.rotation.T)
    turn = rotations.from_axis_angle(_limit(_LAG * turn, _MAX_ROTATION_RAD))
    # the arm decides what of that it can reach
    aim = state.position + shift, turn @ state.rotation
    joints = kinematics.inverse(state.joints, *aim, iterations=3, home=jnp.asarray(_HOME))
    arm = kinematics.forward(joints)

    def substep(i, state):
        share = 1.0 / (SUBSTEPS - i)
        turn = kinematics.to_vector(arm.rotations[7] @ state.rotation.T)
        wish = dataclasses.replace(
            state,
            position=state.position + share * _limit(arm.origins[7] - state.position, _MAX_TRANSLATION_M),
            rotation=rotations.from_axis_angle(share * turn) @ state.rotation,
            width=_close(state),
            mechanisms=state.mechanisms.at[BUTTON].set(jnp.maximum(state.mechanisms[BUTTON] - _SPRING_M, 0.0)),
        )
        moved, depth = _push_apart(scene, state, wish)
        pressed = (state.mechanisms[BUTTON] < _LED_AT_M) & (moved.mechanisms[BUTTON] >= _LED_AT_M)
        moved = dataclasses.replace(moved, led=jnp.where(pressed, 1.0 - moved.led, moved.led))
        return _settle(scene, _grasp(moved, depth))

    state = jax.lax.fori_loop(0, SUBSTEPS, substep, state)
    turned = kinematics.to_vector(state.block_rotation @ jnp.swapaxes(before.block_rotation, -1, -2))
    velocity = jnp.concatenate([state.block_position - before.block_position, turned], axis=-1) * RATE_HZ
    joints = kinematics.inverse(joints, state.position, state.rotation, iterations=4)
    return dataclasses.replace(state, joints=joints, block_velocity=velocity)


def robot_obs(state: State) -> Array:
    """float32[15] as CALVIN defines it: tool xyz (m), Euler xyz (rad), width (m), arm joints (rad), gripper command."""
    euler = rotations.to_euler(state.rotation)
    return jnp.concatenate([state.position, euler, state.width[None], state.joints, state.command[None]])


def scene_obs(scene: Scene, state: State) -> Array:
    """float32[24] as CALVIN defines it: slider, drawer, button, switch (m), bulb, LED, three blocks in scene order."""
    blocks = jnp.concatenate([state.block_position, rotations.to_euler(state.block_rotation)], axis=-1)
    order = jnp.argsort(scene.block_slot)
    return jnp.concatenate([state.mechanisms, bulb(state)[None], state.led[None], blocks[order].reshape(-1)])


def info(scene: Scene, state: State) -> tasks.SceneInfo:
    """What the task conditions read, as arrays; see `tasks.SceneInfo`."""
    rows = _join(hand_boxes(state), _block_boxes(scene, state))
    columns = _join(_columns(scene, state), hand_boxes(state))
    depth = _contacts(rows, columns).depth
    row_body = np.array([0] * _HAND + [1, 2, 3])
    column_body = np.concatenate([BOX_BODY, [1, 2, 3], [0] * _HAND])
    touching = depth > -TOUCH_M
    touching &= jnp.asarray(row_body[:, None] != column_body[None])
    of_row = jnp.asarray(np.equal.outer(np.arange(1 + len(BLOCKS)), row_body))  # [4, 7]
    of_column = jnp.asarray(np.equal.outer(column_body, np.arange(len(tasks.BODIES))))  # [columns, 13]
    contacts = (of_row.astype(jnp.float32) @ touching.astype(jnp.float32) @ of_column.astype(jnp.float32)) > 0
    return tasks.SceneInfo(
        slider=state.mechanisms[SLIDER],
        drawer=state.mechanisms[DRAWER],
        lightbulb=bulb(state).astype(jnp.int32),
        led=state.led.astype(jnp.int32),
        block_position=state.block_position,
        block_rotation=rotations.to_quaternion(state.block_rotation),
        block_velocity=state.block_velocity,
        contacts=contacts,
    )


def table_boxes(scene: Scene, state: State) -> Boxes:
    """`scene.table` with the mechanisms where they are now."""
    shift = (jnp.asarray(_ON_JOINT)[:, :, None] * state.mechanisms[:, None] * scene.joint_axis).sum(1)
    return Boxes(scene.table.center + shift, scene.table.rotation, scene.table.half)


def depths(scene: Scene, state: State) -> Array:
    """float32[7, N + 3], m: how deep fingers, palm, wrist and blocks (rows) are in table boxes and blocks (columns).

    Negative = apart. Pairs that may overlap (the hand and what it holds, a block and itself) are -1.
    """
    return _masked(state, _contacts(_rows(scene, state), _columns(scene, state)).depth)


def bulb(state: State) -> Array:
    return (state.mechanisms[SWITCH] > _BULB_AT_M).astype(jnp.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


def _join(*boxes: Boxes) -> Boxes:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *boxes)


def hand_boxes(state: State) -> Boxes:
    center = jnp.asarray(_HAND_CENTER).at[:, 1].add(_FINGER_SIDE * (state.width / 2 + HAND_HALF[:, 1]))
    rotation = jnp.broadcast_to(state.rotation, (_HAND, 3, 3))
    return Boxes(state.position + _apply(state.rotation, center), rotation, jnp.asarray(HAND_HALF))


def _block_boxes(scene: Scene, state: State) -> Boxes:
    return Boxes(state.block_position, state.block_rotation, scene.block_half)


def _columns(scene: Scene, state: State) -> Boxes:
    return _join(table_boxes(scene, state), _block_boxes(scene, state))


def _rows(scene: Scene, state: State) -> Boxes:
    return _join(hand_boxes(state), _block_boxes(scene, state))


def _obstacles(scene: Scene, state: State) -> Boxes:
    return _join(_columns(scene, state), hand_boxes(state))


def _apply(rotation: Array, vectors: Array) -> Array:
    """rotation [..., 3, 3] times vectors [..., 3], as a sum XLA fuses (a dot of this size would be a library call)."""
    return (rotation * vectors[..., None, :]).sum(-1)


def _limit(vector: Array, length: float) -> Array:
    return vector * jnp.minimum(1.0, length / jnp.maximum(jnp.linalg.norm(vector), 1e-9))


class _Axes(NamedTuple):
    """M rows against N columns, seen along six directions: the face normals of each row, then of each column.

    Six entries each. vectors: unit vectors, three components that broadcast to [M, N]. offset: float[M, N], row centre
    minus column centre. row_reach, column_reach: float[M, N], half extents.
    """

    vectors: list[list[Array]]
    offset: list[Array]
    row_reach: list[Array]
    column_reach: list[Array]


def _axes(rows: Boxes, columns: Boxes) -> _Axes:
    """Edge-edge axes are left out: boxes standing upright do not need them, tilted ones touch a little early without.

    The arithmetic is spelled out in components of shape [M, N], so that XLA vectorises it over pairs; barriers, here
    and in `_contacts`, keep XLA from repeating it in each of its many consumers.
    """
    three = range(3)
    shape = (rows.center.shape[0], columns.center.shape[0])
    row = [[rows.rotation[:, k, i, None] for k in three] for i in three]  # row[i][k]: component k of axis i
    column = [[columns.rotation[None, :, k, j] for k in three] for j in three]
    row_half = [jnp.broadcast_to(rows.half[:, i, None], shape) for i in three]
    column_half = [jnp.broadcast_to(columns.half[None, :, j], shape) for j in three]
    between = [rows.center[:, k, None] - columns.center[None, :, k] for k in three]
    cosine = [[jnp.abs(sum(row[i][k] * column[j][k] for k in three)) for j in three] for i in three]
    offset = [sum(axis[k] * between[k] for k in three) for axis in row + column]
    row_reach = row_half + [sum(cosine[i][j] * row_half[i] for i in three) for j in three]
    column_reach = [sum(cosine[i][j] * column_half[j] for j in three) for i in three] + column_half
    return _Axes(row + column, *jax.lax.optimization_barrier((offset, row_reach, column_reach)))


class _Contacts(NamedTuple):
    """depth: float[M, N], m, negative = apart. normal: three components float[M, N] of the unit vector from column to
    row. point: x and y float[M, N] (m) of where they touch."""

    depth: Array
    normal: list[Array]
    point: list[Array]


def _contacts(rows: Boxes, columns: Boxes) -> _Contacts:
    axes = _axes(rows, columns)
    overlap = [a + b - jnp.abs(c) for a, b, c in zip(axes.row_reach, axes.column_reach, axes.offset)]
    depth = jax.lax.optimization_barrier(functools.reduce(jnp.minimum, overlap))
    normal = [0.0, 0.0, 0.0]
    for size, offset, vector in zip(overlap, axes.offset, axes.vectors):
        sign = jnp.where(offset < 0, -1.0, 1.0)
        normal = [jnp.where(size == depth, sign * v, n) for v, n in zip(vector, normal)]
    # where: in the row's frame, where the column counts with its bounding box; the middle of the overlap when faces lie
    # flat on each other, its deeper end when they are tilted, which is what turns a pushed block flat to the finger
    low = [jnp.maximum(-a, -c - b) for a, b, c in zip(axes.row_reach, axes.column_reach, axes.offset)]
    high = [jnp.minimum(a, -c + b) for a, b, c in zip(axes.row_reach, axes.column_reach, axes.offset)]
    tilt = [sum(n * v for n, v in zip(normal, vector)) / _FLAT_RAD for vector in axes.vectors[:3]]
    place = [(low[i] + high[i] - (high[i] - low[i]) * jnp.clip(tilt[i], -1.0, 1.0)) / 2 for i in range(3)]
    point = [rows.center[:, k, None] + sum(place[i] * axes.vectors[i][k] for i in range(3)) for k in range(2)]
    return _Contacts(depth, *jax.lax.optimization_barrier((normal, point)))


# ---------------------------------------------------------------------------------------------------------------------
# Hand, mechanisms and blocks push each other apart


def _masked(state: State, depth: Array) -> Array:
    """`depth` [7, N + 3] with -1 for pairs that may overlap: a block and itself, the hand and the block it holds."""
    same = np.zeros((_HAND + 3, _TABLE + 3), bool)
    same[_HAND:, _TABLE:] = np.eye(3, dtype=bool)
    held = jnp.arange(3) == state.held
    in_hand = jnp.zeros_like(jnp.asarray(same)).at[:_HAND, _TABLE:].set(held[None])
    return jnp.where(jnp.asarray(same) | in_hand, -1.0, depth)


def _close(state: State) -> Array:
    """The width the fingers want after this substep; a held block keeps them where they are."""
    goal = jnp.where(state.command > 0, OPEN_M, 0.0)
    change = jnp.clip(_FINGER_LAG * (goal - state.width), -_MAX_FINGER_M, _MAX_FINGER_M)
    keeps = (state.held != _FREE) & (state.command < 0)
    return jnp.where(keeps, state.width, state.width + change)


def _with_held(state: State) -> State:
    """Moves the held block along with the hand."""
    held = (jnp.arange(3) == state.held)[:, None]
    position = state.position + _apply(state.rotation, state.hold_position)
    rotation = state.rotation @ state.hold_rotation
    return dataclasses.replace(
        state,
        block_position=jnp.where(held, position, state.block_position),
        block_rotation=jnp.where(held[..., None], rotation, state.block_rotation),
    )


def _push_apart(scene: Scene, old: State, wish: State) -> tuple[State, Array]:
    """Resolve the overlaps that moving the hand from `old` to `wish` makes; `old` again where that fails.

    Returns the state and its `depths`.
    """
    way = (wish.position - old.position)[:2]
    way = way / jnp.maximum(jnp.linalg.norm(way), 1e-6)
    least, most = jnp.minimum(old.width, wish.width), jnp.maximum(old.width, wish.width)

    # One loop, so that XLA compiles the contacts once: round 0 looks at `old`, the last one only at the result.
    def sweep(i, carry):
        state, ridden, before, _ = carry
        state, ridden = _ride(scene, _with_held(state), ridden)
        contacts = _contacts(_rows(scene, state), _columns(scene, state))
        depth = _masked(state, contacts.depth)
        opening = _push_fingers(state, contacts._replace(depth=depth))
        contacts = contacts._replace(depth=jnp.maximum(depth, 0.0))
        mechanisms, left = _push_mechanisms(scene, state, contacts)
        position, rotation = _push_blocks(scene, state, contacts, way)
        shift = _push_hand(state, contacts._replace(depth=left), i > _SWEEPS - _YIELDING)
        pushed = dataclasses.replace(
            state,
            position=state.position + shift,
            width=jnp.clip(state.width + opening, least, most),
            mechanisms=mechanisms,
            block_position=position,
            block_rotation=rotation,
        )
        following = jax.tree.map(
            lambda first, middle, last: jnp.where(i == 0, first, jnp.where(i <= _SWEEPS, middle, last)),
            wish,
            pushed,
            state,
        )
        return following, ridden, jnp.where(i == 0, depth, before), depth

    nothing = jnp.full((_HAND + 3, _TABLE + 3), -1.0)
    carry = (old, _columns(scene, old).center, nothing, nothing)
    new, _, before, depth = jax.lax.fori_loop(0, _SWEEPS + 2, sweep, carry)
    fits = jnp.all(depth <= jnp.maximum(before, TOLERANCE_M))
    return jax.tree.map(lambda a, b: jnp.where(fits, a, b), (new, depth), (old, before))


def _ride(scene: Scene, state: State, ridden: Array) -> tuple[State, Array]:
    """Blocks follow what they stand on. ridden: float[N + 3, 3], where everything was when they last did."""
    free = state.held != jnp.arange(3)
    rides = (state.support != _FREE) & free
    now = _columns(scene, state).center
    shift = jnp.where(rides[:, None], (now - ridden)[state.support], 0.0)
    # a block on a block on the moving thing: pass the shift on once more
    below = state.support - _TABLE
    shift = shift + jnp.where((rides & (below >= 0))[:, None], shift[jnp.maximum(below, 0)], 0.0)
    state = dataclasses.replace(state, block_position=state.block_position + shift)
    return state, _columns(scene, state).center


def _driven(state: State) -> Array:
    """bool[7]: rows that move as the hand commands: the hand and what it holds."""
    return jnp.concatenate([jnp.ones(_HAND, bool), jnp.arange(3) == state.held])


def _push_mechanisms(scene: Scene, state: State, contacts: _Contacts) -> tuple[Array, Array]:
    """New joint values float[4], and the depth [7, N + 3] that is left for the hand to resolve (0 in other rows)."""
    pushing = jnp.where(_driven(state)[:, None], contacts.depth, 0.0)
    axis = (jnp.asarray(_ON_JOINT)[:, :, None] * scene.joint_axis).sum(1)  # [N, 3]
    along = -sum(contacts.normal[k][:, :_TABLE] * axis[:, k] for k in range(3))
    follows = jnp.abs(along) > _STEEP
    wanted = jnp.where(follows, pushing[:, :_TABLE] / jnp.where(follows, along, 1.0), 0.0)
    change = (wanted.max(0)[:, None] * _ON_JOINT).max(0) + (wanted.min(0)[:, None] * _ON_JOINT).min(0)
    mechanisms = jnp.clip(state.mechanisms + change, 0.0, scene.joint_range)
    gained = along * (jnp.asarray(_ON_JOINT) * (mechanisms - state.mechanisms)).sum(-1)
    left = pushing[:, :_TABLE] - jnp.where(follows & (pushing[:, :_TABLE] > 0), gained, 0.0)
    return mechanisms, jnp.concatenate([jnp.maximum(left, 0.0), pushing[:, _TABLE:]], axis=1)


def _push_blocks(scene: Scene, state: State, contacts: _Contacts, way: Array) -> tuple[Array, Array]:
    """New block positions [3, 3] and rotations [3, 3, 3]: the average push, weighted by depth.

    way: float[2], horizontal direction in which the hand moves; friction lets a block follow it along the contact.
    """
    free = state.held != jnp.arange(3)
    share = jnp.concatenate([jnp.ones(_TABLE), jnp.where(free, 0.5, 1.0)])

    # by walls and other blocks (row = the block), then by the hand (column = the block)
    def merge(own, hand):
        return jnp.concatenate([own[_HAND:], hand[:_HAND, _TABLE:].T], axis=1)

    depth = merge(contacts.depth * share, contacts.depth)
    x, y, z = (merge(n, -n) for n in contacts.normal)
    point = [merge(p, p) for p in contacts.point]
    turns = np.concatenate([np.zeros(_TABLE), np.ones(3 + _HAND)]).astype(np.float32)  # walls stop, but do not turn
    by_hand = np.concatenate([np.zeros(_TABLE + 3), np.ones(_HAND)]).astype(np.float32)

    flat = jnp.sqrt(x**2 + y**2)
    sideways = flat >= 0.5
    up = ~sideways & (z > 0)  # nothing pushes a block down: it already lies on something
    steep = jnp.maximum(flat, 0.5)
    x, y, distance = x / steep, y / steep, jnp.where(sideways, depth / steep, 0.0)
    forward, aside = x * way[0] + y * way[1], x * way[1] - y * way[0]
    slip = by_hand * jnp.clip(aside / jnp.maximum(forward, 0.1), -_FRICTION, _FRICTION)
    x, y = x - slip * y, y + slip * x
    # Quasi-static sliding: force and moment limits form an ellipsoid (Goyal et al. 1991), here with the moment arm
    # `radius` of a uniformly loaded face, so a push beside the centre turns the block as it shifts it.
    arm_x, arm_y = point[0] - state.block_position[:, 0, None], point[1] - state.block_position[:, 1, None]
    lever = turns * (arm_x * y - arm_y * x)
    vertical = _apply(jnp.abs(state.block_rotation), scene.block_half)[:, 2]
    radius_sq = ((scene.block_half**2).sum(-1) - vertical**2)[:, None] / 3
    give = distance * radius_sq / (radius_sq + lever**2)
    weight = jnp.where(sideways | up, depth, 0.0)
    weight = weight / jnp.maximum(weight.sum(1, keepdims=True), 1e-9)
    push = (x * give, y * give, jnp.where(up, depth, 0.0), give * lever / radius_sq)
    *shift, yaw = ((weight * amount).sum(1) for amount in push)
    shift = jnp.stack(shift, axis=-1)
    shift, yaw = jnp.where(free[:, None], shift, 0.0), jnp.where(free, yaw, 0.0)
    turn = rotations.from_axis_angle(jnp.stack([jnp.zeros(3), jnp.zeros(3), yaw], axis=-1))
    return state.block_position + shift, turn @ state.block_rotation


def _push_hand(state: State, contacts: _Contacts, yields: Array) -> Array:
    """How far the hand has to move [3]. yields: True = blocks that did not move away stop the hand."""
    free = state.held != jnp.arange(3)
    pressed = contacts.normal[2][:, _TABLE:] > 0.866  # the block is below and cannot sink
    blocks = jnp.where((yields | pressed) & free, contacts.depth[:, _TABLE:], 0.0)
    depth = jnp.concatenate([contacts.depth[:, :_TABLE], blocks], axis=1)
    return jnp.stack([(depth**2 * n).sum() for n in contacts.normal]) / jnp.maximum(depth.sum(), 1e-9)


def _push_fingers(state: State, contacts: _Contacts) -> Array:
    """How far the fingers have to open (+) because both press on one thing between them, or close (-) because both
    press on things outside. A single finger does not give way: the hand shifts, or the thing. Depths are signed here.
    """
    outwards = sum(contacts.normal[k][:2] * state.rotation[k, 1] for k in range(3)) * _FINGER_SIDE[:2, None]
    inside = jnp.where(outwards > 0.5, contacts.depth[:2], -1.0).sum(0).max()
    outside = jnp.where(outwards < -0.5, contacts.depth[:2], -1.0).max(1).sum()
    return jnp.maximum(inside, 0.0) - jnp.maximum(outside, 0.0)


def _grasp(state: State, depth: Array) -> State:
    """Take hold of a block that both fingers touch while they close."""
    between = _apply(jnp.swapaxes(state.rotation, 0, 1), state.block_position - state.position)  # [3, 3], tool frame
    touch = jnp.all(depth[:2, _TABLE:] > -TOUCH_M, axis=0) & (jnp.abs(between[:, 1]) < state.width / 2)
    candidate = jnp.argmax(touch)
    takes = touch.any() & (state.held == _FREE) & (state.command < 0)
    return dataclasses.replace(
        state,
        held=jnp.where(takes, candidate.astype(jnp.int32), state.held),
        hold_position=jnp.where(takes, between[candidate], state.hold_position),
        hold_rotation=jnp.where(takes, state.rotation.T @ state.block_rotation[candidate], state.hold_rotation),
        support=jnp.where(takes & (jnp.arange(3) == candidate), _FREE, state.support),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Gravity


class _Falls(NamedTuple):
    """What is under the blocks.

    way: float[3, K], m to fall until each of the K obstacles is met, inf = never. drop: float[3], the least of it.
    support: int32[3], what carries the block already, -1 nothing (or the hand). stands: bool[3], its centre is carried.
    """

    way: Array
    drop: Array
    support: Array
    stands: Array


def _fall(blocks: Boxes, obstacles: Boxes) -> _Falls:
    axes = _axes(blocks, obstacles)
    way = jnp.where(_own(obstacles), jnp.inf, _way_down(axes))
    height = _apply(jnp.abs(blocks.rotation), blocks.half)[:, 2]
    below_center = _way_down(axes._replace(row_reach=[jnp.zeros_like(reach) for reach in axes.row_reach]))
    touched = way < TOUCH_M
    carries = touched & (below_center < (height + 3 * TOUCH_M)[:, None])
    lowest = jnp.argmin(jnp.where(carries, way - 1.0, way), axis=1)
    on = touched.any(1) & (lowest < _TABLE + 3)
    return _Falls(way, way.min(1), jnp.where(on, lowest, _FREE).astype(jnp.int32), carries.any(1))


def _own(obstacles: Boxes) -> Array:
    """bool[3, K], True where the obstacle is the block itself."""
    return jnp.asarray(np.eye(3, obstacles.center.shape[0], _TABLE, dtype=bool))


def _way_down(axes: _Axes) -> Array:
    """float[M, N], m: how far each row can fall before it meets each column; inf = never."""
    reach = [a + b for a, b in zip(axes.row_reach, axes.column_reach)]
    enter, leave = -jnp.inf, jnp.inf
    for i, (_, _, slope) in enumerate(axes.vectors):
        # bodies that merely lean on each other sideways, within tolerance, do not hold each other up
        limit = reach[i] - jnp.where(jnp.abs(slope) < 0.5, TOLERANCE_M, 0.0)
        level = jnp.abs(slope) < 1e-4
        safe = jnp.where(level, 1.0, slope)
        first, second = (axes.offset[i] - limit) / safe, (axes.offset[i] + limit) / safe
        never = jnp.where(jnp.abs(axes.offset[i]) < limit, -jnp.inf, jnp.inf)
        enter = jnp.maximum(enter, jnp.where(level, never, jnp.minimum(first, second)))
        leave = jnp.minimum(leave, jnp.where(level, -never, jnp.maximum(first, second)))
    meets = (enter < leave) & (leave > TOLERANCE_M)
    return jnp.where(meets, jnp.maximum(enter, 0.0), jnp.inf)


def _settle(scene: Scene, state: State) -> State:
    """Blocks that are not held fall, slide off what does not carry their centre, and stand up straight."""
    free = state.held != jnp.arange(3)
    blocks, obstacles = _block_boxes(scene, state), _obstacles(scene, state)
    falls = _fall(blocks, obstacles)
    fall = jnp.where(free, jnp.minimum(falls.drop, _FALL_M), 0.0)
    fallen = state.block_position.at[:, 2].add(-fall)

    # off an edge: away from the nearest points of all that touches from below
    between = state.block_position[:, None] - obstacles.center
    inside = jnp.clip(_apply(jnp.swapaxes(obstacles.rotation, -1, -2), between), -obstacles.half, obstacles.half)
    away = (between - _apply(obstacles.rotation, inside))[..., :2]
    away = away / jnp.maximum(jnp.linalg.norm(away, axis=-1, keepdims=True), 1e-6)
    under = falls.way < TOUCH_M
    away = (away * under[..., None]).sum(1)
    away = away / jnp.maximum(jnp.linalg.norm(away, axis=-1, keepdims=True), 1.0)
    slips = free & under.any(1) & ~falls.stands
    slid = fallen.at[:, :2].add(jnp.where(slips[:, None], _SLIDE_M * away, 0.0))

    # stand up: turn the most vertical axis upright, keeping the lowest point where it is
    rotation = state.block_rotation
    most = jnp.argmax(jnp.abs(rotation[:, 2]), axis=-1)
    axis = jnp.take_along_axis(rotation, most[:, None, None], axis=2)[..., 0]
    axis = axis * jnp.where(axis[:, 2:] < 0, -1.0, 1.0)
    lean = jnp.cross(axis, jnp.array([0.0, 0.0, 1.0]))
    lean = lean * jnp.minimum(1.0, _TILT_RAD / jnp.maximum(jnp.linalg.norm(lean, axis=-1, keepdims=True), 1e-9))
    upright = rotations.from_axis_angle(lean * free[:, None]) @ rotation
    height, new_height = (_apply(jnp.abs(r), scene.block_half)[:, 2] for r in (rotation, upright))
    moved = slid.at[:, 2].add(new_height - height)

    # whichever of the others move or stay, the moved block must fit
    trial = Boxes(moved, upright, scene.block_half)
    others = dataclasses.replace(obstacles, center=obstacles.center.at[_TABLE : _TABLE + 3].set(fallen))
    own = jnp.concatenate([_own(others), jnp.eye(3, dtype=bool)], axis=1)
    fits = jnp.all(own | (_contacts(trial, _join(others, trial)).depth <= TOLERANCE_M), axis=1) & free
    return dataclasses.replace(
        state,
        block_position=jnp.where(fits[:, None], moved, fallen),
        block_rotation=jnp.where(fits[:, None, None], upright, rotation),
        support=jnp.where(free, falls.support, _FREE),
    )
