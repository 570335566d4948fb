"""Which features of info.json are cameras, and their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robovlms_jax.data.lerobot import meta


def is_depth(key: str, feature: Mapping[str, Any]) -> bool:
    """Whether a camera's pictures are distances, or have one channel: never RGB."""
    details = {**(feature.get("info") or {}), **(feature.get("video_info") or {}), **feature}
    if any(details.get(name) for name in ("is_depth_map", "video.is_depth_map")):
        return True
    if any(word in key.lower() for word in ("depth", "disparity")):
        return True
    if details.get("video.channels") == 1 or str(details.get("video.pix_fmt", "")).startswith("gray"):
        return True
    shape = feature["shape"]
    return len(shape) == 2 or (len(shape) == 3 and 1 in (shape[0], shape[2]))


def by_name(info: meta.Info) -> dict[str, str]:
    """Short name -> feature key of every RGB camera: "observation.images.top" is "top" where no other is."""
    keys = [key for key, feature in info.features.items() if feature.get("dtype") in ("image", "video")]
    keys = [key for key in keys if not is_depth(key, info.features[key])]
    short = [key.rpartition(".")[2] for key in keys]
    return {name if short.count(name) == 1 else key: key for name, key in zip(short, keys, strict=True)}
