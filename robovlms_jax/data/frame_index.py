"""Encoded images inside large files: where each frame's bytes lie, how to fetch and decode them.

Knows nothing of a dataset: any set of files will do as long as one byte span per frame and camera can be named, so
shards written by `packed.py` and record files of other projects are read by the same code.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import simplejpeg
from PIL import Image

from robovlms_jax.data import base
from robovlms_jax.data import storage as storages

MAX_GAP = 256
"""Bytes that are read along rather than read around: record files put a few bytes between the images of a camera."""

_FILE = 2**44
"""More bytes than a file has: puts places in all files on one axis."""


class FrameIndex:
    """Byte spans of N frames.

    Args:
      storage: the files that `file_id` counts into; paths stand for local files.
      cameras: names of the columns of `offset`, `length` and `checksum`.
      file_id: int[N].
      offset, length: int[N, cameras], in bytes. Length 0: nothing was recorded, the image is black.
      checksum: uint32[N, cameras], CRC32C of the encoded image; None when there is none to compare with.
      resize: whether images of another size than asked for are scaled to it (Lanczos) or refused.

    Arrays may be memory-mapped. Reads may come from many threads.
    """

    def __init__(
        self,
        storage: storages.Storage | Sequence[pathlib.Path],
        cameras: Sequence[str],
        file_id: np.ndarray,
        offset: np.ndarray,
        length: np.ndarray,
        checksum: np.ndarray | None = None,
        *,
        resize: bool = False,
    ):
        self.storage = storage if isinstance(storage, storages.Storage) else storages.LocalFiles(storage)
        self.cameras = tuple(cameras)
        self._file_id, self._offset, self._length, self._checksum = file_id, offset, length, checksum
        self._resize = resize

    def read(self, rows: np.ndarray, cameras: Sequence[str]) -> dict[str, list[memoryview]]:
        """Encoded bytes per camera, one entry per row; fetched as `decode` does. Raises CorruptFrameError."""
        spans: dict[str, list[Any]] = {camera: [None] * len(rows) for camera in cameras}
        for camera, place, data in self._spans(rows, cameras):
            spans[camera][place] = data
        return spans

    def decode(self, rows: np.ndarray, out: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Fill the arrays in `out`, camera -> n arrays uint8[height, width, 3].

        Spans that lie close together in a file are fetched by one read: a frame whose cameras are stored side by side
        costs one, and so does a run of frames of one camera. Raises CorruptFrameError.
        """
        for camera, place, data in self._spans(rows, list(out)):
            row, image, column = rows[place], out[camera][place], self.cameras.index(camera)
            if len(data) == 0:
                image[:] = 0
                continue
            try:
                if self._checksum is not None and google_crc32c.value(bytes(data)) != self._checksum[row, column]:
                    raise ValueError("its bytes are not those that were indexed; was the file changed?")
                if self._resize and image_size(data) != image.shape[:2]:
                    decode_resized(data, image)
                else:
                    decode_image(data, image)
            except (ValueError, OSError, SyntaxError) as error:
                file, offset = self.storage.files[self._file_id[row]], self._offset[row, column]
                raise base.CorruptFrameError(f"{file}: {camera} image at byte {offset}: {error}") from error

    def _spans(self, rows: np.ndarray, cameras: Sequence[str]) -> Iterator[tuple[str, int, memoryview]]:
        """Camera, place in `rows` and encoded bytes of every image, in the order of the files."""
        if len(rows) == 0 or not cameras:
            return
        columns = [self.cameras.index(camera) for camera in cameras]
        # Camera by camera, frame by frame, then in the order of the files.
        files = np.tile(self._file_id[rows].astype(np.int64), len(columns))
        starts = self._offset[np.ix_(rows, columns)].T.ravel()
        lengths = self._length[np.ix_(rows, columns)].T.ravel()
        where = files * _FILE + starts
        order = np.argsort(where, kind="stable")
        files, starts, lengths, where = files[order], starts[order], lengths[order], where[order]
        breaks = (np.flatnonzero(where[1:] > np.maximum.accumulate(where + lengths)[:-1] + MAX_GAP) + 1).tolist()
        camera_of, place_of = (values.tolist() for values in np.divmod(order, len(rows)))
        file_of, begins, sizes = files.tolist(), starts.tolist(), lengths.tolist()
        for first, last in zip([0, *breaks], [*breaks, len(order)], strict=True):
            origin = begins[first]
            end = max(begins[index] + sizes[index] for index in range(first, last))
            data = memoryview(self._fetch(file_of[first], origin, end - origin))
            for index in range(first, last):
                begin = begins[index] - origin
                yield cameras[camera_of[index]], place_of[index], data[begin : begin + sizes[index]]

    def is_stored(self, rows: np.ndarray, camera: str) -> np.ndarray:
        """bool[n]: whether the rows have an image of this camera."""
        return self._length[rows, self.cameras.index(camera)] > 0

    def close(self) -> None:
        """Release the files; the next read opens them again."""
        self.storage.close()

    def _fetch(self, file: int, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        try:
            data = self.storage.read(file, offset, length)
        except OSError as error:
            raise base.CorruptFrameError(f"{self.storage.files[file]} cannot be read: {error}") from error
        if len(data) != length:
            raise base.CorruptFrameError(
                f"{self.storage.files[file]} ends within the {length} bytes expected at byte {offset}."
            )
        return data


def decode_resized(data: bytes | memoryview, out: np.ndarray) -> None:
    """`decode_image` of an image of any size, scaled to that of `out`. Raises as it does."""
    stored = np.empty((*image_size(data), 3), np.uint8)
    decode_image(data, stored)
    out[:] = np.asarray(Image.fromarray(stored).resize((out.shape[1], out.shape[0]), Image.Resampling.LANCZOS))


def is_encoded_image(data: bytes | memoryview) -> bool:
    """Whether bytes begin as a JPEG, PNG, WebP or BMP does."""
    head = bytes(data[:12])
    if head[:2] == b"BM":  # so begin sentences, too; a bitmap knows its length
        return int.from_bytes(head[2:6], "little") == len(data)
    return head[:3] == b"\xff\xd8\xff" or head[:4] == b"\x89PNG" or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """(height, width) of an encoded image, from its header. Raises ValueError or OSError."""
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg_header(data)[:2]
    with _opened(data) as image:
        return image.height, image.width


def decode_image(data: bytes | memoryview, out: np.ndarray) -> None:
    """Decode a JPEG, PNG, WebP or BMP, told apart by its first bytes, into uint8[height, width, 3] RGB.

    Grey levels become equal colours, transparency is dropped. Raises ValueError, OSError or, from Pillow, SyntaxError.
    """
    if data[:2] == b"\xff\xd8":
        _require_size(image_size(data), out)
        # Straight into `out`: no copy.
        simplejpeg.decode_jpeg(data, "RGB", buffer=out)
        return
    with _opened(data) as image:
        _require_size((image.height, image.width), out)
        out[:] = np.asarray(image.convert("RGB"))


def _opened(data: bytes | memoryview) -> Image.Image:
    """An image whose header is read. Raises ValueError or OSError."""
    if not is_encoded_image(data):
        raise ValueError(
            f"neither JPEG nor PNG, WebP or BMP: {len(data)} bytes that begin with {bytes(data[:4])!r}; are these "
            "pixels that were not encoded?"
        )
    image = Image.open(io.BytesIO(data))
    if image.mode[0] in "IF":  # more than 8 bits: converted to RGB, all would be white
        raise ValueError(f"the {image.format} has one channel of more than 8 bits ({image.mode}): a depth image?")
    return image


def _require_size(size: tuple[int, int], out: np.ndarray) -> None:
    if (*size, 3) != out.shape:
        raise ValueError(
            f"the image is {(*size, 3)}, expected {out.shape}; where a dataset has images of several sizes, "
            "--data.image_size 224 scales them to one."
        )
