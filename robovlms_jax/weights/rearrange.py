"""How one tensor is laid out anew on its way into a parameter: einops-style patterns that work on slices."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable

import numpy as np

PART = re.compile(r"(\d+)/(\d+)")
"""An axis "1/3" of a pattern: the second of three parts."""


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """An einops-style pattern; the source may have groups, the target names each axis alone: "(n h) d -> d n h".

    So the target's shape fixes every size, and each slice of the target comes from one slice of the source. An axis
    "1/3" of the source has three entries, of which the target has the second; an axis "1" is dropped.
    """

    source: tuple[tuple[str, ...], ...]
    target: tuple[str, ...]

    @classmethod
    def parse(cls, pattern: str, ndim: int) -> Rearrange:
        """Read a pattern for a target of `ndim` axes; empty: the identity. Raises ValueError on a bad one."""
        return _parse(pattern, ndim)

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape the source must have to become a target of `shape`."""
        sizes = self._sizes(shape)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.source)

    def forward(
        self, read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], index: tuple[slice, ...]
    ) -> np.ndarray:
        """Slice `index` of the target.

        Args:
          read: slices of the source -> array; called once, with no more than the wanted part needs (where an inner axis
            of a group is cut, the rows it is part of).
          shape: of the whole target.
          index: one slice of step 1 per target axis.
        """
        sizes = self._sizes(shape)
        wanted = {axis: slice(*cut.indices(sizes[axis])[:2]) for axis, cut in zip(self.target, index)}
        wanted |= {axis: slice(part, part + 1) for axis, (part, _) in self._parts.items()}
        ranges, shapes, cuts = [], [], []
        for group in self.source:
            begin, stride, free = 0, math.prod(sizes[axis] for axis in group), True
            length = stride
            for axis in group:
                stride //= sizes[axis]
                # A range can shrink while every axis further out is one index wide; axes further in come whole.
                cut = wanted[axis] if free else slice(0, sizes[axis])
                if free:
                    begin, length = begin + cut.start * stride, (cut.stop - cut.start) * stride
                free = free and cut.stop - cut.start == 1
                shapes.append(cut.stop - cut.start)
                cuts.append(slice(wanted[axis].start - cut.start, wanted[axis].stop - cut.start))
            ranges.append(slice(begin, begin + length))
        axes = [axis for group in self.source for axis in group]
        x = read(tuple(ranges)).reshape(shapes)[tuple(cuts)]
        order = [axes.index(axis) for axis in (*self._parts, *self.target)]
        return x.transpose(order).reshape([cut.stop - cut.start for cut in map(wanted.get, self.target)])

    def backward(self, *parts: np.ndarray) -> np.ndarray:
        """Whole targets, in the order of their parts (one where the source has no parts) -> the source."""
        axes = [axis for group in self.source for axis in group]
        names = [*self._parts, *self.target]
        x = np.stack(parts) if len(parts) > 1 else parts[0]
        x = x.reshape([self._parts[axis][1] for axis in self._parts] + list(parts[0].shape))
        return x.transpose([names.index(axis) for axis in axes]).reshape(self.source_shape(parts[0].shape))

    @property
    def _parts(self) -> dict[str, tuple[int, int]]:
        """Axis of the source that the target has not -> (which of its entries is taken, of how many)."""
        found = {axis: PART.match(axis) for group in self.source for axis in group}
        return {axis: (int(match[1]), int(match[2])) for axis, match in found.items() if match}

    def _sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(self.target, shape)) | {axis: count for axis, (_, count) in self._parts.items()}


@functools.cache
def _parse(pattern: str, ndim: int) -> Rearrange:
    if not pattern:
        axes = tuple(f"axis{i}" for i in range(ndim))
        return Rearrange(tuple((axis,) for axis in axes), axes)
    left, arrow, right = pattern.partition("->")
    ones = itertools.count()  # axes "1" are parts, too, and need names of their own
    left = re.sub(r"(?<![\w/])1(?![\w/])", lambda _: f"0/1/{next(ones)}", left)
    groups = tuple(tuple((many or one).split()) for many, one in re.findall(r"\(([^()]*)\)|([\w/]+)", left))
    target = tuple(right.split())
    axes = [axis for group in groups for axis in group if not PART.match(axis)]
    if not arrow or "(" in right or sorted(axes) != sorted(target) or len(set(axes)) != len(axes):
        raise ValueError(
            f"pattern {pattern!r} must name the same axes on both sides, each once, and group them only on the left."
        )
    parts = [(int(part), int(count)) for part, count in PART.findall(left) if count != "1"]
    if len(parts) > 1 or any(part >= count for part, count in parts):
        raise ValueError(f"pattern {pattern!r} may take one part, counted from 0: 0/3, 1/3 or 2/3.")
    if len(target) != ndim:
        raise ValueError(f"pattern {pattern!r} makes {len(target)} axes, but the parameter has {ndim}.")
    return Rearrange(groups, target)
