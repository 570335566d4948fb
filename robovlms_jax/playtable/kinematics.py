"""The Franka Panda arm: forward kinematics and damped least-squares inverse kinematics.

Rotations are matrices [..., 3, 3]; Euler angles are CALVIN's: about fixed x, then y, then z, in rad.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.types import Array

BASE = np.array([-0.34, -0.46, 0.24], np.float32)
"""Where the robot's base stands in the world, m; its axes are the world's."""

JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973], np.float32)
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973], np.float32)

TCP_FROM_FLANGE_M = 0.247
"""The tool centre point lies this far along the last joint's axis (hand with CALVIN's longer fingers)."""

# Modified Denavit-Hartenberg parameters of the manufacturer: shift a along x and d along z (m), twist in quarter turns.
_LINKS = (
    (0.0, 0.333, 0),
    (0.0, 0.0, -1),
    (0.0, 0.316, 1),
    (0.0825, 0.0, 1),
    (-0.0825, 0.384, -1),
    (0.0, 0.0, 1),
    (0.088, 0.0, 1),
)
_TWIST = np.stack([[[1, 0, 0], [0, 1 - abs(k), -k], [0, k, 1 - abs(k)]] for _, _, k in _LINKS]).astype(np.float32)
_SHIFT = np.stack([[a, -k * d, (1 - abs(k)) * d] for a, d, k in _LINKS]).astype(np.float32)
_HAND_TURN = np.array([[1, 1, 0], [-1, 1, 0], [0, 0, np.sqrt(2)]], np.float32) / np.sqrt(np.float32(2))

_DAMPING = 1e-3  # on the squared singular values
_MAX_STEP_RAD = 0.05  # per iteration; keeps the arm from leaping near singular poses
_MAX_PULL_RAD = 0.01
_CLOSE = 5e-4  # m and rad together: close enough to move on towards `home`


def to_vector(rotation: Array) -> Array:
    """`rotations.to_axis_angle`, cheaper, and wrong at half a turn: angles in [0, pi)."""
    r = rotation
    axis = jnp.stack([r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], -1) / 2
    sine = jnp.sqrt(jnp.maximum(jnp.sum(axis**2, -1), 1e-12))
    angle = jnp.arctan2(sine, (jnp.trace(r, axis1=-2, axis2=-1) - 1) / 2)
    return axis * (angle / sine)[..., None]


class Arm(NamedTuple):
    """Frames of the seven links and the tool, world. origins: float[8, 3], m. rotations: float[8, 3, 3]."""

    origins: Array
    rotations: Array


def forward(joints: Array) -> Arm:
    """Forward kinematics: joint angles float[7] (rad) -> frames of links 1 to 7 and of the tool centre point."""
    origin, rotation = jnp.asarray(BASE), jnp.eye(3)
    origins, rotations = [], []
    for i in range(7):
        origin = origin + rotation @ _SHIFT[i]
        c, s = jnp.cos(joints[i]), jnp.sin(joints[i])
        zero, one = jnp.zeros_like(c), jnp.ones_like(c)
        turn = jnp.stack([jnp.stack([c, -s, zero]), jnp.stack([s, c, zero]), jnp.stack([zero, zero, one])])
        rotation = rotation @ (_TWIST[i] @ turn)
        origins.append(origin)
        rotations.append(rotation)
    origins.append(origin + TCP_FROM_FLANGE_M * rotation[:, 2])
    rotations.append(rotation @ _HAND_TURN)
    return Arm(jnp.stack(origins), jnp.stack(rotations))


def inverse(
    joints: Array, position: Array, rotation: Array, *, iterations: int, home: Array | None = None, pull: float = 0.05
) -> Array:
    """Joint angles that bring the tool to a pose, starting from `joints`; close to it where it is out of reach.

    Levenberg-Marquardt: a step that makes things worse is dropped and tried again with more damping.

    Args:
      joints: float[7], rad. position: float[3], m. rotation: float[3, 3]. World frame.
      home: float[7], rad; where the arm's spare freedom pulls it, so that the elbow does not wander off.
      pull: share of the way home per iteration.
    """

    def error_at(joints):
        arm = forward(joints)
        error = jnp.concatenate([position - arm.origins[7], to_vector(rotation @ arm.rotations[7].T)])
        return arm, error, jnp.sqrt(jnp.sum(error**2))

    def improve(_, carry):
        joints, (arm, error, size), damping = carry
        axes = arm.rotations[:7, :, 2]
        jacobian = jnp.concatenate([jnp.cross(axes, arm.origins[7] - arm.origins[:7]), axes], axis=1).T
        gram = jacobian @ jacobian.T + damping * jnp.eye(6)
        step = jacobian.T @ _solve(gram, error)
        step = step * jnp.minimum(1.0, _MAX_STEP_RAD / jnp.maximum(jnp.abs(step).max(), 1e-9))
        if home is not None:
            spare = jnp.clip(pull * (home - joints), -_MAX_PULL_RAD, _MAX_PULL_RAD)
            step = step + spare - jacobian.T @ _solve(gram, jacobian @ spare)
        tried = jnp.clip(joints + step, JOINT_LOW, JOINT_HIGH)
        result = error_at(tried)
        better = (result[2] < size) | (result[2] < _CLOSE)
        new, old = (tried, result, jnp.float32(_DAMPING)), (joints, (arm, error, size), 10 * damping)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)

    return jax.lax.fori_loop(0, iterations, improve, (joints, error_at(joints), jnp.float32(_DAMPING)))[0]


def _solve(matrix: Array, vector: Array) -> Array:
    """Solve a symmetric positive definite 6 x 6 system by unrolled Cholesky: no library call per system."""
    size = vector.shape[0]
    lower = [[None] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i, j] - sum((lower[i][k] * lower[j][k] for k in range(j)), jnp.zeros(()))
            lower[i][j] = jnp.sqrt(rest) if i == j else rest / lower[j][j]
    y = []
    for i in range(size):
        y.append((vector[i] - sum((lower[i][k] * y[k] for k in range(i)), jnp.zeros(()))) / lower[i][i])
    x = [None] * size
    for i in reversed(range(size)):
        rest = y[i] - sum((lower[k][i] * x[k] for k in range(i + 1, size)), jnp.zeros(()))
        x[i] = rest / lower[i][i]
    return jnp.stack(x)
