"""Conversations about pictures as LLaVA and its successors publish them: a JSON list, or JSON lines.

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                     {"from": "gpt", "value": "A table."}]}

`image` may be a list (or `images`), and absent where there is only text; `messages` with `role` and `content`, as
ShareGPT has it, is read as well.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from robovlms_jax import json_files
from robovlms_jax.data.vl import base
from robovlms_jax.inputs.conversations import MARK, Turn

_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


class LlavaPairs(base.Pairs):
    """A file of conversations, checked when it is opened.

    Args:
      path: *.json or *.jsonl.
      images: folder that the pictures' paths begin in; None: the file's own.
    Raises:
      FileNotFoundError: pictures are missing; counts and names them.
      ValueError: an entry means nothing; names it and what is wrong.
    """

    def __init__(self, path: pathlib.Path, images: pathlib.Path | None = None):
        self.name = str(path)
        self._entries = list(_entries(path))
        self._folder = base.Folder(path.parent if images is None else images)
        self._samples = [
            sample_of(entry, f"{path}, entry {number}") for number, entry in enumerate(self._entries, start=1)
        ]
        self._ids = [entry.get("id") for entry in self._entries]
        del self._entries
        names = {name for sample in self._samples for name in sample.pictures}
        base.require_pictures(
            self.name,
            self._folder.missing(names),
            len(names),
            f"Paths begin in {self._folder.root}; name another folder with --data.vl.images.",
        )

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
        return f"{self.name}, entry {index + 1}" + ("" if self._ids[index] is None else f" (id {self._ids[index]})")


def sample_of(entry: Any, where: str) -> base.Sample:
    """One entry, checked. Raises ValueError that begins with `where`."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected an object with `conversations`, found {type(entry).__name__}.")
    if "video" in entry:
        raise ValueError(f"{where} is about a video ({entry['video']}); only pictures are read. Leave it out.")
    pictures = pictures_of(entry, where)
    turns = _turns(entry, where)
    marks = marks_of(entry, where)
    if marks == 0 and len(pictures) == 1:  # some files leave the only mark out
        turns = [Turn(f"{MARK}\n{turns[0].question}", turns[0].answer), *turns[1:]]
    elif marks != len(pictures):
        raise ValueError(f"{where}: {marks} marks {MARK} in the questions for {len(pictures)} pictures.")
    return base.Sample(tuple(pictures), (tuple(turns),))


def pictures_of(entry: Mapping[str, Any], where: str) -> list[str]:
    """Paths of an entry's pictures; none where `image` is absent or null, as tables of text alone have it. Raises
    ValueError that begins with `where`."""
    found = next((entry[name] for name in ("image", "images") if entry.get(name) is not None), [])
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(name, str) and name.strip() for name in found):
        raise ValueError(
            f"{where}: image={found!r}; expected a path or a list of paths, or no `image` where there is only text."
        )
    return found


def marks_of(entry: Mapping[str, Any], where: str) -> int:
    """How many pictures its questions show. Raises ValueError that begins with `where`."""
    return sum(turn.question.count(MARK) for turn in _turns(entry, where))


def _turns(entry: Mapping[str, Any], where: str) -> list[Turn]:
    said = entry.get("conversations", entry.get("messages"))
    if not isinstance(said, list) or not said:
        raise ValueError(f"{where}: `conversations` (or `messages`) must be a list of turns; it has {sorted(entry)}.")
    spoken = []
    for part in said:
        part = part if isinstance(part, Mapping) else {}
        who, text = part.get("from", part.get("role")), part.get("value", part.get("content"))
        if not isinstance(text, str) or who not in (*_ASKS, *_ANSWERS, "system"):
            raise ValueError(
                f"{where}: a turn is {dict(part)!r}; expected from human or gpt (role user or assistant) with a text."
            )
        if who != "system":
            spoken.append((who in _ASKS, text))
    if [asks for asks, _ in spoken] != [True, False] * (len(spoken) // 2) or not spoken:
        raise ValueError(f"{where}: turns must alternate, a question first and an answer last; it has {len(spoken)}.")
    return [Turn(question, answer) for (_, question), (_, answer) in zip(spoken[::2], spoken[1::2], strict=True)]


def _entries(path: pathlib.Path) -> Any:
    if path.suffix != ".jsonl":
        found = json_files.read(path)
        if not isinstance(found, list):
            raise ValueError(f"{path} holds a {type(found).__name__}; expected a list of conversations.")
        yield from found
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield json.loads(text)
            except ValueError as error:  # UnicodeDecodeError is one
                raise ValueError(f"{path}, line {number} is no JSON in UTF-8: {error}") from None
