"""What is on the table and where: the state, and the boxes of hand, table and blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.playtable.mechanics import contacts, vectors
from robovlms_jax.playtable.scene import BOX_BODY, BOX_JOINT, JOINTS, SWITCH, Boxes, Scene
from robovlms_jax.types import Array

OPEN_M = 0.08
"""Width of the open gripper."""
_BULB_AT_M = 0.044  # middle of the lever's travel

# Boxes of the hand in the frame of the tool centre point (x thin, y opening, z to the tips): fingers, palm, wrist.
_HAND_CENTER = np.array([[0, 0, -0.033], [0, 0, -0.033], [0, 0, -0.111], [0, 0, -0.19]], np.float32)
HAND_HALF = np.array(
    [[0.011, 0.00875, 0.0486], [0.011, 0.00875, 0.0486], [0.022, 0.1, 0.0295], [0.045, 0.045, 0.05]], np.float32
)
"""float32[4, 3], half extents of these boxes, m."""
FINGER_SIDE = np.array([1.0, -1.0, 0.0, 0.0], np.float32)
"""On which side of the hand's middle each of its boxes lies, along the opening."""
HAND, TABLE = len(HAND_HALF), len(BOX_BODY)
"""Numbers of boxes."""
FREE = -1
"""`State.held` when the hand is empty, `State.support` when a block hangs in the air or in the hand."""
ON_JOINT = np.equal.outer(BOX_JOINT, np.arange(len(JOINTS))).astype(np.float32)
"""float32[N, 4]: 1 where a box of the table moves with a mechanism."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes. Metres, rad, world frame; float32 unless said otherwise. Inside the mechanics the axis
    of many tables comes last (`vectors`), everywhere else first.

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


def hand_boxes(state: State) -> Boxes:
    """4 boxes: fingers, palm and wrist."""
    y = vectors.constant(_HAND_CENTER[:, 1] + FINGER_SIDE * HAND_HALF[:, 1], state.width)
    y = y + vectors.constant(FINGER_SIDE, state.width) * (state.width / 2)
    x, z = (vectors.constant(_HAND_CENTER[:, k], state.width) for k in (0, 2))
    center = jnp.stack([jnp.broadcast_to(part, y.shape) for part in (x, y, z)], axis=1)
    half = jnp.broadcast_to(vectors.constant(HAND_HALF, state.width), center.shape)
    rotation = jnp.broadcast_to(state.rotation, (HAND, *state.rotation.shape))
    return Boxes(state.position + vectors.apply(state.rotation[None], center, 1), rotation, half)


def table_boxes(scene: Scene, state: State) -> Boxes:
    """`scene.table` with the mechanisms where they are now."""
    on = vectors.constant(ON_JOINT[:, :, None], state.width)
    shift = sum(on[:, j] * state.mechanisms[j] * scene.joint_axis[j] for j in range(len(JOINTS)))
    return Boxes(scene.table.center + shift, scene.table.rotation, scene.table.half)


def block_boxes(scene: Scene, state: State) -> Boxes:
    """3 boxes, in the order of `scene.BLOCKS`."""
    return Boxes(state.block_position, state.block_rotation, scene.block_half)


def columns(scene: Scene, state: State) -> Boxes:
    """N + 3 boxes: the table's and the blocks."""
    return contacts.join(table_boxes(scene, state), block_boxes(scene, state))


def rows(scene: Scene, state: State) -> Boxes:
    """7 boxes: fingers, palm, wrist and the blocks."""
    return contacts.join(hand_boxes(state), block_boxes(scene, state))


def obstacles(scene: Scene, state: State) -> Boxes:
    """N + 7 boxes: the table's, the blocks and the hand's."""
    return contacts.join(columns(scene, state), hand_boxes(state))


def bulb(state: State) -> Array:
    """float32[], 1 = lit: the lever is beyond its middle."""
    return (state.mechanisms[SWITCH] > _BULB_AT_M).astype(jnp.float32)
