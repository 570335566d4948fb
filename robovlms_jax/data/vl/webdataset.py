"""Tar shards in WebDataset's layout, read at random by an index of where each member lies.

Members of a sample share everything before the first dot of their file name: `0007.jpg` with `0007.txt` (a caption) or
`0007.json` (a conversation as LLaVA has it, or an object with `caption`). Several pictures are `0007.0.jpg`,
`0007.1.jpg`.
"""

from __future__ import annotations

import json
import pathlib
import re
import tarfile
from typing import NamedTuple

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
                texts = [f"{key}.{kind}" for kind in _TEXTS if kind in names]
                pictures = tuple(f"{key}.{kind}" for kind in sorted(names, key=_number) if _is_picture(kind))
                if not texts:
                    raise ValueError(f"{path}: sample {key!r} has {sorted(names)}, but no text: {key}.txt or .json.")
                if not pictures:
                    lacking.append(f"{key} in {path.name}")
                    continue
                self._samples.append(self._sample(texts[0], pictures, f"{path}, sample {key!r}"))
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

    def describe(self, index: int) -> str:
        return f"{self.name}, sample {self._keys[index]!r}"

    def _index(self, number: int, path: pathlib.Path) -> dict[str, set[str]]:
        """Key of a sample -> endings of its members, in the order of the shard."""
        found: dict[str, set[str]] = {}
        try:
            with tarfile.open(path, "r:") as tar:  # compressed tars cannot be read at random
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    kind = kind.lower()
                    found.setdefault(key, set()).add(kind)
                    if self._members.setdefault(f"{key}.{kind}", (at := _place(number, member))) != at:
                        raise ValueError(f"{path}: {member.name} is there twice, or in a shard before it.")
            size = path.stat().st_size
            if any(m.offset + m.size > size for m in self._members.values() if m.shard == number):
                raise ValueError(f"{path} is cut off: it has {size} bytes. Download it again.")
        except tarfile.ReadError as error:
            raise ValueError(f"{path} is no plain tar file ({error}); unpack .tar.gz once with gunzip.") from None
        return found

    def _sample(self, text: str, pictures: tuple[str, ...], where: str) -> base.Sample:
        try:
            content = self.picture(text).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {text} is no text in UTF-8: {error}") from None
        if text.endswith(".json"):
            try:
                values = json.loads(content)
            except ValueError as error:
                raise ValueError(f"{where}: {text} is no JSON: {error}") from None
            if isinstance(values, dict) and ("conversations" in values or "messages" in values):
                return llava.sample_of({**values, "image": list(pictures)}, where)
            content = values.get("caption", "") if isinstance(values, dict) else ""
        if not content.strip() or len(pictures) > 1:
            raise ValueError(f"{where}: expected `conversations`, or one picture with a caption that is not empty.")
        return base.Sample(pictures, ((Turn(coco.QUESTION, content.strip()),),))


def _is_picture(kind: str) -> bool:
    return kind.rpartition(".")[2] in _PICTURES


def _number(kind: str) -> tuple[int, str]:
    """Pictures in the order of their numbers, not of their letters: 2.jpg before 10.jpg."""
    first = kind.partition(".")[0]
    return (int(first) if first.isdecimal() else -1, kind)


def _place(shard: int, member: tarfile.TarInfo) -> Member:
    return Member(shard, member.offset_data, member.size)
