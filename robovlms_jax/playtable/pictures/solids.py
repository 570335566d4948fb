"""What there is to see: boxes, capsules and cylinders with colours."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable import kinematics
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.scene import BOX_BODY, BOX_JOINT, BOX_MATERIAL, Boxes, Scene
from robovlms_jax.types import Array

PLAIN = -1
"""`Solids.wood` of what is not wooden."""
_BLOCK_COLORS = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]], np.float32)
_WHITE, _GREY, _DARK = (0.95, 0.95, 0.95), (0.85, 0.85, 0.85), (0.22, 0.22, 0.24)
_LIT = {"led": (0.0, 1.0, 0.0), "lightbulb": (1.0, 0.95, 0.0)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solids:
    """K coloured solids of one kind.

    Capsules and cylinders lie along z of their frame, half = (radius, radius, half length without caps).
    color: float[K, 3] in [0, 1]. wood: int32[K], where in the grain a wooden solid begins; -1 = plain.
    """

    boxes: Boxes
    color: Array
    wood: Array


class Things(NamedTuple):
    """Solids by kind, in the order of `rays.HITS`."""

    boxes: Solids
    capsules: Solids
    cylinders: Solids


def _of(body: str) -> np.ndarray:
    """bool[N]: which boxes of the table belong to a body."""
    return np.isin(BOX_BODY, tasks.BODIES.index(body))


_BULB, _BUTTON = (int(np.flatnonzero(_of(body))[0]) for body in ("lightbulb", "button"))
_PEDESTAL = int(np.flatnonzero(BOX_MATERIAL == "pedestal")[0])
_ROUND = _of("ground") | np.isin(np.arange(len(BOX_BODY)), [_BULB, _BUTTON, _PEDESTAL])  # drawn as something else
_MOVES = (BOX_JOINT >= 0) | _of("led")
_FIXED, _MOVING = np.flatnonzero(~_ROUND & ~_MOVES), np.flatnonzero(~_ROUND & _MOVES)
_WOOD = np.where(np.isin(BOX_MATERIAL, ["wood", "front", "pedestal"]), 7 * np.arange(len(BOX_BODY)), PLAIN)


def fixed(scene: Scene) -> Things:
    """What never moves: table, cabinet, the button's pedestal, things of a look."""
    half = scene.table.half[_PEDESTAL] * np.array([1.2, 1.2, 1.0])  # the box inside the disc
    pedestal = _along(scene.table.center[_PEDESTAL], half, scene.box_color[_PEDESTAL], int(_WOOD[_PEDESTAL]))
    boxes = _table_solids(scene.table, scene.box_color, _FIXED)
    if scene.appearance is not None:
        color = scene.appearance.things_color
        boxes = concatenate(boxes, Solids(scene.appearance.things, color, np.full(len(color), PLAIN)))
    return _tinted(scene, Things(boxes, _nothing(), pedestal))


def moving(scene: Scene, state: bodies.State) -> Things:
    """Mechanisms, lamps, blocks, arm and hand."""
    table = bodies.table_boxes(scene, state)
    led = jnp.asarray(_of("led"))[:, None] & (state.led > 0)
    colors = jnp.where(led, jnp.array(_LIT["led"]), scene.box_color)
    bulb_color = jnp.where(bodies.bulb(state) > 0, jnp.array(_LIT["lightbulb"]), jnp.array(_WHITE))
    blocks = Boxes(state.block_position, state.block_rotation, scene.block_half)
    blocks = Solids(blocks, jnp.asarray(_BLOCK_COLORS), np.full(3, PLAIN))
    lamp = _along(table.center[_BULB] + np.array([0, 0, 0.003], np.float32), np.array([0.033, 0.033, 0.0]), bulb_color)
    knob = _along(table.center[_BUTTON], table.half[_BUTTON] * np.array([1.05, 1.05, 1.0]), scene.box_color[_BUTTON])
    arm, joints = _arm(state)
    things = Things(
        concatenate(_table_solids(table, colors, _MOVING), blocks, _hand(state)),
        concatenate(lamp, arm),
        concatenate(knob, joints),
    )
    return _tinted(scene, things)


def _tinted(scene: Scene, things: Things) -> Things:
    """In the colours that the scene's light gives them."""
    if scene.appearance is None:
        return things
    tint = scene.appearance.tint
    return Things(*(dataclasses.replace(some, color=some.color * tint) for some in things))


def _table_solids(table: Boxes, colors: Array, index: np.ndarray) -> Solids:
    return Solids(jax.tree.map(lambda x: x[index], table), colors[index], _WOOD[index])


