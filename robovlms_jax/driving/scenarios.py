"""The eight navigation scenarios of the mobile robot's design documents, as layouts of a room.

An id is number of boxes x orientation x side. The robot starts at one end of the room, a cup stands at the other, and
boxes stand in between: `vert` boxes stand upright (narrow, tall), `hori` boxes lie (wide, low). How each is to be
passed follows from the id:

- one box: on the side that is named;
- two upright boxes, "the left path between them": past the near one on its left, through the gap between the two, and
  past the far one on its right; the right path is its mirror image. The documents do not say what they mean by the
  path; this reading is the one in which the robot does drive between the boxes;
- two lying boxes: round both on the side that is named.

Lengths in metres, angles in radians; x is forward from where robots start, y is left.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from robovlms_jax import schema

Side = Literal["left", "right"]

ROOM = ((-0.8, 3.8), (-1.7, 1.7))
"""x and y of the walls."""
ROBOT_RADIUS = 0.16
CUP_RADIUS = 0.12
"""Of the stand that the cup is on."""
MAX_BOXES = 2
SIGNS = {"left": 1, "right": -1}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """sides: on which side the near box is passed, then the far one. weight: difficulty (the user's repository)."""

    name: str
    orientation: Literal["vert", "hori"]
    sides: tuple[Side, ...]
    weight: float


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("1box_vert_left", "vert", ("left",), 1.0),
        Scenario("1box_vert_right", "vert", ("right",), 1.0),
        Scenario("1box_hori_left", "hori", ("left",), 1.2),
        Scenario("1box_hori_right", "hori", ("right",), 1.1),
        Scenario("2box_vert_left", "vert", ("left", "right"), 1.5),
        Scenario("2box_vert_right", "vert", ("right", "left"), 1.4),
        Scenario("2box_hori_left", "hori", ("left", "left"), 1.8),
        Scenario("2box_hori_right", "hori", ("right", "right"), 1.6),
    )
}


class Layout(NamedTuple):
    """N rooms.

    boxes: float[N, 2, 5]: centre x, y, half lengths along x, y, and height; present: bool[N, 2].
    signs: int[N, 2], +1 = to be passed on the left, -1 = on the right.
    cup: float[N, 2]. start: float[N, 3], x, y, heading. look: int[N], what colours are drawn from.
    """

    boxes: np.ndarray
    present: np.ndarray
    signs: np.ndarray
    cup: np.ndarray
    start: np.ndarray
    look: np.ndarray


def find(name: str) -> Scenario:
    """Raises ValueError that lists the ids."""
    if name not in SCENARIOS:
        raise ValueError(f"no scenario {name!r}{schema.nearest(name, SCENARIOS)} There are {', '.join(SCENARIOS)}.")
    return SCENARIOS[name]


def draw(scenario: str, seed: int) -> Layout:
    """One room (N = 1). The left and the right scenario of a kind with one seed are the same room, so that nothing but
    the instruction says where to go. Raises ValueError for an unknown scenario."""
    wanted = find(scenario)
    kind = scenario.rpartition("_")[0]
    rng = np.random.default_rng([zlib.crc32(kind.encode()), seed])
    count = len(wanted.sides)
    boxes = np.zeros((1, MAX_BOXES, 5))
    upright = wanted.orientation == "vert"
    for i in range(count):
        if upright:
            half, height = rng.uniform(0.13, 0.17, 2), rng.uniform(0.45, 0.6)
        else:
            half, height = np.array([rng.uniform(0.12, 0.16), rng.uniform(0.26, 0.34)]), rng.uniform(0.22, 0.3)
        if count == 1:
            x, y = rng.uniform(1.1, 1.7), rng.uniform(-0.25, 0.25)
        elif upright:
            x, y = (rng.uniform(0.85, 1.0), rng.uniform(2.15, 2.3))[i], rng.uniform(-0.15, 0.15)
        else:
            x, y = (rng.uniform(1.0, 1.15), rng.uniform(1.8, 2.0))[i], rng.uniform(-0.2, 0.2)
        boxes[0, i] = (x, y, *half, height)
    return Layout(
        boxes,
        np.arange(MAX_BOXES)[None] < count,
        np.array([[*(SIGNS[side] for side in wanted.sides), *([1] * (MAX_BOXES - count))]]),
        np.array([[rng.uniform(2.6, 3.0) + 0.25 * (count - 1), rng.uniform(-0.4, 0.4)]]),
        np.array([[rng.uniform(-0.15, 0.15), rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)]]),
        np.array([rng.integers(2**31)]),
    )


def stack(layouts: Sequence[Layout]) -> Layout:
    """Several as one."""
    return Layout(*(np.concatenate(parts) for parts in zip(*layouts, strict=True)))


def rows(layout: Layout, chosen: Sequence[int] | np.ndarray) -> Layout:
    return Layout(*(part[np.asarray(chosen, int)] for part in layout))
