"""Pictures of the play table: analytic ray casting of boxes, capsules and cylinders, batched and jitted.

What never moves is traced once per scene and size (`backdrop`) for the static camera, which also never moves. The rest
comes in two ways that give the same picture: `tiled` tests each solid only on the tiles of the picture that its screen
box meets, in loops whose length depends on the scene, which is what a CPU likes; otherwise every pixel tests every
solid, in loops of fixed length that batch over tables, which is what an accelerator likes.

Pixels are kept tile by tile, row by row inside a tile; only the finished picture is in rows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.control import interface
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable import kinematics, physics
from robovlms_jax.playtable.scene import BOX_BODY, BOX_JOINT, BOX_MATERIAL, Boxes, Scene
from robovlms_jax.types import Array

SIZES = {"static": 200, "wrist": 84}
"""CALVIN's picture sizes, px."""

_STATIC_EYE, _STATIC_TARGET = np.array([2.871, -2.167, 2.555]), np.array([-0.026, -0.030, 0.392])
_STATIC_UP = np.array([0.404, 0.226, 0.886])
_WRIST_EYE_M = np.array([-0.1, 0.0, -0.142], np.float32)  # frame of the tool centre point
_WRIST_TILT_RAD = 0.2708
_VIEW_RAD = {"static": np.deg2rad(10.0), "wrist": np.deg2rad(75.0)}  # angle of view, both ways

_AMBIENT, _DIFFUSE = 0.6, 0.378  # with the light below: as CALVIN's renderer shades tops and fronts
_LIGHT = np.array([-0.38, 0.25, 0.89], np.float32)
_LIGHT /= np.linalg.norm(_LIGHT)
_FLOOR_COLORS = np.array([[0.815], [0.937]], np.float32)
_CHECK_M = 0.5
_GRAIN_PER_M, _GRAIN_CELLS = 150.0, 64
_PLAIN = -1
_FAR_M = 50.0
_SKIN_M = 1e-3  # shadow rays start this far out
_TILE = 26  # px along an edge, about: many enough to pay for a turn of the loop, few enough to be met by few solids
_NEAR_M = 0.01  # solids that reach closer to the eye are not worth a screen box

_BLOCK_COLORS = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]], np.float32)
_WHITE, _GREY, _DARK = (0.95, 0.95, 0.95), (0.85, 0.85, 0.85), (0.22, 0.22, 0.24)
_LIT = {"led": (0.0, 1.0, 0.0), "lightbulb": (1.0, 0.95, 0.0)}


class Camera(NamedTuple):
    """A pinhole camera. eye: float[3], m, world. rotation: float[3, 3], columns point right, down and forward.
    view: angle of view in rad."""

    eye: Array
    rotation: Array
    view: float


def camera(state: physics.State, name: str) -> Camera:
    """The camera "static" or "wrist", placed as in CALVIN."""
    if name == "static":
        forward = _STATIC_TARGET - _STATIC_EYE
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, _STATIC_UP)
        right /= np.linalg.norm(right)
        axes = np.stack([right, np.cross(forward, right), forward], axis=1)
        return Camera(jnp.asarray(_STATIC_EYE, jnp.float32), jnp.asarray(axes, jnp.float32), _VIEW_RAD[name])
    if name == "wrist":
        c, s = np.cos(_WRIST_TILT_RAD), np.sin(_WRIST_TILT_RAD)
        axes = jnp.array([[0.0, -c, s], [1.0, 0.0, 0.0], [0.0, s, c]], jnp.float32)
        return Camera(state.position + state.rotation @ _WRIST_EYE_M, state.rotation @ axes, _VIEW_RAD[name])
    raise ValueError(f"unknown camera {name!r}; cameras: {', '.join(interface.CAMERAS)}.")


