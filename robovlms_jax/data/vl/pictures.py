"""Whether a collection's pictures can be decoded, as far as their first and last bytes tell: whoever trains for hours
should learn of a download that broke off before, not in between."""

from __future__ import annotations

import concurrent.futures
import logging

import numpy as np

from robovlms_jax.data import frame_index
from robovlms_jax.data.vl import base

logger = logging.getLogger(__name__)

HEAD, TAIL = 32, 12
"""Bytes of a picture that are looked at: formats say in these what they are, and end in a way of their own."""
_MANY = 10_000  # of which something is said, for they may take seconds
_READERS = 16  # at a time: on a network's disks each waits for a millisecond
REMEDY = "Get it anew, or take its sample out."
"""What helps against a picture that cannot be decoded."""


def require_readable(pairs: base.Pairs, max_share: float) -> None:
    """Say which pictures cannot be decoded; one that is damaged in its middle is found when it is read.

    Raises ValueError: they are more than `max_share` of all, by which training would end in its middle.
    """
    names = sorted({name for index in range(len(pairs)) for name in pairs.sample(index).pictures})
    if len(names) > _MANY:
        logger.info("%s: looking at the first and last bytes of %d pictures", pairs.name, len(names))
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        doubtful = [name for name, whole in zip(names, pool.map(lambda x: _ends_well(pairs, x), names)) if not whole]
        reasons = dict(zip(doubtful, pool.map(lambda x: _reason(pairs, x), doubtful)))
    broken = [f"{pairs.place(name)} ({reason})" for name, reason in reasons.items() if reason]
    if not broken:
        return
    said = f"{pairs.name}: {len(broken)} of {len(names)} pictures cannot be decoded, among them {'; '.join(broken[:3])}"
    if len(broken) > max_share * len(names):
        raise ValueError(
            f"{said}. That is more than data.max_corrupt_share={max_share}. Get them anew, or take their samples out."
        )
    logger.warning("%s. Their samples are replaced by others; get them anew, or take the samples out.", said)


def decode(data: bytes) -> np.ndarray:
    """uint8[height, width, 3]. Raises as `frame_index.decode_image`."""
    out = np.empty((*frame_index.image_size(data), 3), np.uint8)
    frame_index.decode_image(data, out)
    return out


def _ends_well(pairs: base.Pairs, name: str) -> bool:
    """Whether nothing speaks against a picture; of what cannot be read, or is unusual, `_reason` says more."""
    try:
        head, tail, size = pairs.edges(name, HEAD, TAIL)
    except (OSError, ValueError):
        return False
    if head[:3] == b"\xff\xd8\xff":
        return tail[-2:] == b"\xff\xd9"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        deep = head[24:25] > b"\x08"  # of one channel it would be a depth image
        return tail[4:8] == b"IEND" and not deep
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 == size
    return False


def _reason(pairs: base.Pairs, name: str) -> str:
    """Why a picture cannot be decoded; "" where it can."""
    try:
        decode(pairs.picture(name))
    except (OSError, ValueError, SyntaxError) as error:
        return str(error)
    return ""
