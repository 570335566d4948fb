"""Where weights come from: safetensors or PyTorch files, read slice by slice."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 - so that safetensors knows bfloat16
import numpy as np
import safetensors

from robovlms_jax.weights import deepspeed, locate, quantized, torch_files
from robovlms_jax.weights.locate import INDEX, SINGLE, TORCH_INDEX, TORCH_SINGLE

__all__ = ["INDEX", "SINGLE", "TORCH_INDEX", "TORCH_SINGLE"]


class Source(Protocol):
    """Named tensors that can be read in parts."""

    name: str
    """For messages."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor there is."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice of one tensor, in its stored type; nothing else is read."""


class SafetensorsSource:
    """One or more safetensors files. Opening reads only their headers; tensors are memory-mapped."""

    def __init__(self, files: list[pathlib.Path], name: str):
        self.name = name
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.owners: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for path in files:
            file = _open(path)
            for key in file.keys():  # noqa: SIM118 - not a dict; it cannot be iterated
                if key in self._files:
                    raise ValueError(
                        f"{path} repeats tensor {key!r} of another shard, {self.owners[key]}; the shards are not of "
                        "one checkpoint."
                    )
                self._files[key], self.owners[key] = file, path.name
                part = file.get_slice(key)
                self.shapes[key], self.dtypes[key] = tuple(part.get_shape()), part.get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return np.asarray(self._files[name].get_slice(name)[index])
        except (AttributeError, TypeError) as error:  # what NumPy has no type for
            raise ValueError(
                f"{self.name} holds {name} in {self.dtypes[name]}, which is not read here; expected float weights."
            ) from error


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
    DeepSpeed checkpoint. Of several in one directory the one that transformers would open; the log names the others.

    Raises:
      FileNotFoundError: nothing there, or a shard is missing.
      ValueError: a file is truncated or corrupt, wants to run code, or the index and its shards disagree; the weights
        are quantised, or a LoRA adapter lies beside them; the path is empty, which would be the working directory.
    """
    if not str(path).strip():
        raise ValueError(f"the place of the weights, {str(path)!r}, is empty; name a file or a directory.")
    path = pathlib.Path(path)
    if path.is_file():
        return _open_files([path], str(path))
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist; expected a safetensors or PyTorch file, or a directory with {SINGLE} or {INDEX}."
        )
    found = locate.find(path)
    if found is not None and found.name.endswith(".index.json"):
        return _open_sharded(found)
    if found is not None:
        locate.tell_unread(found, ())
        return _open_files([found], str(path))
    if deepspeed.is_zero(path):
        return deepspeed.ZeroSource(path)
    raise FileNotFoundError(f"{path} has neither {SINGLE} nor {INDEX} (nor {TORCH_SINGLE}); {locate.advice(path)}")


def _open_files(files: list[pathlib.Path], name: str) -> SafetensorsSource | torch_files.TorchSource:
    make = torch_files.TorchSource if torch_files.is_torch_file(files[0]) else SafetensorsSource
    source = make(files, name)
    quantized.require_float_tensors(name, source.dtypes, source.shapes)
    return source


def _open_sharded(index: pathlib.Path) -> Source:
    directory, weight_map = index.parent, locate.weight_map(index)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        others = [name for name in locate.weight_files(directory) if name not in (index.name, *files)]
        instead = f" Also there, and not read: {others}; to use one of them, move {index.name} away." if others else ""
        raise FileNotFoundError(
            f"{index} names {len(files)} shards, of which {missing} are missing; download them into {directory}."
            + instead
        )
    locate.tell_unread(index, [directory / file for file in files])
    source = _open_files([directory / file for file in files], str(directory))
    owners, names = source.owners, {*weight_map, *source.owners}
    differing = sorted(name for name in names if weight_map.get(name) != owners.get(name))
    if differing:
        first = differing[0]
        claimed, true = weight_map.get(first, "no file"), owners.get(first, "no file")
        raise ValueError(
            f"{index} and its shards disagree about {len(differing)} tensors, first {differing[:5]}: {first} is in "
            f"{claimed} by the index and in {true} in fact. They are of two checkpoints, or a download is incomplete; "
            "fetch index and shards again, into an empty directory."
        )
    return source


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        torch_files.require_no_pointer(path)
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file: {error}. Download it again."
        ) from error