def project(camera: Camera, points: Array, size: int) -> Array:
    """Where world points float[..., 3] (m) appear: float[..., 3], px to the right, px down, depth in m."""
    local = (points - camera.eye) @ camera.rotation
    focal = size / 2 / np.tan(camera.view / 2)
    return jnp.concatenate([size / 2 + focal * local[..., :2] / local[..., 2:], local[..., 2:]], axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# What there is to see


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


class _Things(NamedTuple):
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
_WOOD = np.where(np.isin(BOX_MATERIAL, ["wood", "front", "pedestal"]), 7 * np.arange(len(BOX_BODY)), _PLAIN)


def _fixed(scene: Scene) -> _Things:
    half = scene.table.half[_PEDESTAL] * np.array([1.2, 1.2, 1.0])  # the box inside the disc
    pedestal = _along(scene.table.center[_PEDESTAL], half, scene.box_color[_PEDESTAL], int(_WOOD[_PEDESTAL]))
    return _Things(_table_solids(scene, scene.table, scene.box_color, _FIXED), _nothing(), pedestal)


def _moving(scene: Scene, state: physics.State) -> _Things:
    """Mechanisms, lamps, blocks, arm and hand."""
    table = physics.table_boxes(scene, state)
    led = jnp.asarray(_of("led"))[:, None] & (state.led > 0)
    colors = jnp.where(led, jnp.array(_LIT["led"]), scene.box_color)
    bulb_color = jnp.where(physics.bulb(state) > 0, jnp.array(_LIT["lightbulb"]), jnp.array(_WHITE))
    blocks = Boxes(state.block_position, state.block_rotation, scene.block_half)
    blocks = Solids(blocks, jnp.asarray(_BLOCK_COLORS), np.full(3, _PLAIN))
    lamp = _along(table.center[_BULB] + np.array([0, 0, 0.003], np.float32), np.array([0.033, 0.033, 0.0]), bulb_color)
    knob = _along(table.center[_BUTTON], table.half[_BUTTON] * np.array([1.05, 1.05, 1.0]), scene.box_color[_BUTTON])
    arm, joints = _arm(state)
    return _Things(
        _concatenate(_table_solids(scene, table, colors, _MOVING), blocks, _hand(state)),
        _concatenate(lamp, arm),
        _concatenate(knob, joints),
    )


def _table_solids(scene: Scene, table: Boxes, colors: Array, index: np.ndarray) -> Solids:
    return Solids(jax.tree.map(lambda x: x[index], table), colors[index], _WOOD[index])


def _along(center: Array, half: Array, color: Array, wood: int = _PLAIN) -> Solids:
    """One upright capsule or cylinder."""
    return Solids(
        Boxes(center[None], jnp.eye(3)[None], jnp.asarray(half, jnp.float32)[None]),
        jnp.asarray(color)[None],
        np.array([wood]),
    )


def _nothing() -> Solids:
    boxes = Boxes(jnp.zeros((0, 3)), jnp.zeros((0, 3, 3)), jnp.zeros((0, 3)))
    return Solids(boxes, jnp.zeros((0, 3)), np.zeros(0, int))


def _concatenate(*solids: Solids) -> Solids:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *solids)


def _hand(state: physics.State) -> Solids:
    """Palm and fingers; the fingers are drawn slimmer than they collide, in two pieces so that they taper."""
    fingers, palm = (jax.tree.map(lambda x, i=i: x[i], physics.hand_boxes(state)) for i in (slice(0, 2), slice(2, 3)))
    pieces = []
    for thickness, start, end in ((0.55, 0.0, 1.0), (1.3, -1.0, 0.0)):
        half = fingers.half * np.array([0.8, thickness, (end - start) / 2], np.float32)
        inwards = jnp.array([[-1.0], [1.0]]) * (fingers.half[:, 1:2] - half[:, 1:2])
        shift = state.rotation[:, 1] * inwards + state.rotation[:, 2] * fingers.half[:, 2:] * (start + end) / 2
        boxes = Boxes(fingers.center + shift, fingers.rotation, half)
        pieces.append(Solids(boxes, jnp.array([_GREY] * 2), np.full(2, _PLAIN)))
    return _concatenate(*pieces, Solids(palm, jnp.array([_WHITE]), np.full(1, _PLAIN)))


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


def _arm(state: physics.State) -> tuple[Solids, Solids]:
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
    return Solids(boxes, jnp.array([link[5] for link in links]), np.full(len(links), _PLAIN))


