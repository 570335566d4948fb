"""Pictures that were decoded once, kept in memory: reading a dataset many times over is mostly decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Decode = Callable[[np.ndarray, Mapping[str, Sequence[np.ndarray]]], None]
"""(rows int[n], camera -> n arrays to fill with their pictures)."""


class Pictures:
    """The pictures of the first rows of a dataset, as many as there is room for: rows are drawn at random, so that it
    does not matter which are kept. Memory is taken as rows are read. Reads may come from many threads.

    Args:
      num_rows: of the dataset. sizes: camera -> (height, width), px. limit: bytes.
      shown: bool[num_rows], which rows have pictures: there is no room for the others. None: all.
    """

    def __init__(
        self, num_rows: int, sizes: Mapping[str, tuple[int, int]], limit: int, shown: np.ndarray | None = None
    ):
        self.num_rows = min(num_rows, limit // sum(3 * height * width for height, width in sizes.values()))
        self._place = None if shown is None else np.where(shown, np.cumsum(shown) - 1, num_rows)
        self._pictures = {camera: np.empty((self.num_rows, *size, 3), np.uint8) for camera, size in sizes.items()}
        self._has = {camera: np.zeros(self.num_rows, bool) for camera in sizes}

    def fill(self, rows: np.ndarray, out: Mapping[str, Sequence[np.ndarray]], decode: Decode) -> None:
        """Fill `out` with the pictures of rows int[n]; those that are not kept yet are decoded. Raises as `decode`
        does, and keeps nothing of such a call."""
        places = rows if self._place is None else self._place[rows]
        room = places < self.num_rows
        known = room.copy()
        for camera in out:
            known[room] &= self._has[camera][places[room]]
        for camera, images in out.items():
            kept = self._pictures[camera]
            for place in np.flatnonzero(known).tolist():
                images[place][...] = kept[places[place]]
        new = np.flatnonzero(~known)
        if not len(new):
            return
        decode(rows[new], {camera: [images[place] for place in new.tolist()] for camera, images in out.items()})
        new = new[room[new]]
        for camera, images in out.items():
            for place in new.tolist():
                self._pictures[camera][places[place]] = images[place]
            self._has[camera][places[new]] = True  # after the pictures, for other threads
