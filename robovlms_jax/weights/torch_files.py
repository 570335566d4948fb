"""PyTorch checkpoint files, read without torch and without running anything that is pickled in them.

A file that `torch.save` writes is a zip archive: one pickle that says which tensors there are, and one uncompressed
record per storage. The pickle is read by an unpickler that builds tensors' descriptions and plain containers, makes
lifeless stand-ins of what trainers leave beside the weights, and refuses everything else; records are memory-mapped.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from robovlms_jax import json_files

STATE_KEYS = ("state_dict", "model_state_dict", "module")
"""Where trainers put the weights: Lightning, upstream's own saver, DeepSpeed."""

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}
_DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
_HARMLESS = {
    "collections": {"OrderedDict": collections.OrderedDict, "defaultdict": collections.defaultdict},
    "builtins": {
        x.__name__: x for x in (set, frozenset, slice, complex, bytearray, int, float, bool, str, list, dict, tuple)
    },
    "_codecs": {"encode": lambda text, encoding="latin-1": text.encode("latin-1")},  # how old pickles spell bytes
    "torch": {"Size": tuple},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum": int},
}
_BYSTANDERS = {
    *("torch", "numpy", "argparse", "pathlib", "datetime", "omegaconf", "deepspeed", "robovlms"),
    *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "transformers", "collections"),
}
"""Packages whose objects trainers store beside the weights. They become stand-ins; none is imported."""

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of files from before PyTorch 1.6, pickled


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: what to look at, and how. Sizes in elements."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def identity(self) -> tuple:
        """Equal for two names of the same numbers."""
        where = self.storage.__array_interface__["data"][0]
        return where, self.storage.dtype, self.offset, self.shape, self.strides

    def view(self) -> np.ndarray:
        """The whole tensor; pages are read when they are touched."""
        start = self.storage[self.offset :]
        strides = [stride * start.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(start, self.shape, strides, writeable=False)


class TorchSource:
    """The tensors of one or more PyTorch files; see `weights.sources.Source`."""

    def __init__(self, files: list[pathlib.Path], name: str):
        self.name = name
        self.tensors: dict[str, Tensor] = {}
        self.owners: dict[str, str] = {}
        for path in files:
            for key, tensor in _state_dict(load(path), path).items():
                if key in self.tensors:
                    raise ValueError(
                        f"{path} repeats tensor {key!r} of another shard, {self.owners[key]}; the shards are not of "
                        "one checkpoint."
                    )
                self.tensors[key], self.owners[key] = tensor, path.name
        self.shapes = {key: tensor.shape for key, tensor in self.tensors.items()}
        self.dtypes = {key: str(tensor.storage.dtype) for key, tensor in self.tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.tensors[name].view()[index]


def load(path: pathlib.Path) -> Any:
    """The pickled object of a `torch.save` file with `Tensor` for every tensor in it; data is not read.

    Raises:
      ValueError: the file is truncated, no PyTorch file, older than PyTorch 1.6, or its pickle wants to run code.
    """
    with path.open("rb") as file:
        is_legacy = file.read(len(_LEGACY)) == _LEGACY
    if is_legacy:
        raise ValueError(
            f"{path} was written before PyTorch 1.6; save it again: torch.save(torch.load(PATH), NEW_PATH)."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "data.pkl" not in records:
                raise ValueError(f"{path} is a zip archive without data.pkl; expected a file written by torch.save.")
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise ValueError(f"{path} holds big-endian numbers, which are not read here.")
            pickled = archive.read(records["data.pkl"])
    except zipfile.BadZipFile as error:
        require_no_pointer(path)
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no PyTorch file: {error}. Download it again."
        ) from error
    storages = _Storages(path, records)
    try:
        return _Unpickler(pickled, path, storages).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a pickle that cannot be read: {error!r}. Download it again.") from error


def require_no_pointer(path: pathlib.Path) -> None:
    """Raise ValueError where a file is what git leaves of a large one until Git LFS fetches it."""
    if json_files.is_pointer(path):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the weights; run `git lfs pull` where it lies, or download it."
        )


def is_torch_file(path: pathlib.Path) -> bool:
    """By its name; whether it is one inside is for `load` to say."""
    return path.suffix in (".pt", ".pth", ".bin", ".ckpt")


class _Storages:
    """Records of an archive as memory-mapped arrays."""

    def __init__(self, path: pathlib.Path, records: Mapping[str, zipfile.ZipInfo]):
        self._path, self._records = path, records
        self._bytes = np.memmap(path, np.uint8, mode="r")
        self._made: dict[tuple, np.ndarray] = {}

    def get(self, key: str, dtype: Any, count: int) -> np.ndarray:
        dtype = np.dtype(dtype)
        if (key, dtype) not in self._made:
            entry = self._records.get(f"data/{key}")
            if entry is None:
                raise ValueError(f"{self._path} lacks record data/{key}, which its index names; download it again.")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{self._path} is compressed; save it again with torch.save, which does not compress.")
            # The local header repeats the name and has an extra field of its own length (torch pads there).
            header = self._bytes[entry.header_offset : entry.header_offset + 30]
            name, extra = header[26:30].view("<u2")
            start, size = entry.header_offset + 30 + int(name) + int(extra), count * dtype.itemsize
            if size > entry.file_size or start + size > self._bytes.size:
                raise ValueError(f"{self._path}: record data/{key} ends early; download the file again.")
            self._made[key, dtype] = np.frombuffer(self._bytes, dtype, count, start)
        return self._made[key, dtype]


class _Inert:
    """Stand-in for an object of a library that is not asked: takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Dtype:
    dtype: Any


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: pathlib.Path, storages: _Storages):
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self._path, self._storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)  # Python 2's name, which torch's pickles still use
        if name in _HARMLESS.get(module, {}):
            return _HARMLESS[module][name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Dtype(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _Dtype(_DTYPES[name])
        if (module, name) in _REBUILD:
            return _REBUILD[module, name]
        if module.partition(".")[0] in _BYSTANDERS:
            return type(name, (_Inert,), {"__module__": module})
        raise ValueError(
            f"{self._path} holds more than weights: opening it asks for {module}.{name}, which could run any code. "
            "Nothing of it was run. If you trust the file, open it with torch and save the weights alone: "
            'torch.save({"state_dict": torch.load(PATH, weights_only=False)["state_dict"]}, NEW_PATH)'
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _Dtype)):
            raise ValueError(f"{self._path} refers to {str(pid)[:80]}; expected storages only.")
        return self._storages.get(str(pid[2]), pid[1].dtype, int(pid[4]))


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> Tensor:
    shape, strides = tuple(shape), tuple(strides)
    furthest = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    is_empty = math.prod(shape) == 0
    # The file decides these numbers: without this check it could have us read memory that is not its own.
    if min((offset, *shape, *strides)) < 0 or (not is_empty and furthest >= storage.size):
        raise ValueError(f"a tensor of shape {shape} lies outside its storage of {storage.size}; the file is corrupt.")
    return Tensor(storage, 0 if is_empty else offset, shape, strides)


def _tensor_v3(
    storage: np.ndarray, offset: int, shape: tuple, strides: tuple, _grad: Any, _hooks: Any, dtype: _Dtype, *_: Any
) -> Tensor:
    return _tensor(storage.view(dtype.dtype), offset, shape, strides)


_REBUILD = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, _type, args, _state: function(*args),
}


def _state_dict(content: Any, path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, wherever its trainer put them."""
    where = next((key for key in STATE_KEYS if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    state = content if where is None else content[where]
    found = {str(key): x for key, x in state.items() if isinstance(x, Tensor)} if isinstance(state, dict) else {}
    if not found:
        holds = f"keys {[str(key) for key in content][:10]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} holds no weights: expected a state dict, or one under {list(STATE_KEYS)}; found {holds}."
        )
    return found
