"""Ray casting: where rays meet solids, and their normals there.

Rays are components (x, y, z), each float[P] or a number; lengths count along the camera's axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from robovlms_jax.playtable.pictures import solids
from robovlms_jax.types import Array

Vector = tuple[Array, Array, Array]
"""x, y and z."""


def _hit_box(o: Vector, d: Vector, half: Array) -> Array:
    near, far = -jnp.inf, jnp.inf
    for i in range(3):
        inverse = 1.0 / d[i]
        a, b = (-half[i] - o[i]) * inverse, (half[i] - o[i]) * inverse
        near, far = jnp.maximum(near, jnp.minimum(a, b)), jnp.minimum(far, jnp.maximum(a, b))
    return jnp.where((near < far) & (near > 0), near, jnp.inf)


def _hit_tube(o: Vector, d: Vector, half: Array) -> Array:
    """The endless tube of radius half[0] around z."""
    a = d[0] ** 2 + d[1] ** 2
    b = o[0] * d[0] + o[1] * d[1]
    c = o[0] ** 2 + o[1] ** 2 - half[0] ** 2
    root = b * b - a * c
    return jnp.where(root > 0, (-b - jnp.sqrt(jnp.maximum(root, 0.0))) / a, jnp.inf)


def hit_capsule(o: Vector, d: Vector, half: Array) -> Array:
    """The tube of radius half[0] and half length half[2], with a half ball on either end."""
    side = _hit_tube(o, d, half)
    z = o[2] + side * d[2]
    on_side = (jnp.abs(z) <= half[2]) & (side > 0)
    # only the cap on the side where the ray passes the middle can be hit first
    cap = jnp.where(jnp.isfinite(side), jnp.sign(z), jnp.sign(o[2])) * half[2]
    oz = o[2] - cap
    a = d[0] ** 2 + d[1] ** 2 + d[2] ** 2
    b = o[0] * d[0] + o[1] * d[1] + oz * d[2]
    c = o[0] ** 2 + o[1] ** 2 + oz**2 - half[0] ** 2
    root = b * b - a * c
    ball = (-b - jnp.sqrt(jnp.maximum(root, 0.0))) / a
    return jnp.where(on_side, side, jnp.where((root > 0) & (ball > 0), ball, jnp.inf))


def _hit_cylinder(o: Vector, d: Vector, half: Array) -> Array:
    side = _hit_tube(o, d, half)
    on_side = (jnp.abs(o[2] + side * d[2]) <= half[2]) & (side > 0)
    cap = (-jnp.sign(d[2]) * half[2] - o[2]) / d[2]
    on_cap = ((o[0] + cap * d[0]) ** 2 + (o[1] + cap * d[1]) ** 2 <= half[0] ** 2) & (cap > 0)
    return jnp.minimum(jnp.where(on_side, side, jnp.inf), jnp.where(on_cap, cap, jnp.inf))


HITS = (_hit_box, hit_capsule, _hit_cylinder)
"""Where rays meet boxes, capsules and cylinders, in each solid's own frame."""


def _local(some: solids.Solids, k: Array, origin: Vector, direction: Vector) -> tuple[Vector, Vector]:
    center, rotation = some.boxes.center[k], some.boxes.rotation[k]
    shifted = [origin[j] - center[j] for j in range(3)]
    o, d = (tuple(sum(rotation[j, i] * v[j] for j in range(3)) for i in range(3)) for v in (shifted, direction))
    return o, d


def trace(things: solids.Things, origin: Vector, direction: Vector, depth: Array) -> tuple[Array, Array]:
    """Nearest hit closer than `depth` float[P]: its distance float[P] and which solid int32[P] (-1 none)."""
    index, first = jnp.full(depth.shape, -1, jnp.int32), 0
    for some, hit in zip(things, HITS):
        if not len(some.color):
            continue

        def nearer(k, best, some=some, hit=hit, first=first):
            depth, index = best
            found = hit(*_local(some, k, origin, direction), some.boxes.half[k])
            closer = found < depth
            return jnp.where(closer, found, depth), jnp.where(closer, k + first, index)

        depth, index = jax.lax.fori_loop(0, len(some.color), nearer, (depth, index))
        first += len(some.color)
    return depth, index


def _normal_of_box(p: Vector, half: Vector) -> Vector:
    relative = [jnp.abs(p[i]) * (1.0 / jnp.maximum(half[i], 1e-6)) for i in range(3)]
    largest = jnp.maximum(jnp.maximum(relative[0], relative[1]), relative[2])
    return tuple(jnp.where(relative[i] == largest, jnp.sign(p[i]), 0.0) for i in range(3))


def _normal_of_capsule(p: Vector, half: Vector) -> Vector:
    scale = 1.0 / half[0]
    return p[0] * scale, p[1] * scale, (p[2] - jnp.clip(p[2], -half[2], half[2])) * scale


def _normal_of_cylinder(p: Vector, half: Vector) -> Vector:
    on_cap = jnp.abs(p[2]) > half[2] * (1 - 1e-3)
    side = 1.0 / half[0]
    return tuple(jnp.where(on_cap, jnp.sign(p[2]) * (i == 2), p[i] * side * (i < 2)) for i in range(3))


NORMALS = (_normal_of_box, _normal_of_capsule, _normal_of_cylinder)
"""Outward normal at local surface points, for each of `HITS`."""
