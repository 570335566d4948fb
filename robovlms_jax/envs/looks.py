"""How a simulator's table may look otherwise than in training: camera, light, surfaces, things nobody asks for.

A `Look` is plain data that goes with a trial's start (`Env.reset(..., look=...)`), so that every policy meets the same.
PlayTable can change every part, the real CALVIN all but those of `WHY_NOT`.
"""

from __future__ import annotations

import colorsys
import dataclasses
from typing import NamedTuple

import numpy as np

Triple = tuple[float, float, float]

KINDS = ("distractors", "camera", "lighting", "texture")
WHY_NOT = {"lighting": "calvin_env's cameras ask PyBullet for pictures under its fixed light and take no other"}
"""Kind -> why CALVIN's adapter does not offer it."""

NUM_THINGS = 3


class Thing(NamedTuple):
    """A box that nobody asks for, standing on the table. It is drawn and touches nothing, neither arm nor blocks.

    center, half: m, world frame. color: RGB in [0, 1].
    """

    center: Triple
    half: Triple
    color: Triple


@dataclasses.dataclass(frozen=True)
class Look:
    """What differs from the usual; the defaults change nothing.

    eye_shift_m, target_shift_m: how far the static camera, and the point that it looks at, are moved, world frame.
    light: direction towards the light, a unit vector; None: the simulator's own. brightness, tint: factors of all
    colours, of each channel. wood: RGB in [0, 1] of table and cabinet; None: the table's own. grain: rings, contrast
    and waviness of the wood, where it is drawn. things: boxes on the table.
    """

    eye_shift_m: Triple = (0.0, 0.0, 0.0)
    target_shift_m: Triple = (0.0, 0.0, 0.0)
    light: Triple | None = None
    brightness: float = 1.0
    tint: Triple = (1.0, 1.0, 1.0)
    wood: Triple | None = None
    grain: Triple | None = None
    things: tuple[Thing, ...] = ()

    def __post_init__(self):
        if len(self.things) > NUM_THINGS:
            raise ValueError(f"a look has {len(self.things)} things; expected at most {NUM_THINGS}.")


_TABLE_TOP_M = 0.44
_TABLE_X_M, _TABLE_Y_M = (-0.41, 0.41), (-0.13, -0.02)
_CLEAR_M = 0.08  # between a thing's centre and where blocks start, or a button
# Clearly none of the three blocks' red, blue and pink.
_COLORS = (
    (0.1, 0.6, 0.15),
    (0.95, 0.8, 0.1),
    (0.95, 0.5, 0.05),
    (0.1, 0.65, 0.65),
    (0.95, 0.95, 0.9),
    (0.25, 0.25, 0.25),
)


def draw(kind: str, number: int, blocks_x_m: tuple[float, float], button_x_m: float) -> Look:
    """The `number`-th look of a kind; the same for everybody who asks.

    Args:
      blocks_x_m: where blocks start, range of x. button_x_m: x of the button. Things stand clear of both.
    Raises ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of look {kind!r}; known: {', '.join(KINDS)}.")
    rng = np.random.default_rng([KINDS.index(kind), number])
    if kind == "camera":  # a picture is about 0.73 m wide at the table
        return Look(
            eye_shift_m=_triple(rng.uniform(-0.25, 0.25, 3)), target_shift_m=_triple(rng.uniform(-0.03, 0.03, 3))
        )
    if kind == "lighting":
        azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(np.deg2rad(30), np.deg2rad(75))
        light = np.array([np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.sin(height)])
        warm = rng.uniform(-0.15, 0.15)
        return Look(light=_triple(light), brightness=float(rng.uniform(0.65, 1.15)), tint=(1 + warm, 1.0, 1 - warm))
    if kind == "texture":
        wood = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.95))
        grain = (float(rng.integers(1, 7)), rng.uniform(0.05, 0.16), rng.uniform(0.3, 2.0))
        return Look(wood=_triple(wood), grain=_triple(grain))
    colors = rng.permutation(len(_COLORS))[:NUM_THINGS]
    return Look(things=tuple(_thing(rng, _COLORS[color], blocks_x_m, button_x_m) for color in colors))


def _thing(rng: np.random.Generator, color: Triple, blocks_x_m: tuple[float, float], button_x_m: float) -> Thing:
    half = rng.uniform(0.015, 0.032, 3)
    while True:
        x, y = rng.uniform(*_TABLE_X_M), rng.uniform(*_TABLE_Y_M)
        clear = min(abs(x - button_x_m), max(blocks_x_m[0] - x, x - blocks_x_m[1]))
        if clear > _CLEAR_M:
            return Thing((float(x), float(y), float(_TABLE_TOP_M + half[2])), _triple(half), color)


def _triple(values: np.ndarray | tuple[float, float, float]) -> Triple:
    x, y, z = (float(value) for value in values)
    return x, y, z
