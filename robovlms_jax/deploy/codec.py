"""msgpack with NumPy arrays, as openpi's and vla-eval's messages have them. What is read is taken for hostile.

Arrays are maps: openpi's keys are bytes (b"__ndarray__"), vla-eval's strings; both are read, whichever is asked for is
written. No message is ever unpickled, and none makes more than it has bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

KINDS = "biufSU"
"""Kinds of NumPy types that may come: numbers, truth values and text."""

TEXT = 4096
"""Characters of the longest text, in an array or not: a tokenizer takes seconds for millions of them."""

DecodeImage = Callable[[bytes], np.ndarray]
"""A PNG or JPEG file -> uint8[height, width, channels]. Raises ValueError."""


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A picture of a message that nobody has decoded yet: decoding takes a thousand times as long as unpacking, so that
    only pictures that a policy looks at are.

    pixels: -> uint8[height, width, channels]. Raises ValueError for a file that is none, or where the message's bounds
      are passed.
    """

    pixels: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a message may be."""

    message_bytes: int = 64 * 2**20
    items: int = 4096
    """Entries of a list or map."""
    items_in_all: int = 65_536
    """Entries of all of them together, each of which counts as one itself."""
    pictures: int = 16
    """Compressed pictures, each of which may become many more bytes than it has."""
    pixels: int = 16_000_000
    """Of all compressed pictures together."""
    text: int = TEXT
    """Characters of a text."""


def pack(value: Any, *, text_keys: bool = False) -> bytes:
    """A message.

    Args:
      value: maps, lists, text, numbers, bytes, None and NumPy arrays and scalars.
      text_keys: write arrays as vla-eval does, not as openpi does.
    Raises:
      TypeError: something else in it (a jax array: take np.asarray first). ValueError: an array of objects, records or
      complex numbers.
    """
    import msgpack

    def encode(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            entry = {"__ndarray__": True, "data": x.tobytes(), "dtype": _packable(x.dtype), "shape": x.shape}
        elif isinstance(x, np.generic):
            if text_keys:
                return x.item()
            entry = {"__npgeneric__": True, "data": x.item(), "dtype": _packable(x.dtype)}
        else:
            raise TypeError(f"a {type(x).__name__} cannot be sent; send NumPy arrays, numbers, text, lists and maps.")
        return entry if text_keys else {name.encode(): content for name, content in entry.items()}

    return msgpack.packb(value, default=encode, use_bin_type=True)


def _packable(dtype: np.dtype) -> str:
    if dtype.kind not in KINDS:
        raise ValueError(f"an array of {dtype} cannot be sent; convert it to float32 or another plain type.")
    return dtype.str


def unpack(message: bytes, bounds: Bounds, decode_image: DecodeImage | None = None) -> Any:
    """What a message holds; arrays are copies, so they can be written to and do not keep the message alive.
    vla-eval's compressed pictures are `Compressed`.

    Args:
      decode_image: for those; None: reading one raises.
    Raises:
      ValueError: says what is wrong with it and where.
    """
    import msgpack

    left = _Left(bounds, decode_image)

    def listed(entries: list) -> list:
        left.count("entries", 1 + len(entries))
        return entries

    def hook(entry: dict) -> Any:
        left.count("entries", 1 + len(entry))
        for tag, read in (("__ndarray__", _array), ("__npgeneric__", _scalar)):
            if tag.encode() in entry:
                return read({key.decode(): x for key, x in entry.items() if isinstance(key, bytes)})
            if tag in entry:
                return read(entry)
        if "__image__" not in entry:
            return entry
        if entry.get("format") == "raw":
            return _array(entry)
        left.count("compressed pictures", 1)
        if not isinstance(entry.get("data"), bytes):
            raise ValueError("a picture's data are no bytes.")
        return Compressed(functools.partial(left.decode, brief(entry.get("format"), 20), entry["data"]))

    if len(message) > bounds.message_bytes:
        raise ValueError(f"the message has {len(message)} bytes; at most {bounds.message_bytes} are read.")
    try:
        return msgpack.unpackb(
            message,
            object_hook=hook,
            list_hook=listed,
            raw=False,
            strict_map_key=True,
            max_map_len=bounds.items,
            max_array_len=bounds.items,
            max_str_len=bounds.text,
            max_bin_len=bounds.message_bytes,
            max_ext_len=0,
        )
    except ValueError as error:
        raise ValueError(f"the message cannot be read: {str(error) or type(error).__name__}") from error
    except Exception as error:  # msgpack raises several kinds for what is cut off, too deep or of an unknown type
        raise ValueError(f"the message is no msgpack map: {type(error).__name__} {error}".strip()) from error


class _Left:
    """How much of what is bounded together a message may still have."""

    def __init__(self, bounds: Bounds, decode_image: DecodeImage | None):
        self._most = {
            "entries": bounds.items_in_all,
            "compressed pictures": bounds.pictures,
            "pixels in them": bounds.pixels,
        }
        self._left, self._decode_image = dict(self._most), decode_image

    def count(self, what: str, number: int) -> None:
        self._left[what] -= number
        if self._left[what] < 0:
            raise ValueError(f"it has more than {self._most[what]} {what}.")

    def decode(self, kind: str, data: bytes) -> np.ndarray:
        """A compressed picture's pixels."""
        if self._decode_image is None or kind not in ("png", "jpeg"):
            raise ValueError(f"a picture of format {kind[:20]!r} is not read here; send it as uint8.")
        picture = self._decode_image(data)
        self.count("pixels in them", picture.shape[0] * picture.shape[1])
        return picture


