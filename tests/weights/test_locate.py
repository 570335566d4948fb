"""Directories that hold more than one set of weights, or only a part of one."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

from robovlms_jax.weights import locate, sources

torch = pytest.importorskip("torch")
modeling = pytest.importorskip("transformers.modeling_utils")

SETS = ("single", "shards", "torch single", "torch shards", "variant", "consolidated", "leftover")


def write(directory, name: str, number: float) -> None:
    """One set of weights, whose only tensor `a` holds `number`."""
    x = np.full((2, 3), number, np.float32)
    if name in ("shards", "torch shards"):
        stem, suffix, index = ("model", "safetensors", locate.INDEX)
        if name == "torch shards":
            stem, suffix, index = ("pytorch_model", "bin", locate.TORCH_INDEX)
        file = f"{stem}-00001-of-00001.{suffix}"
        (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": {"a": file}}))
    else:
        file = {
            "single": locate.SINGLE,
            "torch single": locate.TORCH_SINGLE,
            "variant": "model.fp16.safetensors",
            "consolidated": "consolidated.safetensors",
            "leftover": "model-00002-of-00003.safetensors",
        }[name]
    if file.endswith(".bin"):
        torch.save({"a": torch.tensor(x)}, directory / file)
    else:
        save_file({"a": x}, directory / file)


def number_in(path) -> float:
    return float(sources.open_source(path).read("a", (slice(None), slice(None)))[0, 0])


def resolved_by_transformers(directory) -> str | None:
    """The file that `from_pretrained` reads, or for shards their first."""
    try:
        files, _ = modeling._get_resolved_checkpoint_files(str(directory), None, None, None, None, False)
    except OSError:
        return None
    return files[0]


@pytest.mark.parametrize("names", [c for n in range(1, 4) for c in itertools.combinations(SETS, n)], ids=" + ".join)
def test_of_several_sets_of_weights_the_one_that_transformers_opens_is_read(tmp_path, caplog, names):
    for number, name in enumerate(names, start=1):
        write(tmp_path, name, number)
    expected = resolved_by_transformers(tmp_path)
    if expected is None:
        with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
            sources.open_source(tmp_path)
        return
    with caplog.at_level(logging.WARNING):
        assert number_in(tmp_path) == number_in(expected)
    told = " ".join(record.getMessage() for record in caplog.records)
    assert ("holds several sets of weights" in told) == (len(names) > 1), "every other set is named once"


def test_the_file_that_config_json_names_goes_first(tmp_path):
    write(tmp_path, "single", 1)
    write(tmp_path, "variant", 2)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "model.fp16.safetensors"}))
    assert number_in(tmp_path) == 2
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "../secret.safetensors"}))
    with pytest.raises(FileNotFoundError, match=r"names transformers_weights='../secret.safetensors'"):
        sources.open_source(tmp_path)


def test_a_stale_index_does_not_hide_the_single_file(tmp_path):
    write(tmp_path, "shards", 1)
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    write(tmp_path, "single", 2)
    assert number_in(tmp_path) == 2
    (tmp_path / locate.SINGLE).unlink()
    write(tmp_path, "torch single", 3)
    with pytest.raises(FileNotFoundError, match=r"are missing.*'pytorch_model.bin'\]; to use one of them, move model"):
        sources.open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("variant", "opens model.fp16.safetensors only as variant='fp16'; to use it here, rename it to model.safet"),
        ("consolidated", r"holds \['consolidated.safetensors'\], which are not in the layout"),
        ("leftover", "shards such as model-00002-of-00003.safetensors without their index; download model.safe"),
    ],
)
def test_weights_that_nobody_opens_are_named_with_a_way_out(tmp_path, name, message):
    write(tmp_path, name, 1)
    with pytest.raises(FileNotFoundError, match=message):
        sources.open_source(tmp_path)


def test_a_lora_adapter_beside_a_model_is_refused(tmp_path):
    write(tmp_path, "single", 1)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"LoRA adapter \(adapter_model.safetensors\) beside model.safetensors.*Merge"):
        sources.open_source(tmp_path)


def test_a_link_whose_file_is_gone_is_named(tmp_path):
    (tmp_path / locate.SINGLE).symlink_to(tmp_path / "blob")
    write(tmp_path, "torch single", 1)
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is a link to .*blob, which is missing"):
        sources.open_source(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_and_shards_that_disagree_are_refused_with_both_places(tmp_path, suffix):
    index = tmp_path / (locate.INDEX if suffix == "safetensors" else locate.TORCH_INDEX)
    for shard, name in enumerate("ab"):
        path, x = tmp_path / f"part-{shard}.{suffix}", np.ones(3, np.float32)
        torch.save({name: torch.tensor(x)}, path) if suffix == "bin" else save_file({name: x}, path)
    first, second = f"part-0.{suffix}", f"part-1.{suffix}"
    for weight_map, message in (
        ({"a": first, "b": first, "c": second}, f"first .*b is in {first} by the index and in {second} in fact"),
        ({"a": first, "b": second, "c": first}, f"first .*c is in {first} by the index and in no file in fact"),
        ({"a": first, "c": second}, f"first .*b is in no file by the index and in {second} in fact"),
        ({"a": first, "b": "../x"}, "names '../x', which is no file beside it"),
        ({}, "is no index of shards"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            sources.open_source(tmp_path)
    index.write_bytes(b"\xef\xbb\xbf" + json.dumps({"weight_map": {"a": first, "b": second}}).encode())
    assert set(sources.open_source(tmp_path).shapes) == {"a", "b"}, "a byte-order mark changes nothing"
    index.write_text("<html>")
    with pytest.raises(ValueError, match=r"index.json is not JSON"):
        sources.open_source(tmp_path)


def test_pytorch_shards_that_repeat_a_tensor_are_refused(tmp_path):
    for shard in range(2):
        torch.save({"a": torch.ones(2)}, tmp_path / f"part-{shard}.bin")
    (tmp_path / locate.TORCH_INDEX).write_text(json.dumps({"weight_map": {"a": "part-0.bin", "b": "part-1.bin"}}))
    with pytest.raises(ValueError, match=r"part-1.bin repeats tensor 'a' of another shard, part-0.bin"):
        sources.open_source(tmp_path)


@pytest.mark.parametrize("name", [locate.SINGLE, locate.TORCH_SINGLE])
def test_pointers_of_git_lfs_are_called_so(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(ValueError, match=rf"{name} is a pointer of Git LFS, not the weights; run `git lfs pull`"):
        sources.open_source(tmp_path)


def test_an_empty_place_is_not_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path, "single", 1.0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the place of the weights, '', is empty"):
        sources.open_source("")
