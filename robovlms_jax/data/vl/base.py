"""What a collection of pictures with text about them offers, whatever its storage format."""

from __future__ import annotations

import abc
import os
import pathlib
from collections.abc import Collection
from typing import BinaryIO, NamedTuple

from robovlms_jax.inputs.conversations import MARK, Turn


class Sample(NamedTuple):
    """pictures: what `Pairs.picture` takes, one for each. choices: conversations about them, of which one is drawn
    whenever the sample comes."""

    pictures: tuple[str, ...]
    choices: tuple[tuple[Turn, ...], ...]


class Pairs(abc.ABC):
    """Random access to samples by number. Picklable; reads may come from many threads.

    name: where they came from, for messages.
    """

    name: str

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def sample(self, index: int) -> Sample:
        """Raises ValueError that names what is wrong with it."""

    @abc.abstractmethod
    def picture(self, name: str) -> bytes:
        """An encoded picture of a sample. Raises OSError or ValueError."""

    @abc.abstractmethod
    def edges(self, name: str, head: int, tail: int) -> tuple[bytes, bytes, int]:
        """The first and the last bytes of a picture, so many at most, and how many it has. Raises as `picture`."""

    @abc.abstractmethod
    def place(self, name: str) -> str:
        """Where a picture is, for messages."""

    def describe(self, index: int) -> str:
        """The sample, for messages."""
        return f"{self.name}, sample {index}"


class EachTurn(Pairs):
    """Every question with its answer as a sample of its own: for conversations whose turns do not build on each other.

    All pictures are shown with every one of them.
    """

    def __init__(self, whole: Pairs):
        self.name, self._whole = whole.name, whole
        self._places = [
            (index, choice, turn)
            for index in range(len(whole))
            for choice, turns in enumerate(whole.sample(index).choices)
            for turn in range(len(turns))
        ]

    def __len__(self) -> int:
        return len(self._places)

    def sample(self, index: int) -> Sample:
        number, choice, place = self._places[index]
        found = self._whole.sample(number)
        turn = found.choices[choice][place]
        question = f"{MARK}\n" * len(found.pictures) + turn.question.replace(f"{MARK}\n", "").replace(MARK, "")
        return Sample(found.pictures, ((Turn(question, turn.answer),),))

    def picture(self, name: str) -> bytes:
        return self._whole.picture(name)

    def edges(self, name: str, head: int, tail: int) -> tuple[bytes, bytes, int]:
        return self._whole.edges(name, head, tail)

    def place(self, name: str) -> str:
        return self._whole.place(name)

    def describe(self, index: int) -> str:
        number, _, place = self._places[index]
        return f"{self._whole.describe(number)}, question {place + 1}"


class Folder:
    """Pictures below one folder. Names are relative paths, or absolute ones."""

    def __init__(self, root: pathlib.Path):
        self.root = root

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def edges(self, name: str, head: int, tail: int) -> tuple[bytes, bytes, int]:
        """As `Pairs.edges`."""
        with (self.root / name).open("rb") as file:
            return edges_of(file, 0, file.seek(0, os.SEEK_END), head, tail)

    def missing(self, names: Collection[str]) -> list[str]:
        """Those that are not there, or are folders; every folder is listed once."""
        listed: dict[pathlib.Path, set[str]] = {}
        out = []
        for name in sorted(set(names)):
            path = self.root / name
            if path.parent not in listed:
                there = path.parent.is_dir()
                listed[path.parent] = _files(path.parent) if there else set()
            if path.name not in listed[path.parent]:
                out.append(name)
        return out


def edges_of(file: BinaryIO, begin: int, size: int, head: int, tail: int) -> tuple[bytes, bytes, int]:
    """`Pairs.edges` of `size` bytes of a file from `begin` on."""
    file.seek(begin)
    first = file.read(min(head, size))
    file.seek(begin + max(size - tail, 0))
    return first, file.read(min(tail, size)), size


def _files(folder: pathlib.Path) -> set[str]:
    with os.scandir(folder) as entries:  # which knows of most entries what they are
        return {entry.name for entry in entries if not entry.is_dir()}


def require_pictures(where: str, missing: Collection[str], total: int, hint: str) -> None:
    """Raises FileNotFoundError that counts and names what is missing of `total` pictures."""
    if missing:
        named = ", ".join(sorted(missing)[:3])
        raise FileNotFoundError(f"{where}: {len(missing)} of {total} pictures are missing, among them {named}. {hint}")
