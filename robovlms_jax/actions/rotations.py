"""Rotations in every form robots and datasets use. Pure functions on NumPy or jax arrays.

Matrices [..., 3, 3] are in the middle: each other form goes to one and comes from one. Angles are rad, quaternions
(x, y, z, w) as CALVIN and PyBullet have them, axis-angle vectors turn about themselves by their length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from robovlms_jax.actions import namespaces

if TYPE_CHECKING:
    from robovlms_jax.types import Array

Order = Literal["fixed", "intrinsic"]
"""What Euler angles (x, y, z) mean. fixed: turns about the world's x, then y, then z, R = Rz Ry Rx (CALVIN, PyBullet,
ROS). intrinsic: about the body's own x, then y, then z, R = Rx Ry Rz (pytorch3d's "XYZ", which upstream uses)."""


def from_euler(angles: Array, order: Order = "fixed") -> Array:
    """Euler angles float[..., 3] -> rotation matrices float[..., 3, 3]."""
    xp = namespaces.of(angles)
    if order == "intrinsic":  # the transpose of the fixed rotation by the opposite angles
        return xp.swapaxes(from_euler(-angles), -1, -2)
    (cx, cy, cz), (sx, sy, sz) = (xp.moveaxis(f(angles), -1, 0) for f in (xp.cos, xp.sin))
    rows = (
        (cy * cz, sx * sy * cz - cx * sz, cx * sy * cz + sx * sz),
        (cy * sz, sx * sy * sz + cx * cz, cx * sy * sz - sx * cz),
        (-sy, sx * cy, cx * cy),
    )
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def to_euler(rotation: Array, order: Order = "fixed") -> Array:
    """Rotation matrices -> Euler angles float[..., 3] with y in [-pi/2, pi/2].

    At the ends of that range x and z turn about one axis, and only their sum or difference means something.
    """
    r, xp = rotation, namespaces.of(rotation)
    if order == "intrinsic":
        return -to_euler(xp.swapaxes(r, -1, -2))
    y = xp.arctan2(-r[..., 2, 0], xp.hypot(r[..., 2, 1], r[..., 2, 2]))
    angles = [xp.arctan2(r[..., 2, 1], r[..., 2, 2]), y, xp.arctan2(r[..., 1, 0], r[..., 0, 0])]
    return xp.stack(angles, axis=-1)


def from_axis_angle(vector: Array) -> Array:
    """Rotation about `vector` float[..., 3] by its length (Rodrigues)."""
    xp = namespaces.of(vector)
    angle_sq = xp.sum(vector**2, axis=-1)[..., None, None]
    angle = xp.sqrt(xp.maximum(angle_sq, 1e-12))
    x, y, z = xp.moveaxis(vector, -1, 0)
    zero = xp.zeros_like(x)
    rows = ((zero, -z, y), (z, zero, -x), (-y, x, zero))
    cross = xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)
    outer = vector[..., :, None] * vector[..., None, :]
    sinc, cosc = xp.sin(angle) / angle, (1 - xp.cos(angle)) / angle**2
    return xp.eye(3, dtype=vector.dtype) * xp.cos(angle) + sinc * cross + cosc * outer


def to_axis_angle(rotation: Array) -> Array:
    """Rotation matrices -> vectors float[..., 3] of length in [0, pi]; at pi either direction is right."""
    xp = namespaces.of(rotation)
    q = to_quaternion(rotation)
    q = xp.where(q[..., 3:] < 0, -q, q)  # of the two quaternions the one that turns the short way
    length = xp.sqrt(xp.sum(q[..., :3] ** 2, axis=-1, keepdims=True))
    angle = 2 * xp.arctan2(length, q[..., 3:])
    # as the length goes to 0, so does angle / length to 2
    return q[..., :3] * xp.where(length > 1e-7, angle / xp.maximum(length, 1e-7), 2.0)


def from_quaternion(quaternion: Array) -> Array:
    """Quaternions float[..., 4], of any length but 0 -> rotation matrices."""
    xp = namespaces.of(quaternion)
    unit = quaternion / xp.sqrt(xp.sum(quaternion**2, axis=-1, keepdims=True))
    x, y, z, w = xp.moveaxis(unit, -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def to_quaternion(rotation: Array) -> Array:
    """Rotation matrices -> unit quaternions float[..., 4], stable everywhere; the sign is arbitrary."""
    r, xp = rotation, namespaces.of(rotation)
    d = xp.stack([r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]], axis=-1)

    def off(i: int, j: int, sign: int) -> Array:
        return r[..., i, j] + sign * r[..., j, i]

    # four times the outer product of the quaternion with itself; its largest row is the best conditioned
    signs = xp.asarray([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]], dtype=d.dtype)
    square = 1 + d @ signs.T
    xy, xz, yz = off(0, 1, 1), off(0, 2, 1), off(1, 2, 1)
    xw, yw, zw = off(2, 1, -1), off(0, 2, -1), off(1, 0, -1)
    rows = [
        (square[..., 0], xy, xz, xw),
        (xy, square[..., 1], yz, yw),
        (xz, yz, square[..., 2], zw),
        (xw, yw, zw, square[..., 3]),
    ]
    table = xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)
    largest = xp.argmax(square, axis=-1)[..., None, None]
    best = xp.take_along_axis(table, largest, axis=-2)[..., 0, :]
    return best / xp.sqrt(xp.sum(best**2, axis=-1, keepdims=True))


def from_6d(values: Array) -> Array:
    """Two columns float[..., 6] of a rotation matrix, of any length and not quite at right angles -> the matrices (Zhou
    et al. 2019, arXiv:1812.07035)."""
    xp = namespaces.of(values)
    first, second = values[..., :3], values[..., 3:]
    first = first / xp.sqrt(xp.sum(first**2, axis=-1, keepdims=True))
    second = second - xp.sum(first * second, axis=-1, keepdims=True) * first
    second = second / xp.sqrt(xp.sum(second**2, axis=-1, keepdims=True))
    return xp.stack([first, second, xp.cross(first, second)], axis=-1)


def to_6d(rotation: Array) -> Array:
    """Rotation matrices -> their first two columns float[..., 6]."""
    xp = namespaces.of(rotation)
    return xp.concatenate([rotation[..., 0], rotation[..., 1]], axis=-1)


def wrap(angles: Array) -> Array:
    """The same angles in [-pi, pi]; what lies there already is unchanged."""
    xp = namespaces.of(angles)
    return angles - 2 * math.pi * xp.round(angles / (2 * math.pi))
