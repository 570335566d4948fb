"""Tar shards in WebDataset's layout, read at random by an index of where each member lies.

Members of a sample share everything before the first dot of their file name: `0007.jpg` with `0007.txt` (a caption) or
`0007.json` (a conversation as LLaVA has it, or an object with `caption`); of both, the .json counts where it says
something. Several pictures are `0007.0.jpg`, `0007.1.jpg`; a conversation without marks of pictures needs none.
"""

from __future__ import annotations

import json
import pathlib
import re
import tarfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from robovlms_jax.data.vl import base, coco, llava
from robovlms_jax.inputs.conversations import Turn

_PICTURES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("json", "txt")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Member(NamedTuple):
    """Bytes of a file: number of the shard, where they begin, how many there are."""

    shard: int
    offset: int
    size: int


def shards(pattern: str) -> list[pathlib.Path]:
    """A tar file, a folder of them, or `{000000..000099}` for all numbers between. Raises FileNotFoundError by name."""
    braces = _BRACES.search(pattern)
    if braces:
        low, high = braces.groups()
        numbers = range(int(low), int(high) + 1)
        paths = [pathlib.Path(_BRACES.sub(f"{number:0{len(low)}d}", pattern, count=1)) for number in numbers]
    else:
        path = pathlib.Path(pattern)
        paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"{pattern}: {len(missing)} of {len(paths)} shards are not there: {missing[:3]}.")
    return paths


class WebDataset(base.Pairs):
    """Samples of all shards. Opening reads every header and every text once, no picture.

    Raises:
      FileNotFoundError: shards, or pictures of samples, are missing; counts and names them.
      ValueError: a shard is cut off or compressed, or a sample means nothing.
    """

    def __init__(self, pattern: str):
        self.name, self._shards = pattern, shards(pattern)
        self._members: dict[str, Member] = {}
        self._samples: list[base.Sample] = []
        self._keys: list[str] = []
        lacking: list[str] = []
        for number, path in enumerate(self._shards):
            for key, names in self._index(number, path).items():
                texts = [names[kind] for kind in _TEXTS if kind in names]
                pictures = tuple(names[kind] for kind in sorted(names, key=_number) if _is_picture(kind))
                if not texts:
                    raise ValueError(f"{path}: sample {key!r} has {sorted(names)}, but no text: {key}.txt or .json.")
                sample = self._sample(texts, pictures, f"{path}, sample {key!r}")
                if sample is None:
                    lacking.append(f"{key} in {path.name}")
                    continue
                self._samples.append(sample)
                self._keys.append(key)
        total = len(self._samples) + len(lacking)
        base.require_pictures(self.name, lacking, total, "Write the shards anew, or take these samples' texts out.")

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> base.Sample:
        return self._samples[index]

    def picture(self, name: str) -> bytes:
        shard, offset, size = self._members[name]
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"{self._shards[shard]} ends within {name}.")
        return data

    def edges(self, name: str, head: int, tail: int) -> tuple[bytes, bytes, int]:
        shard, offset, size = self._members[name]
        with self._shards[shard].open("rb") as file:
            return base.edges_of(file, offset, size, head, tail)

    def place(self, name: str) -> str:
        path = self._shards[self._members[name].shard]
        return f"{name.removeprefix(f'{path.name}/{self._members[name].shard}/')} in {path}"

    def describe(self, index: int) -> str:
        return f"{self.name}, sample {self._keys[index]!r}"

    def _index(self, number: int, path: pathlib.Path) -> dict[str, dict[str, str]]:
        """Key of a sample -> endings of its members and their names in `_members`, in the order of the shard.

        Shards may begin their keys anew: a name that an earlier one has gets the shard's number.
        """
        found: dict[str, dict[str, str]] = {}
        try:
            with tarfile.open(path, "r:") as tar:  # compressed tars cannot be read at random
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    kind = kind.lower()
                    if kind in found.setdefault(key, {}):
                        raise ValueError(f"{path}: {member.name} is there twice.")
                    full = f"{key}.{kind}"
                    full = f"{path.name}/{number}/{full}" if full in self._members else full
                    self._members[full], found[key][kind] = _place(number, member), full
                end = tar.offset
            size = path.stat().st_size
            if any(m.offset + m.size > size for m in self._members.values() if m.shard == number):
                raise ValueError(f"{path} is cut off: it has {size} bytes. Download it again.")
            _require_end(path, end)
        except tarfile.ReadError as error:
            if "unexpected end" in str(error):
                raise ValueError(f"{path} is cut off: it ends within a member. Download it again.") from None
            raise ValueError(f"{path} is no plain tar file ({error}); unpack .tar.gz once with gunzip.") from None
        return found

    def _sample(self, texts: Sequence[str], pictures: tuple[str, ...], where: str) -> base.Sample | None:
        """What the first of `texts` that has a conversation or a caption says; None: its pictures are missing."""
        caption = ""
        for text in texts:
            content = self._text(text, where)
            if text.endswith(".json"):
                values = _object(content, f"{where}: {text}")
                if "conversations" in values or "messages" in values:
                    if not pictures and (llava.pictures_of(values, where) or llava.marks_of(values, where)):
                        return None
                    return llava.sample_of({**values, "image": list(pictures)}, where)
                content = values.get("caption")  # of metadata that has none the caption is the .txt
                if not isinstance(content, str | None):
                    raise ValueError(f"{where}: {text} has caption={content!r:.60}; expected text.")
            caption = caption or (content or "").strip()
        if not pictures:
            return None
        if not caption or len(pictures) > 1:
            raise ValueError(f"{where}: expected `conversations`, or one picture with a caption that is not empty.")
        return base.Sample(pictures, ((Turn(coco.QUESTION, caption),),))

    def _text(self, name: str, where: str) -> str:
        try:
            return self.picture(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {name} is no text in UTF-8: {error}") from None


def _require_end(path: pathlib.Path, offset: int) -> None:
    """Raise ValueError where something else than a tar's end, blocks of zeros, follows its last member: Python's module
    takes a header that it cannot read, or a missing one, for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.read(512)
        if len(rest) < 512:
            raise ValueError(f"{path} is cut off: no end follows its last member. Download it again.")
        while rest:
            if any(rest):
                raise ValueError(f"{path} is damaged: byte {offset:,} begins no member, and it is not the end either.")
            rest = file.read(1 << 20)


def _object(content: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} is a {type(values).__name__}; expected an object with `conversations` or `caption`.")
    return values


def _is_picture(kind: str) -> bool:
    return kind.rpartition(".")[2] in _PICTURES


def _number(kind: str) -> tuple[int, str]:
    """Pictures in the order of their numbers, not of their letters: 2.jpg before 10.jpg."""
    first = kind.partition(".")[0]
    return (int(first) if first.isdecimal() else -1, kind)


def _place(shard: int, member: tarfile.TarInfo) -> Member:
    return Member(shard, member.offset_data, member.size)
