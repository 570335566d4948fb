"""Pictures cut into tiles, and drawing each solid on the tiles that its screen box meets only.

Pixels are kept tile by tile, row by row inside a tile; only the finished picture is in rows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.parallel import cpu
from robovlms_jax.playtable.pictures import cameras, rays, shading, solids
from robovlms_jax.playtable.scene import Boxes, Scene
from robovlms_jax.types import Array

_TILE = 26  # px along an edge, about: many enough to pay for a turn of the loop, few enough to be met by few solids
_NEAR_M = 0.01  # solids that reach closer to the eye are not worth a screen box


class Tiles(NamedTuple):
    """How a picture is cut up: count x count tiles of edge x edge px; the last row and column may hang over."""

    size: int
    count: int
    edge: int

    @classmethod
    def of(cls, size: int) -> Tiles:
        count = max(round(size / _TILE), 3)  # with four tiles in all, XLA compiles for minutes
        return cls(size, count, -(-size // count))

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """How far right of and below the picture's middle the pixels' middles are, px: float32[tiles, pixels] each."""
        steps = np.arange(self.count * self.edge, dtype=np.float32) + np.float32(0.5 - self.size / 2)
        grid = np.stack(np.meshgrid(steps, steps)).reshape(2, self.count, self.edge, self.count, self.edge)
        right, down = grid.swapaxes(2, 3).reshape(2, self.count**2, self.edge**2)
        return right, down

    def picture(self, color: Array) -> Array:
        """Packed colours uint32[tiles, pixels] -> uint8[size, size, 3] in rows."""
        tiles = color.reshape(self.count, self.count, self.edge, self.edge)
        whole = self.count * self.edge
        rows = tiles.transpose(0, 2, 1, 3).reshape(whole, whole)[: self.size, : self.size]
        return jax.lax.bitcast_convert_type(rows, jnp.uint8)[..., :3]


def rays_of(camera: cameras.Camera, tiles: Tiles) -> rays.Vector:
    """Directions through the middles of the pixels; 1 along the camera's axis. float[tiles * pixels] per component."""
    right, down = (steps.reshape(-1) / cameras.focal(camera, tiles.size) for steps in tiles.pixels())
    r = camera.rotation
    return tuple(r[i, 0] * right + r[i, 1] * down + r[i, 2] for i in range(3))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Backdrop:
    """What the static camera sees of a scene's fixed parts, tile by tile.

    depth: float32[tiles, pixels], m along the camera's axis. color: uint32[tiles, pixels], see `shading.packed`.
    """

    depth: Array
    color: Array


def paint(scene: Scene, things: solids.Things, camera: cameras.Camera, tiles: Tiles, canvas: Backdrop) -> Array:
    """Draw solids over `canvas`, each on its own tiles only: packed colours uint32[tiles, pixels]."""
    kinds = [k for k, some in enumerate(things) if len(some.color)]
    light = shading.light_of(scene)
    drawn = [_drawn(things[k], camera, tiles, light, caps=rays.HITS[k] is rays.hit_capsule) for k in kinds]
    steps = [jnp.asarray(steps / cameras.focal(camera, tiles.size)) for steps in tiles.pixels()]

    def all_tiles(planes: list[Array], drawn: list[_Drawn], texture: Array) -> Array:
        def one_tile(args: tuple[list[Array], list[tuple[Array, Array]]]) -> Array:
            (depth, color, right, down), lists = args
            for k, some, (order, count) in zip(kinds, drawn, lists, strict=True):

                def draw(i, carry, k=k, some=some, order=order):
                    return _draw(texture, k, some.table[order[i]], right, down, carry)

                depth, color = jax.lax.fori_loop(0, count, draw, (depth, color))
            return color

        return jax.lax.map(one_tile, (planes, [(some.order, some.count) for some in drawn]))

    return cpu.one_kernel(all_tiles)([canvas.depth, canvas.color, *steps], drawn, scene.grain)


