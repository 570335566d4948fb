"""What numbers and images show about a description that does not fit them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np

from robovlms_jax.data import features, frame_index, notices, statistics
from robovlms_jax.data import storage as storages

logger = logging.getLogger(__name__)

_TRIED = 16
_COMPARED = 32
"""Images per camera of which one must be readable, and whose sizes are compared, spread over the episodes."""


def warn_of_state(values: statistics.Statistics, encoding: str, where: str) -> None:
    """Log, once, a state that cannot be what its encoding says: degrees, millimetres, no quaternion."""
    if encoding == "NONE":
        return
    low, high = values.proprio["min"], values.proprio["max"]

    def check(part: slice, limit: float, what: str) -> None:
        smallest, largest = float(low[part].min()), float(high[part].max())
        if max(-smallest, largest) > limit:
            notices.once(
                logger,
                f"{where}: the state's numbers {part.start} to {part.stop - 1} run from {smallest:.4g} to "
                f"{largest:.4g}: {what} (state_encoding {encoding}); describe the state as data/README.md says, with "
                "radians(x) for degrees",
            )

    if encoding == "JOINT":
        check(slice(0, 7), 4 * math.pi, "too much for joints in radians")
        return
    check(slice(0, 3), 10.0, "too far for a position in metres")
    if encoding == "POS_EULER":
        check(slice(3, 6), 2 * math.pi * 1.01, "too much for angles in radians")
    else:
        check(slice(3, 7), 1.01, "too much for a quaternion of length 1")


def image_sizes(
    storage: storages.Storage, cameras: Mapping[str, str], arrays: Mapping[str, np.ndarray], where: str
) -> dict[str, list[tuple[int, int]]]:
    """Camera -> distinct (height, width) of a sample of its images, the first one's first.

    Args:
      cameras: camera -> field.
    Raises ValueError where there are images and none that was tried can be decoded. Cameras without any are left out.
    """
    sizes: dict[str, list[tuple[int, int]]] = {}
    for column, (camera, path) in enumerate(cameras.items()):
        stored = np.flatnonzero(arrays["length"][:, column])
        if not len(stored):
            logger.warning("%s: camera %s (%s) is left out: no frame has an image", where, camera, path)
            continue
        spread = stored[np.linspace(0, len(stored) - 1, min(len(stored), _COMPARED)).astype(int)]
        found: dict[tuple[int, int], None] = {}
        problem = ""
        for row in np.unique(np.concatenate([stored[:_TRIED], spread])).tolist():
            try:
                place = (int(arrays[name][row, column]) for name in ("offset", "length"))
                data = storage.read(int(arrays["file_id"][row]), *place)
                size = frame_index.image_size(data) if found else features.decode_any(data).shape[:2]
                found.setdefault(tuple(size))
            except (OSError, ValueError, SyntaxError) as error:
                problem = problem or str(error)
        if not found:
            raise ValueError(f"{where}: none of the first images of {path} (camera {camera}) can be read: {problem}")
        sizes[camera] = list(found)
    return sizes


def require_one_size(sizes: Mapping[str, list[list[int]]], where: str) -> None:
    """Raises ValueError where a camera's images have several sizes."""
    several = {camera: [tuple(size) for size in found] for camera, found in sizes.items() if len(found) > 1}
    if several:
        raise ValueError(
            f"{where} has images of several sizes (height, width): {several}; pass --data.image_size 224 (what most "
            "backbones see) to scale them to one."
        )
