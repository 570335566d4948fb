"""Captions in COCO's format: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from robovlms_jax.data.vl import base
from robovlms_jax.inputs.conversations import DESCRIBE, MARK, Turn

QUESTION = f"{MARK}\n{DESCRIBE}"
"""What captions without a question answer."""


class CocoCaptions(base.Pairs):
    """A sample for each picture with captions, of which one is drawn whenever it comes.

    Args:
      values: the file's content. path: the file. images: folder of the pictures; None: the file's own.
    Raises:
      FileNotFoundError: pictures are missing. ValueError: a caption is no text or of a picture that is not listed, or
        nothing is captioned.
    """

    def __init__(self, values: Mapping[str, Any], path: pathlib.Path, images: pathlib.Path | None = None):
        self.name, self._folder = str(path), base.Folder(path.parent if images is None else images)
        wrong = [name for name in ("images", "annotations") if not isinstance(values.get(name), list)]
        if wrong:
            raise ValueError(f"{path}: {wrong[0]}={values.get(wrong[0])!r:.60}; expected a list.")
        try:
            files = _files(values["images"], path)
            captions = [(note["image_id"], note["caption"]) for note in values["annotations"] if "caption" in note]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: an entry lacks {error}; expected images with id and file_name, annotations with image_id and "
                "caption."
            ) from None
        wrong = [caption for _, caption in captions if not isinstance(caption, str)]
        if wrong:
            raise ValueError(f"{path}: a caption is {wrong[0]!r:.60}; expected text.")
        strangers = sorted({str(image) for image, _ in captions if not _is_id(image) or image not in files})
        if strangers:
            raise ValueError(f"{path}: captions of pictures that `images` does not list: {', '.join(strangers[:3])}.")
        per_file = collections.defaultdict(list)
        for image, caption in captions:
            if caption.strip():
                per_file[files[image]].append((Turn(QUESTION, caption.strip()),))
        self._samples = [base.Sample((file,), tuple(choices)) for file, choices in per_file.items()]
        missing = self._folder.missing(per_file)
        hint = f"They are looked for in {self._folder.root}; name another folder with --data.vl.images."
        base.require_pictures(self.name, missing, len(per_file), hint)

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> base.Sample:
        return self._samples[index]

    def picture(self, name: str) -> bytes:
        return self._folder.read(name)

    def edges(self, name: str, head: int, tail: int) -> tuple[bytes, bytes, int]:
        return self._folder.edges(name, head, tail)

    def place(self, name: str) -> str:
        return str(self._folder.root / name)

    def describe(self, index: int) -> str:
        return f"{self.name}, captions of {self._samples[index].pictures[0]}"


def _files(images: Sequence[Mapping[str, Any]], path: pathlib.Path) -> dict[int | str, str]:
    """Id -> file name. Raises ValueError: names the entry that means nothing, or an id of two pictures."""
    files: dict[int | str, str] = {}
    for image in images:
        number, name = image["id"], image["file_name"]
        if not _is_id(number) or not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{path}: an image has id {number!r:.60} and file_name {name!r:.60}; expected a number or text, and a "
                "path."
            )
        if files.setdefault(number, name) != name:
            raise ValueError(f"{path}: image id {number!r} is both {files[number]} and {name}; give each its own.")
    return files


def _is_id(number: Any) -> bool:
    return isinstance(number, int | str)