def _along(center: Array, half: Array, color: Array, wood: int = PLAIN) -> Solids:
    """One upright capsule or cylinder."""
    return Solids(
        Boxes(center[None], jnp.eye(3)[None], jnp.asarray(half, jnp.float32)[None]),
        jnp.asarray(color)[None],
        np.array([wood]),
    )


def _nothing() -> Solids:
    boxes = Boxes(jnp.zeros((0, 3)), jnp.zeros((0, 3, 3)), jnp.zeros((0, 3)))
    return Solids(boxes, jnp.zeros((0, 3)), np.zeros(0, int))


def concatenate(*solids: Solids) -> Solids:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *solids)


def _hand(state: bodies.State) -> Solids:
    """Palm and fingers; the fingers are drawn slimmer than they collide, in two pieces so that they taper."""
    fingers, palm = (jax.tree.map(lambda x, i=i: x[i], bodies.hand_boxes(state)) for i in (slice(0, 2), slice(2, 3)))
    pieces = []
    for thickness, start, end in ((0.55, 0.0, 1.0), (1.3, -1.0, 0.0)):
        half = fingers.half * np.array([0.8, thickness, (end - start) / 2], np.float32)
        inwards = jnp.array([[-1.0], [1.0]]) * (fingers.half[:, 1:2] - half[:, 1:2])
        shift = state.rotation[:, 1] * inwards + state.rotation[:, 2] * fingers.half[:, 2:] * (start + end) / 2
        boxes = Boxes(fingers.center + shift, fingers.rotation, half)
        pieces.append(Solids(boxes, jnp.array([_GREY] * 2), np.full(2, PLAIN)))
    return concatenate(*pieces, Solids(palm, jnp.array([_WHITE]), np.full(1, PLAIN)))


# Arm, from point to point, each in the frame of a link (0-based, 7 = tool): link, offset (m), link, offset, radius.
_CAPSULES = (
    (0, (0, 0, -0.30), 0, (0, 0, -0.02), 0.075, _WHITE),
    (1, (0, 0, -0.06), 1, (0, 0, 0.06), 0.068, _WHITE),
    (1, (0, -0.05, 0), 2, (0, 0, -0.06), 0.062, _WHITE),
    (2, (0, 0, -0.02), 3, (0, 0, 0), 0.060, _WHITE),
    (3, (0, 0, -0.05), 3, (0, 0, 0.05), 0.062, _WHITE),
    (3, (-0.0825, 0.02, 0), 4, (0, 0, -0.12), 0.058, _WHITE),
    (4, (0, 0.03, -0.16), 4, (0, 0.02, -0.02), 0.048, _WHITE),
    (5, (0, 0, -0.03), 5, (0, 0, 0.05), 0.050, _WHITE),
    (5, (0, 0, 0.01), 6, (0, 0, 0.0), 0.048, _WHITE),
    (6, (0, 0, -0.02), 6, (0, 0, 0.06), 0.044, _WHITE),
)
_CYLINDERS = (
    (5, (0, 0, -0.075), 5, (0, 0, 0.075), 0.046, _DARK),
    (5, (0, 0, -0.079), 5, (0, 0, 0.079), 0.026, _GREY),
    (6, (0, 0, 0.06), 6, (0, 0, 0.107), 0.046, _GREY),
)


def _arm(state: bodies.State) -> tuple[Solids, Solids]:
    """Capsules and cylinders that look like a Panda, hung on its link frames."""
    arm = kinematics.forward(state.joints)
    return _links(arm, _CAPSULES), _links(arm, _CYLINDERS)


def _links(arm: kinematics.Arm, links: tuple) -> Solids:
    first, second = np.array([link[0] for link in links]), np.array([link[2] for link in links])
    offsets = [np.array([link[i] for link in links], np.float32) for i in (1, 3)]
    start, end = (
        arm.origins[index] + (arm.rotations[index] * offset[:, None]).sum(-1)
        for index, offset in zip((first, second), offsets)
    )
    length = jnp.linalg.norm(end - start, axis=-1, keepdims=True)
    z = (end - start) / length
    # any two directions at right angles to z will do
    helper = jnp.where(jnp.abs(z[:, :1]) < 0.9, jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 1.0, 0.0]))
    x = jnp.cross(helper, z)
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    radius = jnp.array([[link[4]] for link in links], jnp.float32)
    half = jnp.concatenate([radius, radius, length / 2], axis=-1)
    boxes = Boxes((start + end) / 2, jnp.stack([x, jnp.cross(z, x), z], axis=-1), half)
    return Solids(boxes, jnp.array([link[5] for link in links]), np.full(len(links), PLAIN))
