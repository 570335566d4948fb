"""Facts and pictures as one binary message of a page's websocket."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg

_QUALITY = 88


def pack(facts: Mapping[str, Any], pictures: Mapping[str, bytes]) -> bytes:
    """uint32 (little-endian) length of the JSON, the JSON, and the JPEG files, whose names and lengths are in it under
    "pictures"."""
    names = [[name, len(data)] for name, data in pictures.items()]
    text = json.dumps({**facts, "pictures": names}, separators=(",", ":")).encode()
    return b"".join((struct.pack("<I", len(text)), text, *pictures.values()))


def jpeg(picture: np.ndarray) -> bytes:
    """uint8[height, width, 3] as a JPEG file."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=_QUALITY, colorspace="RGB")


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The reverse of `pack`."""
    (length,) = struct.unpack_from("<I", message)
    facts, at, pictures = json.loads(message[4 : 4 + length]), 4 + length, {}
    for name, size in facts.pop("pictures"):
        pictures[name], at = message[at : at + size], at + size
    return facts, pictures
