"""The play table's mechanics: quasi-static, position based, pure functions over a `bodies.State`.

Everything is an oriented box. A control step of 1/30 s is cut into `SUBSTEPS`; in each, the hand moves a few
millimetres towards where it is told to go, then everything that overlaps is pushed apart:

* doors, drawer, button and lever slide along their joint when the hand pushes them that way;
* blocks move sideways (and turn about the vertical) away from hand, walls and each other, and ride on their support;
* the hand gives way to all that cannot move.

If something still overlaps by more than `contacts.TOLERANCE_M`, the substep is undone: so nothing ever passes through
anything. Then blocks fall until they touch, slide off what does not carry their centre, and stand up straight. A block
between closing fingers is held rigidly until they open. See docs/playtable.md for what this leaves out.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.actions import frames, rotations
from robovlms_jax.envs.calvin import initial_states, tasks
from robovlms_jax.playtable import kinematics
from robovlms_jax.playtable.mechanics import bodies, contacts, gravity, pushing, vectors
from robovlms_jax.playtable.scene import BLOCKS, BOX_BODY, BUTTON, DRAWER, SLIDER, Scene
from robovlms_jax.types import Array

RATE_HZ = 30
SUBSTEPS = 4
_LAG = 0.53  # share of the remaining way covered per step; this and the fingers' speed fit recordings of CALVIN
_MAX_TRANSLATION_M, _MAX_ROTATION_RAD = 0.025, 0.1  # per control step
_FINGER_LAG = 0.19  # per substep
_MAX_FINGER_M = 0.008  # change of width per substep
_SPRING_M = 0.004
_LED_AT_M = 0.01  # middle of the button's travel
_HOME = initial_states.INITIAL_ROBOT_OBS[7:14].astype(np.float32)


def reset(scene: Scene, robot_obs: Array, scene_obs: Array) -> bodies.State:
    """The state with the given readings: robot_obs float[15], scene_obs float[24] as CALVIN defines them.

    The bulb follows the lever, so scene_obs[4] is not read. A block between closed fingers is held after a step.
    """
    robot, table = jnp.asarray(robot_obs, jnp.float32), jnp.asarray(scene_obs, jnp.float32)
    blocks = table[6:].reshape(3, 6)[scene.block_slot]
    rotation = rotations.from_euler(robot[3:6])
    state = bodies.State(
        position=robot[:3],
        rotation=rotation,
        target_position=robot[:3],
        target_euler=robot[3:6],
        width=jnp.clip(robot[6], 0.0, bodies.OPEN_M),
        command=jnp.where(robot[14] > 0, 1.0, -1.0),
        joints=robot[7:14],
        mechanisms=jnp.clip(table[:4], 0.0, scene.joint_range),
        led=jnp.where(table[5] > 0.5, 1.0, 0.0),
        block_position=blocks[:, :3],
        block_rotation=rotations.from_euler(blocks[:, 3:]),
        block_velocity=jnp.zeros((3, 6)),
        held=jnp.int32(bodies.FREE),
        hold_position=jnp.zeros(3),
        hold_rotation=jnp.eye(3),
        support=jnp.full(3, bodies.FREE),
    )
    arm = kinematics.forward(state.joints)
    off = jnp.maximum(jnp.abs(arm.origins[7] - state.position).max(), jnp.abs(arm.rotations[7] - rotation).max())
    solved = kinematics.inverse(state.joints, state.position, rotation, iterations=40)
    state = dataclasses.replace(state, joints=jnp.where(off > 2e-3, solved, state.joints))
    falls = gravity.fall(bodies.block_boxes(scene, state), bodies.obstacles(scene, state))
    return dataclasses.replace(state, support=falls.support)


def step(scene: Scene, state: bodies.State, action: Array) -> bodies.State:
    """One control step of 1/30 s. action: float[7], relative, 1.0 = 0.02 m or 0.05 rad; [6] > 0 opens, else closes.

    All leaves may have the axis of many tables last (`step_tables`).
    """
    action = jnp.asarray(action, jnp.float32)
    before = state
    state = dataclasses.replace(
        state,
        held=jnp.where(action[6] > 0, bodies.FREE, state.held),
        target_position=state.target_position + frames.TRANSLATION_M * action[:3],
        target_euler=state.target_euler + frames.ROTATION_RAD * action[3:6],
        command=jnp.where(action[6] > 0, 1.0, -1.0),
    )
    shift = _limit(_LAG * (state.target_position - state.position), _MAX_TRANSLATION_M)
    turn = vectors.multiply(_from_euler(state.target_euler), vectors.transposed(state.rotation))
    turn = vectors.from_axis_angle(_limit(_LAG * vectors.to_axis_angle(turn), _MAX_ROTATION_RAD))
    # the arm decides what of that it can reach
    aim = state.position + shift, vectors.multiply(turn, state.rotation)
    joints = kinematics.inverse(state.joints, *aim, iterations=3, home=vectors.constant(_HOME, state.width))
    arm = kinematics.forward(joints)
    state = jax.lax.fori_loop(0, SUBSTEPS, functools.partial(_substep, scene, arm), state)
    turned = vectors.multiply(state.block_rotation, vectors.transposed(before.block_rotation, 1), 1)
    turned = vectors.to_axis_angle(turned, 1)
    velocity = jnp.concatenate([state.block_position - before.block_position, turned], axis=1) * RATE_HZ
    joints = kinematics.inverse(joints, state.position, state.rotation, iterations=4)
    return dataclasses.replace(state, joints=joints, block_velocity=velocity)


def _substep(scene: Scene, arm: kinematics.Arm, i: Array, state: bodies.State) -> bodies.State:
    """The hand goes its share of the way to where the arm brings it, and the blocks settle."""
    share = 1.0 / (SUBSTEPS - i)
    turn = vectors.to_axis_angle(vectors.multiply(arm.rotations[7], vectors.transposed(state.rotation)))
    released = jnp.maximum(state.mechanisms[BUTTON] - _SPRING_M, 0.0)
    wish = dataclasses.replace(
        state,
        position=state.position + share * _limit(arm.origins[7] - state.position, _MAX_TRANSLATION_M),
        rotation=vectors.multiply(vectors.from_axis_angle(share * turn), state.rotation),
        width=_close(state),
        mechanisms=state.mechanisms.at[BUTTON].set(released),
    )
    moved, found = pushing.push_apart(scene, state, wish)
    pressed = (state.mechanisms[BUTTON] < _LED_AT_M) & (moved.mechanisms[BUTTON] >= _LED_AT_M)
    moved = dataclasses.replace(moved, led=jnp.where(pressed, 1.0 - moved.led, moved.led))
    return gravity.settle(scene, pushing.grasp(moved, found))


def step_tables(scenes: Scene, states: bodies.State, actions: Array) -> bodies.State:
    """`step` of B tables: all leaves [B, ...]. Faster than `jax.vmap(step)`, which has the tables in the first axis."""
    last = (vectors.tables_last(x) for x in (scenes, states, actions))
    return vectors.tables_first(step(*last))


def robot_obs(state: bodies.State) -> Array:
    """float32[15] as CALVIN defines it: tool xyz (m), Euler xyz (rad), width (m), arm joints (rad), gripper command."""
    euler = rotations.to_euler(state.rotation)
    return jnp.concatenate([state.position, euler, state.width[None], state.joints, state.command[None]])


def scene_obs(scene: Scene, state: bodies.State) -> Array:
    """float32[24] as CALVIN defines it: slider, drawer, button, switch (m), bulb, LED, three blocks in scene order."""
    blocks = jnp.concatenate([state.block_position, rotations.to_euler(state.block_rotation)], axis=-1)
    order = jnp.argsort(scene.block_slot)
    return jnp.concatenate([state.mechanisms, bodies.bulb(state)[None], state.led[None], blocks[order].reshape(-1)])


def info(scene: Scene, state: bodies.State) -> tasks.SceneInfo:
    """What the task conditions read, as arrays; see `tasks.SceneInfo`."""
    rows = contacts.join(bodies.hand_boxes(state), bodies.block_boxes(scene, state))
    columns = contacts.join(bodies.columns(scene, state), bodies.hand_boxes(state))
    depth = contacts.between(rows, columns).depth
    row_body = np.array([0] * bodies.HAND + [1, 2, 3])
    column_body = np.concatenate([BOX_BODY, [1, 2, 3], [0] * bodies.HAND])
    touching = depth > -contacts.TOUCH_M
    touching &= jnp.asarray(row_body[:, None] != column_body[None])
    of_row = jnp.asarray(np.equal.outer(np.arange(1 + len(BLOCKS)), row_body))  # [4, 7]
    of_column = jnp.asarray(np.equal.outer(column_body, np.arange(len(tasks.BODIES))))  # [columns, 13]
    touched = (of_row.astype(jnp.float32) @ touching.astype(jnp.float32) @ of_column.astype(jnp.float32)) > 0
    return tasks.SceneInfo(
        slider=state.mechanisms[SLIDER],
        drawer=state.mechanisms[DRAWER],
        lightbulb=bodies.bulb(state).astype(jnp.int32),
        led=state.led.astype(jnp.int32),
        block_position=state.block_position,
        block_rotation=rotations.to_quaternion(state.block_rotation),
        block_velocity=state.block_velocity,
        contacts=touched,
    )


def _limit(vector: Array, length: float) -> Array:
    return vector * jnp.minimum(1.0, length / jnp.maximum(vectors.length(vector), 1e-9))


def _from_euler(angles: Array) -> Array:
    """[3, ...] -> [3, 3, ...]."""
    return jnp.moveaxis(rotations.from_euler(jnp.moveaxis(angles, 0, -1)), (-2, -1), (0, 1))


def _close(state: bodies.State) -> Array:
    """The width the fingers want after this substep; a held block keeps them where they are."""
    goal = jnp.where(state.command > 0, bodies.OPEN_M, 0.0)
    change = jnp.clip(_FINGER_LAG * (goal - state.width), -_MAX_FINGER_M, _MAX_FINGER_M)
    keeps = (state.held != bodies.FREE) & (state.command < 0)
    return jnp.where(keeps, state.width, state.width + change)
