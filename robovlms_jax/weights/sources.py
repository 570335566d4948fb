"""Where weights come from: safetensors or PyTorch files, read slice by slice."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import safetensors

from robovlms_jax.weights import deepspeed, torch_files

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


class Source(Protocol):
    """Named tensors that can be read in parts."""

    name: str
    """For messages."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor there is."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice of one tensor, in its stored type; nothing else is read."""


class ArraySource:
    """Tensors already in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str = "arrays"):
        self.name = name
        self.shapes = {key: tuple(value.shape) for key, value in arrays.items()}
        self._arrays = arrays

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(self._arrays[name][index])


class SafetensorsSource:
    """One or more safetensors files. Opening reads only their headers; tensors are memory-mapped."""

    def __init__(self, files: list[pathlib.Path], name: str):
        self.name = name
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        for path in files:
            file = _open(path)
            for key in file.keys():  # noqa: SIM118 - not a dict; it cannot be iterated
                if key in self._files:
                    raise ValueError(
                        f"{path} repeats tensor {key!r} of another shard; the shards are not of one checkpoint."
                    )
                self._files[key] = file
                self.shapes[key] = tuple(file.get_slice(key).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(self._files[name].get_slice(name)[index])


class JointSource:
    """Several checkpoints as one, where parts of a model were published apart."""

    def __init__(self, parts: Sequence[Source]):
        self.name = ", ".join(part.name for part in parts)
        self._owner: dict[str, Source] = {}
        for part in parts:
            for name in part.shapes:
                if name in self._owner:
                    raise ValueError(f"{part.name} repeats tensor {name!r} of {self._owner[name].name}.")
                self._owner[name] = part
        self.shapes = {name: part.shapes[name] for name, part in self._owner.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._owner[name].read(name, index)


def open_sources(paths: Sequence[str | pathlib.Path]) -> Source:
    """`open_source` of one or more places that make up a model together.

    Raises ValueError, besides what `open_source` raises, where two of them hold a tensor of the same name.
    """
    parts = [open_source(path) for path in paths]
    return parts[0] if len(parts) == 1 else JointSource(parts)


def open_source(path: str | pathlib.Path) -> Source:
    """Open a safetensors or PyTorch file, a directory with one in the hub's naming or with shards and their index, or a
    DeepSpeed checkpoint.

    Raises:
      FileNotFoundError: nothing there, or a shard is missing.
      ValueError: a file is truncated or corrupt, wants to run code, or the index and its shards disagree.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _open_files([path], str(path))
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist; expected a safetensors or PyTorch file, or a directory with {SINGLE} or {INDEX}."
        )
    # Safetensors first: repositories that hold both hold the same weights twice.
    for index, single in ((INDEX, SINGLE), (TORCH_INDEX, TORCH_SINGLE)):
        if (path / index).is_file():
            return _open_sharded(path / index)
        if (path / single).is_file():
            return _open_files([path / single], str(path))
    if deepspeed.is_zero(path):
        return deepspeed.ZeroSource(path)
    raise FileNotFoundError(
        f"{path} has neither {SINGLE} nor {INDEX} (nor {TORCH_SINGLE}); it holds "
        f"{sorted(p.name for p in path.iterdir())[:10]}."
    )


def _open_files(files: list[pathlib.Path], name: str) -> Source:
    if torch_files.is_torch_file(files[0]):
        return torch_files.TorchSource(files, name)
    return SafetensorsSource(files, name)


def _open_sharded(index: pathlib.Path) -> Source:
    directory = index.parent
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}); download it again.") from error
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(files)} shards, of which {missing} are missing; download them into {directory}."
        )
    source = _open_files([directory / file for file in files], str(directory))
    differing = sorted(set(weight_map) ^ set(source.shapes))
    if differing:
        raise ValueError(
            f"{index} and its shards disagree about {len(differing)} tensors, first {differing[:5]}; fetch them again."
        )
    return source


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file: {error}. Download it again."
        ) from error
