"""PyTorch files: the same tensors torch reads, nothing run, and everything that can be wrong with them."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from robovlms_jax.weights import torch_files

torch = pytest.importorskip("torch")


def write(path: pathlib.Path, content) -> pathlib.Path:
    torch.save(content, path)
    return path


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    source = torch_files.TorchSource([path], str(path))
    return {name: source.read(name, (slice(None),) * len(shape)) for name, shape in source.shapes.items()}


def test_views_types_and_shared_storages_are_what_torch_reads(tmp_path):
    # Fails if strides, offsets, the records' alignment or a type's width are taken wrongly.
    base = torch.randn(6, 8)
    state = {
        "plain": base,
        "transposed": base.t(),
        "cut": base[2:4, 1::3],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base[0]),
        **{str(kind): torch.arange(5).to(kind) for kind in (torch.float16, torch.float64, torch.int64, torch.bool)},
        "bfloat16": base.bfloat16(),
    }
    found = read(write(tmp_path / "a.pt", state))
    assert set(found) == set(state)
    for name, expected in state.items():
        if name == "bfloat16":
            assert found[name].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(found[name].astype(np.float32), expected.float().numpy())
        else:
            assert found[name].dtype == expected.detach().numpy().dtype
            np.testing.assert_array_equal(found[name], expected.detach().numpy())


def test_data_is_read_when_it_is_asked_for(tmp_path):
    # Opened first, changed on disk after: a reader that copies the file on opening gives the old number.
    path = write(tmp_path / "a.pt", {"a": torch.arange(12.0).reshape(3, 4)})
    source = torch_files.TorchSource([path], "a")
    with path.open("r+b") as file:
        at = path.read_bytes().index(np.float32([9, 10, 11]).tobytes())
        file.seek(at)
        file.write(np.float32(99).tobytes())
    np.testing.assert_array_equal(source.read("a", (slice(1, 3), slice(0, 2))), [[4, 5], [8, 99]])


@pytest.mark.parametrize("key", [None, *torch_files.STATE_KEYS])
def test_weights_are_found_wherever_trainers_put_them(tmp_path, key):
    state = collections.OrderedDict(w=torch.ones(2))
    # What Lightning and DeepSpeed leave beside them: classes that are neither imported nor needed.
    beside = {
        "epoch": 4,
        "hyper_parameters": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("a/b")),
        "version": torch.torch_version.TorchVersion("2.1"),
        "rng": np.random.default_rng(0).normal(size=3),
        "scale": np.float64(3.0),
        "dtype": torch.bfloat16,
        "tags": {1, 2},
    }
    content = state if key is None else beside | {key: state}
    assert set(read(write(tmp_path / "a.ckpt", content))) == {"w"}


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(("function", "name"), [(os.mkdir, "mkdir"), (eval, "builtins.eval"), (getattr, "getattr")])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, function, name):
    marker = tmp_path / "it_ran"
    argument = f"__import__('os').mkdir({str(marker)!r})" if function is eval else str(marker)
    path = write(tmp_path / "a.pt", {"state_dict": {"w": torch.ones(2)}, "extra": Call(function, argument)})
    with pytest.raises(ValueError, match=rf"{name}, which could run any code.*Nothing of it was run"):
        read(path)
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path, kept):
    path = write(tmp_path / "a.pt", {"w": torch.randn(1000)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"a\.pt .*truncated or no PyTorch file.*Download it again"):
        read(path)


def rewrite(path: pathlib.Path, change) -> None:
    """The archive with its records passed through `change(name, data) -> data or None`."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            data = change(name, data)
            if data is not None:
                archive.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, data: None if name.endswith("data/0") else data, "lacks record data/0"),
        (lambda name, data: data[:100] if name.endswith("data/0") else data, "record data/0 ends early"),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, "big-endian"),
        (lambda name, data: None if name.endswith("data.pkl") else data, r"without data\.pkl"),
        (lambda name, data: data[:40] if name.endswith("data.pkl") else data, "pickle that cannot be read"),
    ],
)
def test_damaged_archives_are_named(tmp_path, change, message):
    path = write(tmp_path / "a.pt", {"w": torch.randn(1000)})
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_tensor_outside_its_storage_is_refused(tmp_path):
    # Without the check, as_strided would hand out whatever memory lies behind the file's mapping.
    path = write(tmp_path / "a.pt", {"w": torch.randn(10)})
    rewrite(path, lambda name, data: data.replace(b"K\n\x85", b"K\x0b\x85") if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="lies outside its storage of 10"):
        read(path)


def test_other_files_are_told_apart(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before PyTorch 1\.6"):
        read(tmp_path / "old.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match="truncated or no PyTorch file"):
        read(tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"holds no weights.*found keys \['epoch'\]"):
        read(write(tmp_path / "none.pt", {"epoch": 1}))
