"""Colours: light, the grain of wood, the chequered floor."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from robovlms_jax.playtable.pictures import rays, solids
from robovlms_jax.playtable.scene import Scene
from robovlms_jax.types import Array

AMBIENT, DIFFUSE = 0.6, 0.378  # with the light below: as CALVIN's renderer shades tops and fronts
LIGHT = np.array([-0.38, 0.25, 0.89], np.float32)
LIGHT /= np.linalg.norm(LIGHT)
_FLOOR_COLORS = np.array([[0.815], [0.937]], np.float32)
_CHECK_M = 0.5
_GRAIN_PER_M, _GRAIN_CELLS = 150.0, 64
_FAR_M = 50.0


def light_of(scene: Scene) -> Array | np.ndarray:
    """float32[3], unit vector towards the light."""
    return LIGHT if scene.appearance is None else scene.appearance.light


def grain(texture: Array, wood: Array, p: rays.Vector, n: rays.Vector) -> Array:
    """Brightness of wood at local surface points of a `Scene.grain`: it runs along x of a box (along y on its ends)."""
    along = jnp.where(jnp.abs(n[0]) > 0.5, p[1], p[0])
    across = jnp.where(jnp.abs(n[2]) > 0.5, p[1], p[2])
    cells = (jnp.floor(v * _GRAIN_PER_M).astype(jnp.int32) for v in (along, across))
    row, column = ((cell + wood) % _GRAIN_CELLS for cell in cells)
    return texture[row, column]


def shade(
    scene: Scene, things: solids.Things, origin: rays.Vector, direction: rays.Vector, depth: Array, index: Array
) -> list[Array]:
    """Colour [3][P] of the solids hit, at distance float[P]; index: int32[P], which, as `rays.trace` counts."""
    everything = solids.concatenate(*things)
    kind = np.repeat(np.arange(3), [len(some.color) for some in things])
    table = jnp.concatenate(
        [
            everything.boxes.center,
            everything.boxes.rotation.reshape(-1, 9),
            everything.boxes.half,
            everything.color,
            jnp.asarray(everything.wood, jnp.float32)[:, None],
            jnp.asarray(kind, jnp.float32)[:, None],
        ],
        axis=1,
    )
    plane = list(table[jnp.maximum(index, 0)].T)  # 20 planes of [P]
    center, rotation, half, color, (wood, kind) = plane[:3], plane[3:12], plane[12:15], plane[15:18], plane[18:]
    shifted = [origin[i] + depth * direction[i] - center[i] for i in range(3)]
    p = [sum(rotation[3 * j + i] * shifted[j] for j in range(3)) for i in range(3)]
    box, capsule, cylinder = (normal(p, half) for normal in rays.NORMALS)
    n = [jnp.where(kind == 0, b, jnp.where(kind == 1, c, y)) for b, c, y in zip(box, capsule, cylinder)]
    towards = light_of(scene)
    light = sum(sum(rotation[3 * j + i] * n[i] for i in range(3)) * towards[j] for j in range(3))
    light = jnp.maximum(light, 0.0)
    grained = grain(scene.grain, wood.astype(jnp.int32), p, n)
    brightness = (AMBIENT + DIFFUSE * light) * jnp.where(wood == solids.PLAIN, 1.0, grained)
    return [channel * brightness for channel in color]


def floor(scene: Scene, origin: rays.Vector, direction: rays.Vector) -> tuple[Array, Array]:
    """The chequered floor z = 0: distance [P] and packed colours uint32[P]; it ends far away in an even grey."""
    depth = jnp.where(direction[2] < 0, -origin[2] / jnp.minimum(direction[2], -1e-6), _FAR_M)
    x, y = origin[0] + depth * direction[0], origin[1] + depth * direction[1]
    odd = (jnp.floor(x / _CHECK_M) + jnp.floor(y / _CHECK_M)).astype(jnp.int32) % 2
    grey = jnp.where(odd == 1, _FLOOR_COLORS[1], _FLOOR_COLORS[0])
    channels = [grey] * 3 if scene.appearance is None else [grey * factor for factor in scene.appearance.tint]
    return jnp.minimum(depth, _FAR_M), packed(channels)


def packed(channels: list[Array]) -> Array:
    """Red, green, blue float[...] in [0, 1] -> uint32[...], 8 bits each, red lowest."""
    levels = [jnp.clip(channel * 255.0 + 0.5, 0.0, 255.0).astype(jnp.int32) for channel in channels]
    return (levels[0] | levels[1] << 8 | levels[2] << 16).astype(jnp.uint32)