# ---------------------------------------------------------------------------------------------------------------------
# Ray casting. Rays are components (x, y, z), each float[P] or a number; lengths count along the camera's axis.

_Vector = tuple[Array, Array, Array]


def _hit_box(o: _Vector, d: _Vector, half: Array) -> Array:
    near, far = -jnp.inf, jnp.inf
    for i in range(3):
        inverse = 1.0 / d[i]
        a, b = (-half[i] - o[i]) * inverse, (half[i] - o[i]) * inverse
        near, far = jnp.maximum(near, jnp.minimum(a, b)), jnp.minimum(far, jnp.maximum(a, b))
    return jnp.where((near < far) & (near > 0), near, jnp.inf)


def _hit_tube(o: _Vector, d: _Vector, half: Array) -> Array:
    """The endless tube of radius half[0] around z."""
    a = d[0] ** 2 + d[1] ** 2
    b = o[0] * d[0] + o[1] * d[1]
    c = o[0] ** 2 + o[1] ** 2 - half[0] ** 2
    root = b * b - a * c
    return jnp.where(root > 0, (-b - jnp.sqrt(jnp.maximum(root, 0.0))) / a, jnp.inf)


def _hit_capsule(o: _Vector, d: _Vector, half: Array) -> Array:
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


def _hit_cylinder(o: _Vector, d: _Vector, half: Array) -> Array:
    side = _hit_tube(o, d, half)
    on_side = (jnp.abs(o[2] + side * d[2]) <= half[2]) & (side > 0)
    cap = (-jnp.sign(d[2]) * half[2] - o[2]) / d[2]
    on_cap = ((o[0] + cap * d[0]) ** 2 + (o[1] + cap * d[1]) ** 2 <= half[0] ** 2) & (cap > 0)
    return jnp.minimum(jnp.where(on_side, side, jnp.inf), jnp.where(on_cap, cap, jnp.inf))


_HITS = (_hit_box, _hit_capsule, _hit_cylinder)


def _local(solids: Solids, k: Array, origin: _Vector, direction: _Vector) -> tuple[_Vector, _Vector]:
    center, rotation = solids.boxes.center[k], solids.boxes.rotation[k]
    shifted = [origin[j] - center[j] for j in range(3)]
    o, d = (tuple(sum(rotation[j, i] * v[j] for j in range(3)) for i in range(3)) for v in (shifted, direction))
    return o, d


def _trace(things: _Things, origin: _Vector, direction: _Vector, depth: Array) -> tuple[Array, Array]:
    """Nearest hit closer than `depth` float[P]: its distance float[P] and which solid int32[P] (-1 none)."""
    index, first = jnp.full(depth.shape, -1, jnp.int32), 0
    for solids, hit in zip(things, _HITS):
        if not len(solids.color):
            continue

        def nearer(k, best, solids=solids, hit=hit, first=first):
            depth, index = best
            found = hit(*_local(solids, k, origin, direction), solids.boxes.half[k])
            closer = found < depth
            return jnp.where(closer, found, depth), jnp.where(closer, k + first, index)

        depth, index = jax.lax.fori_loop(0, len(solids.color), nearer, (depth, index))
        first += len(solids.color)
    return depth, index


def _normal_of_box(p: _Vector, half: _Vector) -> _Vector:
    relative = [jnp.abs(p[i]) * (1.0 / jnp.maximum(half[i], 1e-6)) for i in range(3)]
    largest = jnp.maximum(jnp.maximum(relative[0], relative[1]), relative[2])
    return tuple(jnp.where(relative[i] == largest, jnp.sign(p[i]), 0.0) for i in range(3))


def _normal_of_capsule(p: _Vector, half: _Vector) -> _Vector:
    scale = 1.0 / half[0]
    return p[0] * scale, p[1] * scale, (p[2] - jnp.clip(p[2], -half[2], half[2])) * scale


