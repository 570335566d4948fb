"""What the base's camera sees, and a map for people. One picture at a time, NumPy only.

The camera is a wide-angle one, cylindrical: columns are equal angles, so boxes beside the base stay in view. A ray is
followed by its way over the floor: everything stands upright, so where it meets sides is the same for a whole column.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from robovlms_jax.driving.scenarios import CUP_RADIUS, ROBOT_RADIUS, ROOM, Layout

HEIGHT_M = 0.42
FIELD_RAD = np.deg2rad(150.0)
SIZE = (60, 96)
"""Height and width of the pictures, px."""
WALL_M = 2.2
STAND_M, MUG_M, MUG_RADIUS = 0.42, 0.2, 0.085
_UP, _DOWN = 0.62, -1.1
"""Tangents of the highest and lowest rows."""
_LIGHT = np.array([-0.45, -0.55, 0.7], np.float32)
_TILE_M = 0.5
_NEVER = 1e9

_FLOORS = np.array([[186, 160, 128], [160, 168, 176], [196, 186, 168], [142, 122, 104], [170, 182, 170]], np.float32)
_WALLS = np.array([[226, 222, 210], [206, 218, 228], [222, 214, 226], [214, 224, 208], [234, 226, 214]], np.float32)
_CARDBOARD = np.array([[186, 138, 88], [170, 122, 76], [200, 156, 104]], np.float32)
_SKY = np.array([176, 208, 236], np.float32)
_RED, _WHITE, _TAPE = np.array([[206, 44, 40], [244, 242, 238], [224, 206, 168]], np.float32)


class _Look(NamedTuple):
    """Colours of a room, float[3] each, and of its boxes, float[2, 3]."""

    floor: np.ndarray
    wall: np.ndarray
    boxes: np.ndarray
    bright: float


def _look(seed: int) -> _Look:
    rng = np.random.default_rng(seed)
    jitter = rng.uniform(0.92, 1.06, (4, 1)).astype(np.float32)
    boxes = _CARDBOARD[rng.integers(len(_CARDBOARD), size=2)] * jitter[2:]
    floor = _FLOORS[rng.integers(len(_FLOORS))] * jitter[0]
    return _Look(floor, _WALLS[rng.integers(len(_WALLS))] * jitter[1], boxes, rng.uniform(0.88, 1.05))


def render(layout: Layout, pose: np.ndarray, size: tuple[int, int] = SIZE, smooth: int = 1) -> np.ndarray:
    """The camera's picture.

    Args:
      layout: one room (N = 1). pose: float[3], x, y, heading.
      size: height and width, px. smooth: rays per pixel and axis.
    Returns:
      uint8[height, width, 3], RGB.
    """
    height, width = size[0] * smooth, size[1] * smooth
    look = _look(int(layout.look[0]))
    angle = pose[2] + FIELD_RAD * (0.5 - (np.arange(width) + 0.5) / width)
    slope = (_UP + (_DOWN - _UP) * (np.arange(height) + 0.5) / height)[:, None].astype(np.float32)
    way = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)  # [2, width]
    layout, pose = Layout(*(part.astype(np.float32) for part in layout)), pose.astype(np.float32)
    colour, near = _room(look, layout, pose, way, slope)
    for i in np.flatnonzero(layout.present[0]):
        colour, near = _box(look.boxes[i], layout.boxes[0, i], pose, way, slope, colour, near)
    colour = _cup(layout.cup[0], pose, way, slope, colour, near)
    colour = np.clip(colour * look.bright, 0, 255)
    if smooth > 1:
        colour = colour.reshape(size[0], smooth, size[1], smooth, 3).mean(axis=(1, 3))
    return colour.round().astype(np.uint8)


def _room(
    look: _Look, layout: Layout, pose: np.ndarray, way: np.ndarray, slope: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Floor, walls and what is above them: colour [height, width, 3] and way to it [height, width]."""
    low, high = np.array(ROOM).T
    edge = np.where(way > 0, high[:, None], low[:, None]) - pose[:2, None]
    with np.errstate(divide="ignore"):
        to_edge = edge / way
    axis = to_edge.argmin(axis=0)
    wall = to_edge.min(axis=0)
    with np.errstate(divide="ignore"):
        floor = np.where(slope < 0, -HEIGHT_M / slope, _NEVER)
    on_floor = floor < wall
    near = np.where(on_floor, floor, wall)
    z = HEIGHT_M + wall * slope
    x, y = pose[0] + way[0] * near, pose[1] + way[1] * near
    tiles = (np.floor(x / _TILE_M) + np.floor(y / _TILE_M)) % 2
    joint = np.minimum(np.abs(x / _TILE_M - np.round(x / _TILE_M)), np.abs(y / _TILE_M - np.round(y / _TILE_M))) < 0.02
    ground = look.floor * (1 - 0.07 * tiles - 0.18 * joint - 0.03 * np.minimum(near, 4))[..., None]
    ground = ground * _shadow(layout, x, y)[..., None]
    along = np.where(axis == 0, y, x)
    shade = np.where(axis == 0, 1.0, 0.9)
    board = z < 0.1
    window = (np.abs(along - 1.5 * np.round(along / 1.5)) < 0.42) & (z > 0.95) & (z < 1.75)
    frame = window & ((np.abs(along - 1.5 * np.round(along / 1.5)) > 0.38) | (np.abs(z - 1.35) < 0.03))
    sky = _SKY + 30 * np.clip(z - 1.2, -0.5, 0.5)[..., None]
    side = look.wall * (shade * (0.9 + 0.05 * np.clip(z, 0, 2)))[..., None]
    side = np.where(window[..., None], np.where(frame[..., None], _WHITE, sky), side)
    side = np.where(board[..., None], look.wall * 0.62, side)
    side = np.where((z > WALL_M)[..., None], 238.0, side)
    return np.where(on_floor[..., None], ground, side), near


