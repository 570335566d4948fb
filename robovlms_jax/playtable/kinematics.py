"""The Franka Panda arm: forward kinematics and damped least-squares inverse kinematics.

Rotations are matrices [..., 3, 3]; Euler angles are CALVIN's: about fixed x, then y, then z, in rad.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.playtable.mechanics import vectors
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


class Arm(NamedTuple):
    """Frames of the seven links and the tool, world. origins: float[8, 3], m. rotations: float[8, 3, 3]."""

    origins: Array
    rotations: Array


def forward(joints: Array) -> Arm:
    """Forward kinematics: joint angles float[7] (rad) -> frames of links 1 to 7 and of the tool centre point. Behind
    these axes there may be one of many tables, here and in `inverse`."""
    return Arm(*(jnp.stack(frames) for frames in _frames(joints)))


def _frames(joints: Array) -> tuple[list[Array], list[Array]]:
    """Origins [3] and rotations [3, 3] of `forward`."""
    c, s = jnp.cos(joints), jnp.sin(joints)
    zero, one = jnp.zeros_like(c), jnp.ones_like(c)
    turn = jnp.stack([jnp.stack([c, -s, zero], 1), jnp.stack([s, c, zero], 1), jnp.stack([zero, zero, one], 1)], 1)
    links = vectors.multiply(vectors.constant(_TWIST, c[0]), turn, 1)
    origin, rotation = vectors.constant(BASE, c[0]), vectors.constant(np.eye(3, dtype=np.float32), c[0])
    origins, rotations = [], []
    for i in range(7):
        origin = origin + vectors.apply(rotation, vectors.constant(_SHIFT[i], c[0]))
        # a kernel of its own each: fused, the last one would compute the first many times
        rotation = jax.lax.optimization_barrier(vectors.multiply(rotation, links[i]))
        origins.append(jnp.broadcast_to(origin, rotation[0].shape))
        rotations.append(rotation)
    origins.append(origin + TCP_FROM_FLANGE_M * rotation[:, 2])
    rotations.append(vectors.multiply(rotation, vectors.constant(_HAND_TURN, c[0])))
    return origins, rotations


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

    def look(joints: Array) -> tuple[Array, Array, Array]:
        """The Jacobian [6, 7], the error [6] (m, rad) and its length."""
        origins, rotations = _frames(joints)
        axes, arms = [frame[:, 2] for frame in rotations[:7]], [origins[7] - origin for origin in origins[:7]]
        columns = [jnp.stack([*_cross(axis, arm), *axis]) for axis, arm in zip(axes, arms, strict=True)]
        off = vectors.to_axis_angle(vectors.multiply(rotation, vectors.transposed(rotations[7])))
        error = jnp.concatenate([position - origins[7], off])
        return jnp.stack(columns, axis=1), error, vectors.length(error)

    # Round 0 only looks: one loop, so that XLA compiles the arm once.
    def improve(i: Array, carry: tuple) -> tuple:
        joints, (jacobian, error, size), damping = carry
        wanted, spare = [error], None
        if home is not None:
            spare = jnp.clip(pull * (home - joints), -_MAX_PULL_RAD, _MAX_PULL_RAD)
            wanted.append(sum(jacobian[:, i] * spare[i] for i in range(7)))
        gram = sum(jacobian[:, None, i] * jacobian[None, :, i] for i in range(7))
        gram = gram + damping * vectors.constant(np.eye(6, dtype=np.float32), damping)
        steps = [sum(jacobian[k] * solved[k] for k in range(6)) for solved in _solve(gram, wanted)]
        step = steps[0]
        step = step * jnp.minimum(1.0, _MAX_STEP_RAD / jnp.maximum(vectors.fold(jnp.maximum, jnp.abs(step)), 1e-9))
        if spare is not None:
            step = step + spare - steps[1]
        tried = jnp.clip(joints + jnp.where(i == 0, 0.0, step), low, high)
        result = look(tried)
        better = (result[2] < size) | (result[2] < _CLOSE)
        new, old = (tried, result, jnp.full_like(damping, _DAMPING)), (joints, carry[1], 10 * damping)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)

    low, high = vectors.constant(JOINT_LOW, joints[0]), vectors.constant(JOINT_HIGH, joints[0])
    nothing = jnp.zeros((6, *joints.shape)), jnp.zeros((6, *joints.shape[1:])), jnp.full_like(joints[0], jnp.inf)
    begin = (joints, nothing, jnp.full_like(joints[0], _DAMPING))
    return jax.lax.fori_loop(0, iterations + 1, improve, begin)[0]


def _cross(a: Array, b: Array) -> list[Array]:
    return [a[i] * b[j] - a[j] * b[i] for i, j in ((1, 2), (2, 0), (0, 1))]


def _solve(matrix: Array, wanted: list[Array]) -> list[Array]:
    """Solve symmetric positive definite systems [6, 6] for some right sides [6], by elimination without pivots: six
    kernels, no library call per system."""
    size = matrix.shape[0]
    rows = jnp.concatenate([matrix, jnp.stack(wanted, axis=1)], axis=1)
    for k in range(size):
        pivot = rows[k] / rows[k, k]
        others = vectors.constant(1 - np.eye(size, dtype=np.float32)[:, k : k + 1], rows[0, 0])
        own = vectors.constant(np.eye(size, dtype=np.float32)[:, k : k + 1], rows[0, 0])
        rows = jax.lax.optimization_barrier(others * (rows - rows[:, k : k + 1] * pivot) + own * pivot)
    return [rows[:, size + i] for i in range(len(wanted))]