def _normal_of_cylinder(p: _Vector, half: _Vector) -> _Vector:
    on_cap = jnp.abs(p[2]) > half[2] * (1 - 1e-3)
    side = 1.0 / half[0]
    return tuple(jnp.where(on_cap, jnp.sign(p[2]) * (i == 2), p[i] * side * (i < 2)) for i in range(3))


_NORMALS = (_normal_of_box, _normal_of_capsule, _normal_of_cylinder)
"""Outward normal at local surface points, for each of `_HITS`."""


def _grain(scene: Scene, wood: Array, p: _Vector, n: _Vector) -> Array:
    """Brightness of wood at local surface points: grain runs along x of a box (along y on its ends)."""
    along = jnp.where(jnp.abs(n[0]) > 0.5, p[1], p[0])
    across = jnp.where(jnp.abs(n[2]) > 0.5, p[1], p[2])
    cells = (jnp.floor(v * _GRAIN_PER_M).astype(jnp.int32) for v in (along, across))
    row, column = ((cell + wood) % _GRAIN_CELLS for cell in cells)
    return scene.grain[row, column]


def _shadowed(things: _Things, points: _Vector) -> Array:
    """bool[P]: is anything between these points and the light?"""
    light = tuple(jnp.float32(component) for component in _LIGHT)
    start = tuple(p + _SKIN_M * component for p, component in zip(points, light))
    return _trace(things, start, light, jnp.full(points[0].shape, _FAR_M))[1] >= 0


def _shade(
    scene: Scene, things: _Things, origin: _Vector, direction: _Vector, depth: Array, index: Array, shadow: Array
) -> list[Array]:
    """Colour [3][P] of the solids hit; shadow: bool[P]."""
    everything = _concatenate(*things)
    kind = np.repeat(np.arange(3), [len(solids.color) for solids in things])
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
    box, capsule, cylinder = (normal(p, half) for normal in _NORMALS)
    n = [jnp.where(kind == 0, b, jnp.where(kind == 1, c, y)) for b, c, y in zip(box, capsule, cylinder)]
    light = sum(sum(rotation[3 * j + i] * n[i] for i in range(3)) * _LIGHT[j] for j in range(3))
    light = jnp.where(shadow, 0.0, jnp.maximum(light, 0.0))
    grain = _grain(scene, wood.astype(jnp.int32), p, n)
    brightness = (_AMBIENT + _DIFFUSE * light) * jnp.where(wood == _PLAIN, 1.0, grain)
    return [channel * brightness for channel in color]


def _floor(origin: _Vector, direction: _Vector) -> tuple[Array, Array]:
    """The chequered floor z = 0: distance [P] and brightness [P]; far away it fades into an even grey."""
    depth = jnp.where(direction[2] < 0, -origin[2] / jnp.minimum(direction[2], -1e-6), _FAR_M)
    x, y = origin[0] + depth * direction[0], origin[1] + depth * direction[1]
    odd = (jnp.floor(x / _CHECK_M) + jnp.floor(y / _CHECK_M)).astype(jnp.int32) % 2
    return jnp.minimum(depth, _FAR_M), jnp.where(odd == 1, _FLOOR_COLORS[1], _FLOOR_COLORS[0])


class _Tiles(NamedTuple):
    """How a picture is cut up: count x count tiles of edge x edge px; the last row and column may hang over."""

    size: int
    count: int
    edge: int

    @classmethod
    def of(cls, size: int) -> _Tiles:
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


def _packed(channels: list[Array]) -> Array:
    """Red, green, blue float[...] in [0, 1] -> uint32[...], 8 bits each, red lowest."""
    levels = [jnp.clip(channel * 255.0 + 0.5, 0.0, 255.0).astype(jnp.int32) for channel in channels]
    return (levels[0] | levels[1] << 8 | levels[2] << 16).astype(jnp.uint32)


def _rays(camera: Camera, tiles: _Tiles) -> _Vector:
    """Directions through the middles of the pixels; 1 along the camera's axis. float[tiles * pixels] per component."""
    right, down = (steps.reshape(-1) / _focal(camera, tiles.size) for steps in tiles.pixels())
    r = camera.rotation
    return tuple(r[i, 0] * right + r[i, 1] * down + r[i, 2] for i in range(3))