def brief(value: Any, length: int) -> str:
    """The first characters of what a message has where something else was expected. Texts and bytes are cut before they
    are written out: str() of all that a message may hold takes a second, in which other robots would wait."""
    if isinstance(value, str | bytes):
        return str(value[:length])[:length]
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"[:length]
    if isinstance(value, list):
        inner = (
            x if isinstance(x, int | float) else brief(x, 20) if isinstance(x, str | bytes) else type(x).__name__
            for x in value[:20]
        )
        return f"[{', '.join(map(str, inner))}{', ...' if len(value) > 20 else ''}]"[:length]
    return type(value).__name__ if isinstance(value, dict | Compressed) else str(value)[:length]


def _array(entry: Mapping[str, Any]) -> np.ndarray:
    dtype, shape, data = _dtype(entry), entry.get("shape"), entry.get("data")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape) or len(shape) > 8:
        raise ValueError(f"an array's shape is {brief(shape, 80)}; expected up to eight whole numbers of 0 or more.")
    if not isinstance(data, bytes):
        raise ValueError(f"an array's data are a {type(data).__name__}, expected bytes.")
    expected = dtype.itemsize
    for n in shape:
        expected *= n
    if expected != len(data):
        raise ValueError(f"an array {dtype}{shape} needs {expected} bytes and has {len(data)}.")
    if not dtype.itemsize:  # text of no characters
        return np.zeros(shape, dtype) if not expected and np.prod(shape, dtype=object) <= 4096 else _too_many(shape)
    if not data:
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _too_many(shape: list[int]) -> np.ndarray:
    raise ValueError(f"an array of {shape} texts without characters is refused.")


def _scalar(entry: Mapping[str, Any]) -> Any:
    dtype, data = _dtype(entry), entry.get("data")
    if not isinstance(data, bool | int | float | str | bytes):
        raise ValueError(f"a scalar's data are a {type(data).__name__}.")
    if dtype.kind in "SU" and not isinstance(data, str | bytes):  # NumPy makes a number as many bytes
        raise ValueError(f"a scalar {dtype} has a {type(data).__name__} as its data, expected text.")
    try:
        with np.errstate(over="ignore"):  # 1e300 is infinite in float32
            return dtype.type(data)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{brief(data, 40)!r} is no {dtype}: {error}") from error


def _dtype(entry: Mapping[str, Any]) -> np.dtype:
    name = entry.get("dtype")
    try:
        if not isinstance(name, str) or len(name) > 16:
            raise TypeError("expected a text such as '<f4'")
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"an array's dtype is {brief(name, 40)!r}: {error}") from error
    if dtype.kind not in KINDS or dtype.hasobject or dtype.subdtype is not None:
        raise ValueError(f"an array's dtype is {name!r}; expected numbers, truth values or text.")
    if dtype.kind in "SU" and dtype.itemsize > 4 * TEXT:
        raise ValueError(f"an array's dtype is {name!r}; a text has at most {TEXT} characters.")
    return dtype