def _shadow(layout: Layout, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How bright the floor is at x, y, in (0, 1]: things stand in a soft shadow."""
    light = np.ones_like(x)
    for i in np.flatnonzero(layout.present[0]):
        cx, cy, hx, hy, _ = layout.boxes[0, i]
        gap = np.hypot(np.maximum(np.abs(x - cx - 0.03) - hx, 0), np.maximum(np.abs(y - cy - 0.04) - hy, 0))
        light *= 1 - 0.5 * np.exp(-gap / 0.06)
    gap = np.maximum(np.hypot(x - layout.cup[0, 0] - 0.03, y - layout.cup[0, 1] - 0.04) - CUP_RADIUS, 0)
    return light * (1 - 0.45 * np.exp(-gap / 0.05))


def _box(
    cardboard: np.ndarray,
    box: np.ndarray,
    pose: np.ndarray,
    way: np.ndarray,
    slope: np.ndarray,
    colour: np.ndarray,
    near: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The picture with a box: float[5], see `Layout.boxes`."""
    center, half, top = box[:2], box[2:4], box[4]
    safe = np.where(np.abs(way) < 1e-9, 1e-9, way)
    first = (center - half - pose[:2])[:, None] / safe
    second = (center + half - pose[:2])[:, None] / safe
    enters, leaves = np.minimum(first, second), np.maximum(first, second)
    axis, t_in, t_out = enters.argmax(axis=0), enters.max(axis=0), leaves.min(axis=0)
    met = (t_in < t_out) & (t_in > 0)
    z = HEIGHT_M + t_in * slope
    on_side = met & (z >= 0) & (z <= top) & (t_in < near)
    with np.errstate(divide="ignore", invalid="ignore"):
        t_top = np.where(slope != 0, (top - HEIGHT_M) / slope, _NEVER)
    on_top = met & (t_top >= t_in) & (t_top <= t_out) & (t_top < near)
    hit = np.where(on_side, t_in, t_top)
    x, y = pose[0] + way[0] * hit - center[0], pose[1] + way[1] * hit - center[1]
    across, extent = np.where(axis == 0, y, x), np.where(axis == 0, half[1], half[0])
    # the face that looks towards the light is brighter
    normal = np.where(axis == 0, -np.sign(way[0]) * _LIGHT[0], -np.sign(way[1]) * _LIGHT[1])
    bright = np.where(on_side, 0.74 + 0.3 * normal, 1.08)
    tape = np.where(on_side, (np.abs(across) < 0.03) & (z > top * 0.72), np.abs(y) < 0.03)
    rim = on_side & ((np.abs(np.abs(across) - extent) < 0.012) | (np.abs(z - top) < 0.012) | (z < 0.015))
    face = np.where(tape[..., None], _TAPE, cardboard) * (bright * np.where(rim, 0.72, 1.0))[..., None]
    shown = on_side | on_top
    return np.where(shown[..., None], face, colour), np.where(shown, hit, near)


def _cup(
    cup: np.ndarray, pose: np.ndarray, way: np.ndarray, slope: np.ndarray, colour: np.ndarray, near: np.ndarray
) -> np.ndarray:
    """The picture with a white stand and a red cup on it."""
    parts = ((CUP_RADIUS, 0.0, STAND_M, _WHITE), (MUG_RADIUS, STAND_M, STAND_M + MUG_M, _RED))
    offset = cup - pose[:2]
    middle = offset @ way
    beside = way[0] * offset[1] - way[1] * offset[0]
    for radius, low, top, paint in parts:
        chord = np.sqrt(np.maximum(radius**2 - beside**2, 0))
        t_in, t_out = middle - chord, middle + chord
        met = (np.abs(beside) < radius) & (t_in > 0)
        z = HEIGHT_M + t_in * slope
        on_side = met & (z >= low) & (z <= top) & (t_in < near)
        with np.errstate(divide="ignore", invalid="ignore"):
            t_top = np.where(slope != 0, (top - HEIGHT_M) / slope, _NEVER)
        on_top = met & (t_top >= t_in) & (t_top <= t_out) & (t_top < near)
        shade = 1 - 0.42 * np.clip(beside / radius + 0.2, -1, 1) ** 2
        band = on_side & (low > 0) & (np.abs(z - low - 0.1) < 0.025)
        face = np.where(band[..., None], _WHITE, paint) * np.where(on_side, shade, 1.05)[..., None]
        face = np.where((on_top & (low > 0))[..., None], _WHITE * 0.86, face)
        shown = on_side | on_top
        colour = np.where(shown[..., None], face, colour)
        near = np.where(shown, np.where(on_side, t_in, t_top), near)
    return colour


MAP_SIZE = (150, 203)
"""Height and width of the map, px; the room's proportions."""


def draw_map(layout: Layout, pose: np.ndarray, trail: np.ndarray | None = None, scale: int = 1) -> np.ndarray:
    """The room from above, forward to the right: boxes, cup, base, and where it has been. For people, not for policies.

    Args:
      layout: one room. pose: float[3]. trail: float[T, 3], poses so far. scale: makes the map larger.
    Returns:
      uint8[height, width, 3].
    """
    height, width = MAP_SIZE[0] * scale, MAP_SIZE[1] * scale
    (x0, x1), (y0, y1) = ROOM
    x = x0 + (x1 - x0) * (np.arange(width) + 0.5)[None] / width
    y = y1 - (y1 - y0) * (np.arange(height) + 0.5)[:, None] / height
    x, y = np.broadcast_arrays(x, y)
    look = _look(int(layout.look[0]))
    tiles = (np.floor(x / _TILE_M) + np.floor(y / _TILE_M)) % 2
    image = look.floor * (1.05 - 0.07 * tiles)[..., None] * _shadow(layout, x, y)[..., None]

    def paint(mask: np.ndarray, colour: np.ndarray | tuple[float, float, float]) -> None:
        image[mask] = colour

    for i in np.flatnonzero(layout.present[0]):
        cx, cy, hx, hy, _ = layout.boxes[0, i]
        inside = (np.abs(x - cx) <= hx) & (np.abs(y - cy) <= hy)
        paint(inside, look.boxes[i])
        paint(inside & (np.abs(y - cy) < 0.025), _TAPE)
    for px, py, _ in [] if trail is None else trail:
        paint(np.hypot(x - px, y - py) < 0.022, (40, 92, 190))
    away = np.hypot(x - layout.cup[0, 0], y - layout.cup[0, 1])
    paint(away < CUP_RADIUS, _WHITE)
    paint(away < MUG_RADIUS, _RED)
    forward = (x - pose[0]) * np.cos(pose[2]) + (y - pose[1]) * np.sin(pose[2])
    aside = (y - pose[1]) * np.cos(pose[2]) - (x - pose[0]) * np.sin(pose[2])
    body = np.hypot(forward, aside) < ROBOT_RADIUS
    paint(body, (52, 62, 78))
    paint(body & (forward > 0.02) & (np.abs(aside) < 0.13 - forward), (250, 200, 60))
    return np.clip(image, 0, 255).round().astype(np.uint8)