def _focal(camera: Camera, size: int) -> np.float32:
    """Pixels per unit of slope."""
    return np.float32(size / 2 / np.tan(camera.view / 2))


# ---------------------------------------------------------------------------------------------------------------------
# The tiled way


def _screen_boxes(boxes: Boxes, caps: Array | float, camera: Camera, tiles: _Tiles) -> Array:
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
    pixel = _focal(camera, tiles.size) * slope + tiles.size / 2  # [K, (right, down), 8]
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


class _Drawn(NamedTuple):
    """Solids of one kind as the camera sees them.

    table: float[K, 22], in each solid's own frame the eye (3), the camera's axes (9) and the light (3), then half (3),
    color (3) and wood. order: int32[tiles, K], the solids a tile meets, those first. count: int32[tiles], how many.
    """

    table: Array
    order: Array
    count: Array


def _paint(scene: Scene, things: _Things, camera: Camera, tiles: _Tiles, canvas: Backdrop) -> Array:
    """Draw solids over `canvas`, each on its own tiles only: packed colours uint32[tiles, pixels]."""
    kinds = [k for k, solids in enumerate(things) if len(solids.color)]
    drawn = {k: _drawn(things[k], camera, tiles, caps=_HITS[k] is _hit_capsule) for k in kinds}
    right, down = (jnp.asarray(steps / _focal(camera, tiles.size)) for steps in tiles.pixels())

    def one_tile(args):
        depth, color, right, down, lists = args
        for k in kinds:
            order, count = lists[k]

            def draw(i, carry, k=k, order=order):
                return _draw(scene, k, drawn[k].table[order[i]], right, down, carry)

            depth, color = jax.lax.fori_loop(0, count, draw, (depth, color))
        return color

    lists = {k: (drawn[k].order, drawn[k].count) for k in kinds}
    return jax.lax.map(one_tile, (canvas.depth, canvas.color, right, down, lists))


def _draw(
    scene: Scene, kind: int, row: Array, right: Array, down: Array, carry: tuple[Array, Array]
) -> tuple[Array, Array]:
    """One solid, `row` of `_Drawn.table`, onto one tile: depth float[P], packed colour uint32[P].

    The branches also make XLA keep what they are given, which it would otherwise work out again for each result.
    """
    depth, _ = carry
    eye, axes, light, half, albedo, wood = jnp.split(row, [3, 12, 15, 18, 21])

    def ray(right, down):
        return tuple(axes[3 * i] * right + axes[3 * i + 1] * down + axes[3 * i + 2] for i in range(3))

    def shade(found, right, down, carry, *, grained):
        closer = found < carry[0]
        distance, direction = jnp.where(closer, found, 1.0), ray(right, down)
        p = tuple(eye[i] + distance * direction[i] for i in range(3))
        n = _NORMALS[kind](p, half)
        brightness = _AMBIENT + _DIFFUSE * jnp.maximum(sum(n[i] * light[i] for i in range(3)), 0.0)
        if grained:
            brightness *= _grain(scene, wood[0].astype(jnp.int32), p, n)
        color = _packed([channel * brightness for channel in albedo])
        return jnp.minimum(found, carry[0]), jnp.where(closer, color, carry[1])

    found = _HITS[kind](tuple(eye), ray(right, down), half)
    branches = [
        lambda found, right, down, carry: carry,
        functools.partial(shade, grained=False),
        functools.partial(shade, grained=True),
    ]
    case = jnp.any(found < depth) * (1 + (wood[0] != _PLAIN))
    return jax.lax.switch(case, branches, found, right, down, carry)


