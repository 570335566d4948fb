"""Encoded images inside large files: where each frame's bytes lie, how to fetch and decode them.

Knows nothing of a dataset: any set of files will do as long as one byte span per frame and camera can be named, so
shards written by `packed.py` and record files of other projects are read by the same code.
"""

from __future__ import annotations

import io
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from robovlms_jax.data import base


class FrameIndex:
    """Byte spans of N frames.

    Args:
      files: the files that `file_id` counts into.
      cameras: names of the columns of `offset` and `length`.
      file_id: int[N].
      offset, length: int[N, cameras], in bytes.

    Arrays may be memory-mapped. Files are opened on first use and read with `pread`, so threads share one handle
    without a lock; handles are not pickled.
    """

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        cameras: Sequence[str],
        file_id: np.ndarray,
        offset: np.ndarray,
        length: np.ndarray,
    ):
        self.files, self.cameras = tuple(files), tuple(cameras)
        self._file_id, self._offset, self._length = file_id, offset, length
        self._handles: dict[int, int] = {}
        self._opening = threading.Lock()

    def read(self, rows: np.ndarray, cameras: Sequence[str]) -> dict[str, list[memoryview]]:
        """Encoded bytes per camera, one entry per row.

        Spans that follow each other in a file are fetched by one `pread`: a frame whose cameras are stored side by side
        costs one, and so does a whole run of such frames. Raises CorruptFrameError.
        """
        columns = sorted(self.cameras.index(camera) for camera in cameras)
        files = np.repeat(self._file_id[rows], len(columns))
        starts = self._offset[np.ix_(rows, columns)].ravel()
        ends = starts + self._length[np.ix_(rows, columns)].ravel()
        breaks = np.flatnonzero((files[1:] != files[:-1]) | (starts[1:] != ends[:-1])) + 1
        spans = []
        for first, last in zip([0, *breaks], [*breaks, len(files)], strict=True):
            origin = int(starts[first])
            data = memoryview(self._pread(int(files[first]), origin, int(ends[last - 1]) - origin))
            spans += [
                data[start - origin : end - origin]
                for start, end in zip(starts[first:last].tolist(), ends[first:last].tolist(), strict=True)
            ]
        return {self.cameras[column]: spans[place :: len(columns)] for place, column in enumerate(columns)}

    def decode(self, rows: np.ndarray, out: Mapping[str, np.ndarray]) -> None:
        """Fill the arrays in `out`, camera -> uint8[n, height, width, 3]. Raises CorruptFrameError."""
        if len(rows) == 0 or not out:
            return
        for camera, spans in self.read(rows, list(out)).items():
            for row, data, image in zip(rows, spans, out[camera], strict=True):
                try:
                    decode_image(data, image)
                except (ValueError, OSError, SyntaxError) as error:
                    place = self._offset[row, self.cameras.index(camera)]
                    raise base.CorruptFrameError(
                        f"{self.files[self._file_id[row]]}: {camera} image at byte {place}: {error}"
                    ) from error

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        with self._opening:
            while self._handles:
                os.close(self._handles.popitem()[1])

    def _pread(self, file: int, offset: int, length: int) -> bytes:
        try:
            handle = self._handles.get(file)
            if handle is None:
                with self._opening:
                    if file not in self._handles:
                        self._handles[file] = os.open(self.files[file], os.O_RDONLY)
                    handle = self._handles[file]
            data = os.pread(handle, length, offset)
        except OSError as error:
            raise base.CorruptFrameError(f"{self.files[file]} cannot be read: {error}") from error
        if len(data) != length:
            raise base.CorruptFrameError(
                f"{self.files[file]} ends within the {length} bytes expected at byte {offset}."
            )
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_handles", "_opening")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _handles={}, _opening=threading.Lock())

    def __del__(self):
        if hasattr(self, "_opening"):
            self.close()


def decode_image(data: bytes | memoryview, out: np.ndarray) -> None:
    """Decode a JPEG or PNG, told apart by its first bytes, into uint8[height, width, 3] RGB.

    Raises ValueError, OSError or, from Pillow, SyntaxError.
    """
    if data[:2] == b"\xff\xd8":
        # Straight into `out`: no copy. A buffer that is too small is refused, one that is too large shows in the shape.
        shape = simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape
    elif data[:4] == b"\x89PNG":
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
        shape = pixels.shape
        if shape == out.shape:
            out[:] = pixels
    else:
        raise ValueError(f"neither JPEG nor PNG: {len(data)} bytes that begin with {bytes(data[:4])!r}.")
    if shape != out.shape:
        raise ValueError(f"the image is {shape}, expected {out.shape}.")
