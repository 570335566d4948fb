"""Pictures of the play table: analytic ray casting of boxes, capsules and cylinders, batched and jitted.

What never moves is traced once per scene and size (`backdrop`) for the static camera, which also never moves. The rest
comes in two ways that give the same picture: `tiled` tests each solid only on the tiles of the picture that its screen
box meets, in loops whose length depends on the scene, which is what a CPU likes; otherwise every pixel tests every
solid, in loops of fixed length that batch over tables, which is what an accelerator likes.
"""

from __future__ import annotations

import jax.numpy as jnp

from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.pictures import cameras, rays, shading, solids, tiles
from robovlms_jax.playtable.scene import Scene
from robovlms_jax.types import Array


def backdrop(scene: Scene, size: int, camera: str = "static") -> tiles.Backdrop:
    """Traced once per scene and size, handed to every `render` of the same camera, "static" or "people"."""
    return _look(scene, cameras.camera(None, camera, scene.appearance), tiles.Tiles.of(size), solids.fixed(scene))


def render(
    scene: Scene, state: bodies.State, camera: str, size: int, backdrop: tiles.Backdrop, *, tiled: bool = True
) -> Array:
    """uint8[size, size, 3], RGB: the picture of camera "static", "people" or "wrist".

    Args:
      backdrop: of this scene and, but for the one on the hand, of this camera and size.
      tiled: work on the tiles that each solid meets; fast on a CPU one picture at a time, slow under `vmap`.
    """
    view, cut = cameras.camera(state, camera, scene.appearance), tiles.Tiles.of(size)
    things = solids.moving(scene, state)
    canvas = backdrop
    if camera == "wrist":  # nothing is known beforehand
        things = solids.Things(*(solids.concatenate(*pair) for pair in zip(solids.fixed(scene), things)))
        if not tiled:
            return cut.picture(_look(scene, view, cut, things).color)
        canvas = _empty(scene, view, cut)
    if tiled:
        return cut.picture(tiles.paint(scene, things, view, cut, canvas))
    directions, origin, known = tiles.rays_of(view, cut), tuple(view.eye), canvas.depth.reshape(-1)
    depth, index = rays.trace(things, origin, directions, known)
    color = shading.packed(shading.shade(scene, things, origin, directions, depth, index))
    return cut.picture(jnp.where(index < 0, canvas.color.reshape(-1), color))


def _empty(scene: Scene, view: cameras.Camera, cut: tiles.Tiles) -> tiles.Backdrop:
    """The floor alone."""
    planes = shading.floor(scene, tuple(view.eye), tiles.rays_of(view, cut))
    return tiles.Backdrop(*(plane.reshape(cut.count**2, -1) for plane in planes))


def _look(scene: Scene, view: cameras.Camera, cut: tiles.Tiles, things: solids.Things) -> tiles.Backdrop:
    """Trace everything that there is, and the floor."""
    origin, directions = tuple(view.eye), tiles.rays_of(view, cut)
    depth, floor = shading.floor(scene, origin, directions)
    depth, index = rays.trace(things, origin, directions, depth)
    color = shading.packed(shading.shade(scene, things, origin, directions, depth, index))
    color = jnp.where(index < 0, floor, color)
    return tiles.Backdrop(*(plane.reshape(cut.count**2, -1) for plane in (depth, color)))