def _drawn(solids: Solids, camera: Camera, tiles: _Tiles, *, caps: bool) -> _Drawn:
    boxes, count = solids.boxes, len(solids.color)
    top, bottom, left, right = _screen_boxes(boxes, boxes.half[:, 0] if caps else 0.0, camera, tiles).T
    row, column = np.divmod(np.arange(tiles.count**2)[:, None], tiles.count)
    meets = (top <= row) & (row <= bottom) & (left <= column) & (column <= right)  # [tiles, K]
    place = jnp.cumsum(meets, axis=1) - 1
    chosen = meets[:, None] & (place[:, None] == np.arange(count)[:, None])  # [tiles, place, K]
    eye = ((camera.eye - boxes.center)[:, :, None] * boxes.rotation).sum(1)
    axes = (boxes.rotation[:, :, :, None] * camera.rotation[None, :, None, :]).sum(1).reshape(count, 9)
    light = (boxes.rotation * jnp.asarray(_LIGHT)[:, None]).sum(1)
    wood = jnp.asarray(solids.wood, jnp.float32)[:, None]
    table = jnp.concatenate([eye, axes, light, boxes.half, solids.color, wood], axis=1)
    return _Drawn(table, (chosen * np.arange(count)).sum(-1), meets.sum(1))


# ---------------------------------------------------------------------------------------------------------------------
# The public functions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Backdrop:
    """What the static camera sees of a scene's fixed parts, tile by tile.

    depth: float32[tiles, pixels], m along the camera's axis. color: uint32[tiles, pixels], see `_packed`.
    """

    depth: Array
    color: Array


def backdrop(scene: Scene, size: int) -> Backdrop:
    """Traced once per scene and size, handed to every `render` of the static camera."""
    return _look(scene, camera(None, "static"), _Tiles.of(size), _fixed(scene), shadows=False)


def render(
    scene: Scene,
    state: physics.State,
    camera_name: str,
    size: int,
    backdrop: Backdrop,
    *,
    shadows: bool = False,
    tiled: bool = True,
) -> Array:
    """uint8[size, size, 3], RGB: the picture of camera "static" or "wrist".

    Args:
      backdrop: of this scene and, for the static camera, of this size.
      shadows: let things cast shadows. Off by default: CALVIN's own pictures have none, and they double the time.
      tiled: work on the tiles that each solid meets; fast on a CPU one picture at a time, slow under `vmap`.
        Not with shadows.
    """
    view, tiles, moving = camera(state, camera_name), _Tiles.of(size), _moving(scene, state)
    whole = camera_name == "wrist" or shadows  # nothing is known beforehand
    things = _Things(*(_concatenate(*pair) for pair in zip(_fixed(scene), moving))) if whole else moving
    if shadows or (whole and not tiled):
        return tiles.picture(_look(scene, view, tiles, things, shadows=shadows).color)
    canvas = _empty(view, tiles) if whole else backdrop
    if tiled:
        return tiles.picture(_paint(scene, things, view, tiles, canvas))
    rays, origin, known = _rays(view, tiles), tuple(view.eye), canvas.depth.reshape(-1)
    depth, index = _trace(things, origin, rays, known)
    color = _packed(_shade(scene, things, origin, rays, depth, index, jnp.zeros(index.shape, bool)))
    return tiles.picture(jnp.where(index < 0, canvas.color.reshape(-1), color))


def _empty(view: Camera, tiles: _Tiles) -> Backdrop:
    """The floor alone."""
    depth, floor = _floor(tuple(view.eye), _rays(view, tiles))
    return Backdrop(*(plane.reshape(tiles.count**2, -1) for plane in (depth, _packed([floor] * 3))))


def _look(scene: Scene, view: Camera, tiles: _Tiles, things: _Things, *, shadows: bool) -> Backdrop:
    """Trace everything that there is, and the floor."""
    origin, rays = tuple(view.eye), _rays(view, tiles)
    depth, floor = _floor(origin, rays)
    depth, index = _trace(things, origin, rays, depth)
    shadow = jnp.zeros(depth.shape, bool)
    if shadows:
        shadow = _shadowed(things, tuple(origin[i] + depth * rays[i] for i in range(3)))
        floor = floor * jnp.where(shadow, _AMBIENT / (_AMBIENT + _DIFFUSE * _LIGHT[2]), 1.0)
    color = _packed(_shade(scene, things, origin, rays, depth, index, shadow))
    color = jnp.where(index < 0, _packed([floor] * 3), color)
    return Backdrop(*(plane.reshape(tiles.count**2, -1) for plane in (depth, color)))
