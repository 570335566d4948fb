"""Frames in the order in which a program makes them, kept in two files until they are packed. Pictures are encoded as
they come, on all cores, so that packing copies them."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from robovlms_jax import cores
from robovlms_jax.data import base, frame_index, packing


class Spool:
    """A `packing.EncodedSource` that a program fills.

    Frame ids count from 0. `add` all frames, set `episodes`, then `packing.pack` it; `delete` removes the files. Files
    that are there already are continued.

    Args:
      path: file to make, of encoded pictures; the file PATH.rows beside it has their places and all numbers.
      image_sizes: camera -> (height, width). arrays: field -> number of values.
    """

    robot, action_units = base.Dataset.robot, base.Dataset.action_units
    statistics = None
    encoded_as: tuple[packing.Codec, int] = ("jpeg", packing.QUALITY)

    def __init__(self, path: pathlib.Path, image_sizes: Mapping[str, tuple[int, int]], arrays: Mapping[str, int]):
        self.name, self.image_sizes, self.arrays = str(path), dict(image_sizes), tuple(arrays)
        self.episodes: tuple[base.Episode, ...] = ()
        self._pictures, self._rows = path, path.with_name(f"{path.name}.rows")
        places = [("offset", np.int64), ("lengths", np.int32, (len(image_sizes),))]
        self._row = np.dtype([*places, *((name, np.float32, (size,)) for name, size in arrays.items())])
        for file in (self._pictures, self._rows):
            file.touch()
        rows = np.fromfile(self._rows, self._row)
        ends = _ends(rows)
        # A power failure may leave rows of zeros, or rows without their pictures.
        follows = rows["offset"] == np.append(0, ends[:-1])
        has = rows["lengths"] > 0  # all cameras of a frame, or none
        alike = (rows["lengths"] >= 0).all(axis=1) & (has == has[:, :1]).all(axis=1)
        whole = follows & alike & (ends > 0) & (ends <= self._pictures.stat().st_size)
        self.num_frames = len(whole)
        self.truncate(int(whole.argmin()) if not whole.all() else len(whole))

    def truncate(self, num_frames: int) -> None:
        """Keep the first `num_frames` frames. Raises ValueError when there are fewer."""
        if num_frames > self.num_frames:
            raise ValueError(f"{self.name} has {self.num_frames} frames, expected {num_frames}; record anew.")
        self.__dict__.pop("_stored", None)
        os.truncate(self._rows, num_frames * self._row.itemsize)
        ends = _ends(np.fromfile(self._rows, self._row))
        self._size, self.num_frames = int(ends[-1]) if num_frames else 0, num_frames
        os.truncate(self._pictures, self._size)

    def add(
        self,
        images: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        shown: np.ndarray | None = None,
    ) -> None:
        """Append T frames: camera -> uint8[n, height, width, 3], field -> float[T, d].

        Args:
          shown: int[n], rising: the frames, of these T, that the pictures are of; the others have none. None: all.
        Raises ValueError: the very first frame of all has no picture.
        """
        count, threads = len(next(iter(arrays.values()))), cores.usable()
        shown = np.arange(count) if shown is None else np.asarray(shown, np.int64)
        if self.num_frames == 0 and count and not (len(shown) and shown[0] == 0):
            raise ValueError(f"{self.name}: the first frame has no picture; a recording begins with one that has.")

        def encode(places: np.ndarray) -> list[list[bytes]]:
            return [
                [
                    packing.encode_image(
                        *self.encoded_as, image[place], f"{camera} image of frame {first + shown[place]}"
                    )
                    for camera, image in images.items()
                ]
                for place in places.tolist()
            ]

        first, images = self.num_frames, {camera: images[camera] for camera in self.image_sizes}  # in this order
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            parts = pool.map(encode, np.array_split(np.arange(len(shown)), threads))
            encoded = [frame for part in parts for frame in part]
        rows = np.zeros(count, self._row)
        sizes = [len(picture) for frame in encoded for picture in frame]
        rows["lengths"][shown] = np.reshape(sizes, (len(shown), len(images)))
        sizes = rows["lengths"].sum(axis=1, dtype=np.int64)
        rows["offset"] = self._size + np.cumsum(sizes) - sizes
        for name in self.arrays:
            rows[name] = arrays[name]
        with open(self._pictures, "ab") as file:  # first: no row names pictures that are not there
            file.write(b"".join(picture for frame in encoded for picture in frame))
        with open(self._rows, "ab") as file:
            rows.tofile(file)
        self._size, self.num_frames = self._size + int(sizes.sum()), self.num_frames + count
        self.__dict__.pop("_stored", None)

    @functools.cached_property
    def _stored(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows, and all pictures as uint8[bytes]."""
        pictures = np.memmap(self._pictures, np.uint8, "r") if self._size else np.zeros(0, np.uint8)
        return np.fromfile(self._rows, self._row), pictures

    @property
    def shows_all(self) -> bool:
        """Whether all frames have pictures."""
        return bool((self._stored[0]["lengths"] > 0).all())

    def encoded(self, frame_id: int) -> tuple[list[bytes], Mapping[str, np.ndarray]]:
        """A frame as `packing.EncodedSource` has it."""
        rows, pictures = self._stored
        row = rows[frame_id]
        ends = row["offset"] + np.cumsum(row["lengths"])
        spans = zip(ends - row["lengths"], ends, strict=True)
        return [pictures[begin:end].tobytes() for begin, end in spans], {name: row[name] for name in self.arrays}

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        pictures, arrays = self.encoded(frame_id)
        images = {camera: np.empty((*size, 3), np.uint8) for camera, size in self.image_sizes.items()}
        for picture, image in zip(pictures, images.values(), strict=True):
            if picture:
                frame_index.decode_image(picture, image)
            else:
                image[:] = 0
        return images, arrays

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_stored"}  # others read the files themselves

    def delete(self) -> None:
        self.__dict__.pop("_stored", None)
        for file in (self._pictures, self._rows):
            file.unlink(missing_ok=True)


def _ends(rows: np.ndarray) -> np.ndarray:
    """int64[n]: where the pictures of each row end."""
    return rows["offset"] + rows["lengths"].sum(axis=1, dtype=np.int64)
