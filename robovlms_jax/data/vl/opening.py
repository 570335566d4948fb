"""A path -> the collection of pictures and texts behind it, by what it holds."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from robovlms_jax import json_files
from robovlms_jax.data import notices
from robovlms_jax.data.vl import base, coco, llava, pictures, webdataset
from robovlms_jax.data.vl.config import VLConfig


def open_all(config: VLConfig, paths: Mapping[str, str], max_unreadable: float | None = None) -> dict[str, base.Pairs]:
    """Name -> collection, of config.paths or config.validation.

    Args:
      max_unreadable: share of a collection's pictures that may be found to be no pictures; None: none is looked at.
    Raises: as `open_pairs` and `pictures.require_readable`, naming the source.
    """
    found = {}
    for name, path in paths.items():
        try:
            whole = open_pairs(path, config.images.get(name))
            if max_unreadable is not None:
                pictures.require_readable(whole, max_unreadable)
            found[name] = base.EachTurn(whole) if config.turns == "each" else whole
        except (ValueError, OSError) as error:
            raise notices.about(f"source {name!r}", error) from None
    return found


def open_pairs(path: str, images: str | None = None) -> base.Pairs:
    """Open a file or shards.

    Args:
      images: folder that the pictures' paths begin in; None: the file's own.
    Raises:
      FileNotFoundError: it, or pictures, are missing. ValueError: it is of no known kind, means nothing, or is empty.
    """
    folder = None if images is None else pathlib.Path(images)
    place = pathlib.Path(path)
    if path.endswith(".tar") or place.is_dir():
        if images is not None:
            raise ValueError(f"{path}: data.vl.images={images!r} has no effect, for tar shards hold their pictures.")
        pairs: base.Pairs = webdataset.WebDataset(path)
    elif not place.is_file():
        raise FileNotFoundError(f"no file {path}; expected *.json, *.jsonl, *.tar or a folder of tar shards.")
    elif place.suffix == ".jsonl":
        pairs = llava.LlavaPairs(place, folder)
    elif place.suffix == ".json":
        values = json_files.read(place)
        if isinstance(values, dict) and "annotations" in values:
            pairs = coco.CocoCaptions(values, place, folder)
        else:
            pairs = llava.LlavaPairs(place, folder)
    else:
        packed = path.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
        hint = " Shards are read at random, so unpack the compression once, such as with gunzip." if packed else ""
        raise ValueError(f"{path}: expected *.json, *.jsonl, *.tar or a folder of tar shards.{hint}")
    if len(pairs) == 0:
        raise ValueError(f"{path} holds no sample, so this source would run dry at its first batch.")
    return pairs