def _draw(
    texture: Array, kind: int, row: Array, right: Array, down: Array, carry: tuple[Array, Array]
) -> tuple[Array, Array]:
    """One solid, `row` of `_Drawn.table`, onto one tile: depth float[P], packed colour uint32[P]; `Scene.grain`.

    The branches also make XLA keep what they are given, which it would otherwise work out again for each result.
    """
    depth, _ = carry

    def parts(row: Array) -> list[Array]:
        return jnp.split(row, [3, 12, 15, 18, 21])

    def ray(axes: Array, right: Array, down: Array) -> rays.Vector:
        return tuple(axes[3 * i] * right + axes[3 * i + 1] * down + axes[3 * i + 2] for i in range(3))

    def shade(found, row, right, down, carry, *, grained):
        eye, axes, light, half, albedo, wood = parts(row)
        closer = found < carry[0]
        distance, direction = jnp.where(closer, found, 1.0), ray(axes, right, down)
        p = tuple(eye[i] + distance * direction[i] for i in range(3))
        n = rays.NORMALS[kind](p, half)
        brightness = shading.AMBIENT + shading.DIFFUSE * jnp.maximum(sum(n[i] * light[i] for i in range(3)), 0.0)
        if grained:
            brightness *= shading.grain(texture, wood[0].astype(jnp.int32), p, n)
        color = shading.packed([channel * brightness for channel in albedo])
        return jnp.minimum(found, carry[0]), jnp.where(closer, color, carry[1])

    eye, axes, _, half, _, wood = parts(row)
    found = rays.HITS[kind](tuple(eye), ray(axes, right, down), half)
    branches = [
        lambda found, row, right, down, carry: carry,
        functools.partial(shade, grained=False),
        functools.partial(shade, grained=True),
    ]
    case = jnp.any(found < depth) * (1 + (wood[0] != solids.PLAIN))
    return jax.lax.switch(case, branches, found, row, right, down, carry)


def _drawn(some: solids.Solids, camera: cameras.Camera, tiles: Tiles, towards: Array, *, caps: bool) -> _Drawn:
    """towards: float[3], the light."""
    boxes, count = some.boxes, len(some.color)
    top, bottom, left, right = _screen_boxes(boxes, boxes.half[:, 0] if caps else 0.0, camera, tiles).T
    row, column = np.divmod(np.arange(tiles.count**2)[:, None], tiles.count)
    meets = (top <= row) & (row <= bottom) & (left <= column) & (column <= right)  # [tiles, K]
    place = jnp.cumsum(meets, axis=1) - 1
    chosen = meets[:, None] & (place[:, None] == np.arange(count)[:, None])  # [tiles, place, K]
    eye = ((camera.eye - boxes.center)[:, :, None] * boxes.rotation).sum(1)
    axes = (boxes.rotation[:, :, :, None] * camera.rotation[None, :, None, :]).sum(1).reshape(count, 9)
    light = (boxes.rotation * jnp.asarray(towards)[:, None]).sum(1)
    wood = jnp.asarray(some.wood, jnp.float32)[:, None]
    table = jnp.concatenate([eye, axes, light, boxes.half, some.color, wood], axis=1)
    return _Drawn(table, (chosen * np.arange(count)).sum(-1), meets.sum(1))


class _Drawn(NamedTuple):
    """Solids of one kind as the camera sees them.

    table: float[K, 22], in each solid's own frame the eye (3), the camera's axes (9) and the light (3), then half (3),
    color (3) and wood. order: int32[tiles, K], the solids a tile meets, those first. count: int32[tiles], how many.
    """

    table: Array
    order: Array
    count: Array


def _screen_boxes(boxes: Boxes, caps: Array | float, camera: cameras.Camera, tiles: Tiles) -> Array:
    """int32[K, 4]: first and last row, first and last column of the tiles that solids in these boxes may be seen in.

    Last before first: nowhere. caps: float[K], m that a solid reaches beyond its box along z.
    """
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3, indexing="ij"), np.float32).reshape(3, 8)
    half = boxes.half.at[:, 2].add(caps)
    to_camera = (camera.rotation[None, :, :, None] * boxes.rotation[:, :, None, :]).sum(1)  # [K, camera, box axis]
    middle = ((boxes.center - camera.eye)[:, :, None] * camera.rotation).sum(1)  # [K, 3]
    corners = middle[..., None] + ((to_camera * half[:, None])[..., None] * signs).sum(2)  # [K, 3, 8]
    depth = corners[:, 2]
    in_front = depth.min(-1) > _NEAR_M
    slope = corners[:, :2] / jnp.where(in_front[:, None], depth, 1.0)[:, None]
    pixel = cameras.focal(camera, tiles.size) * slope + tiles.size / 2  # [K, (right, down), 8]
    first, last = (jnp.floor(edge / tiles.edge) for edge in (pixel.min(-1) - 0.01, pixel.max(-1) + 0.01))
    # reaching behind the eye: everywhere, unless wholly to one side of what the camera sees
    wide = np.float32(np.tan(camera.view / 2))
    aside = (jnp.abs(corners[:, :2]) > wide * depth[:, None]) & (
        jnp.sign(corners[:, :2]) == jnp.sign(corners[:, :2, :1])
    )
    hidden = aside.all(-1).any(-1) | (depth.max(-1) <= 0)
    first = jnp.where(in_front[:, None], jnp.maximum(first, 0), 0)
    last = jnp.where(in_front[:, None], jnp.minimum(last, tiles.count - 1), tiles.count - 1)
    last = jnp.where(hidden[:, None], -1, last)
    return jnp.stack([first[:, 1], last[:, 1], first[:, 0], last[:, 0]], axis=-1).astype(jnp.int32)
