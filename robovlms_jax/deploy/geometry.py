"""Distances between capsules and boxes. A capsule is a segment with a radius; a ball is one of length 0. In metres."""

from __future__ import annotations

import dataclasses

import numpy as np

_PARALLEL = 1e-12
_HALVINGS = 40
"""Golden-section steps of segment against box: the interval shrinks to 4e-9 of the segment."""


@dataclasses.dataclass(frozen=True)
class Capsule:
    """Everything within `radius` of the segment from `start` to `end`.

    name: for messages. touchable: contact with it is the task (a block to push), so it is kept at no distance.
    """

    name: str
    start: tuple[float, float, float]
    end: tuple[float, float, float]
    radius: float
    touchable: bool = False

    def __post_init__(self):
        for field in ("start", "end"):
            object.__setattr__(self, field, _point(self.name, field, getattr(self, field)))
        if not (np.isfinite(self.radius) and self.radius >= 0):
            raise ValueError(f"capsule {self.name!r}: radius={self.radius} must be a finite number of 0 or more.")


@dataclasses.dataclass(frozen=True)
class Box:
    """A box along the axes: centre and half its lengths."""

    name: str
    center: tuple[float, float, float]
    half: tuple[float, float, float]
    touchable: bool = False

    def __post_init__(self):
        for field in ("center", "half"):
            object.__setattr__(self, field, _point(self.name, field, getattr(self, field)))
        if min(self.half) < 0:
            raise ValueError(f"box {self.name!r}: half={self.half} must not be negative.")


Obstacle = Capsule | Box


def ball(name: str, center: tuple[float, float, float], radius: float, touchable: bool = False) -> Capsule:
    return Capsule(name, center, center, radius, touchable)


def _point(name: str, field: str, values: object) -> tuple[float, float, float]:
    """Three finite numbers of any array or list, copied: whoever changes it later makes a new obstacle."""
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"obstacle {name!r}: {field}={values!r} is no point: {error}") from error
    if found.shape != (3,) or not np.isfinite(found).all():
        raise ValueError(f"obstacle {name!r}: {field}={values!r}; expected three finite numbers in metres.")
    return tuple(found.tolist())


def segment_distance(p1: np.ndarray, q1: np.ndarray, p2: np.ndarray, q2: np.ndarray) -> np.ndarray:
    """Shortest distance between the segments p1-q1 and p2-q2, float[..., 3] each, broadcast; float[...].

    Ericson 2005, Real-Time Collision Detection, 5.1.9; segments of no length and parallel ones are handled.
    """
    d1, d2, r = q1 - p1, q2 - p2, p1 - p2
    a, e = _dot(d1, d1), _dot(d2, d2)
    b, c, f = _dot(d1, d2), _dot(d1, r), _dot(d2, r)
    determinant = a * e - b * b
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.where(determinant > _PARALLEL * a * e, np.clip((b * f - c * e) / determinant, 0, 1), 0.0)
        t = np.where(e > 0, (b * s + f) / e, 0.0)
        inside = np.clip(t, 0, 1)
        # where t had to be clamped, or segment 2 is a point, the nearest point of segment 1 is another
        again = np.clip((inside * b - c) / a, 0, 1)
        s = np.where(a > 0, np.where((t != inside) | (e <= 0), again, s), 0.0)
    t = inside
    gap = r + s[..., None] * d1 - t[..., None] * d2
    return np.sqrt(_dot(gap, gap))


def segment_box_distance(p: np.ndarray, q: np.ndarray, center: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Shortest distance between the segment p-q and a box along the axes, float[..., 3] each; float[...], never more
    than the true one by rounding, and less by at most 1e-8 of the segment's length.

    A point's distance to a box is convex along a segment, so a golden-section search finds the least.
    """
    d = q - p
    length = np.sqrt(_dot(d, d))

    def distance(t: np.ndarray) -> np.ndarray:
        outside = np.maximum(np.abs(p + t[..., None] * d - center) - half, 0)
        return np.sqrt(_dot(outside, outside))

    shape = np.broadcast_shapes(p.shape, center.shape)[:-1]
    low, high = np.zeros(shape), np.ones(shape)
    least = np.minimum(distance(low), distance(high))
    if not np.any(length):
        return least
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(_HALVINGS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        down = distance(left) <= distance(right)
        low, high = np.where(down, low, left), np.where(down, right, high)
    least = np.minimum(least, distance((low + high) / 2))
    return np.maximum(least - 1e-8 * length, 0)


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", x, y)


class Scene:
    """Obstacles as arrays, to be measured against many positions of a tool at once."""

    def __init__(self, obstacles: tuple[Obstacle, ...]):
        self._obstacles = obstacles
        avoided = [obstacle for obstacle in obstacles if not obstacle.touchable]
        capsules = [x for x in avoided if isinstance(x, Capsule)]
        boxes = [x for x in avoided if isinstance(x, Box)]
        self.names = [x.name for x in (*capsules, *boxes)]
        self._starts = np.array([x.start for x in capsules], np.float64).reshape(-1, 3)
        self._ends = np.array([x.end for x in capsules], np.float64).reshape(-1, 3)
        self._radii = np.array([x.radius for x in capsules], np.float64)
        self._centers = np.array([x.center for x in boxes], np.float64).reshape(-1, 3)
        self._halves = np.array([x.half for x in boxes], np.float64).reshape(-1, 3)
        self._balls = bool((self._starts == self._ends).all())

    def of(self, obstacles: tuple[Obstacle, ...]) -> Scene:
        """The scene of these obstacles: this one where they are the very same tuple. A list may hold others by now."""
        same = obstacles is self._obstacles and isinstance(obstacles, tuple)
        return self if same else Scene(obstacles)

    def clearance(self, positions: np.ndarray, tool: tuple[Capsule, ...]) -> np.ndarray:
        """Distance between surfaces, negative where they overlap capsules.

        Args:
          positions: float[..., 3], where the tool's origin is; `tool` is given relative to it, without turning.
        Returns:
          float[..., obstacles], the least over the tool's capsules; in the order of `names`.
        """
        least = None
        at = positions[..., None, :]
        for part in tool:
            p, q = at + part.start, at + part.end
            found = []
            if len(self._starts) and self._balls and part.start == part.end:
                gap = p - self._starts  # between points, ten times as fast as between segments
                found.append(np.sqrt(_dot(gap, gap)) - self._radii)
            elif len(self._starts):
                found.append(segment_distance(p, q, self._starts, self._ends) - self._radii)
            if len(self._centers):
                found.append(segment_box_distance(p, q, self._centers, self._halves))
            if found:
                clear = (found[0] if len(found) == 1 else np.concatenate(found, axis=-1)) - part.radius
                least = clear if least is None else np.minimum(least, clear)
        return np.full((*positions.shape[:-1], len(self.names)), np.inf) if least is None else least
