"""Weight files: types, slices, shards, and everything that can be wrong with them."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from robovlms_jax.weights import sources
from tests.weights.array_source import ArraySource

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.float32),
    "c": np.ones((2, 2), np.float32),
}


def write_shards(directory) -> dict[str, str]:
    shards = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b", "c"]}
    for file, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (directory / sources.INDEX).write_text(json.dumps({"metadata": {"total_size": 84}, "weight_map": weight_map}))
    return weight_map


def everything(source: sources.Source) -> dict[str, np.ndarray]:
    return {name: source.read(name, (slice(None),) * len(shape)) for name, shape in source.shapes.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_slices_keep_the_stored_type_and_values(tmp_path, dtype):
    save_file({"a": TENSORS["a"].astype(dtype)}, tmp_path / "model.safetensors")
    source = sources.open_source(tmp_path)
    found = source.read("a", (slice(1, 3), slice(0, 2)))
    assert source.shapes == {"a": (3, 4)}
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float32), TENSORS["a"][1:3, :2])


def test_a_file_a_directory_shards_and_arrays_are_the_same_source(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "shards").mkdir()
    save_file(TENSORS, tmp_path / "whole" / "model.safetensors")
    write_shards(tmp_path / "shards")
    for source in (
        sources.open_source(tmp_path / "whole" / "model.safetensors"),
        sources.open_source(tmp_path / "whole"),
        sources.open_source(str(tmp_path / "shards")),
        ArraySource(TENSORS),
    ):
        found = everything(source)
        assert set(found) == set(TENSORS)
        for name, value in TENSORS.items():
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-3], lambda raw: raw[:5], lambda raw: b"", lambda raw: b"<html>" * 30]
)
def test_truncated_or_foreign_files_are_named(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"truncated or no safetensors file.*Download it again") as caught:
        sources.open_source(tmp_path)
    assert str(path) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"names 2 shards, of which \['model-00002-of-00002.safetensors'\] are missing"
    ):
        sources.open_source(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    weight_map = write_shards(tmp_path)
    (tmp_path / sources.INDEX).write_text(json.dumps({"weight_map": weight_map | {"d": weight_map["a"]}}))
    with pytest.raises(ValueError, match=r"disagree about 1 tensors, first \['d'\]"):
        sources.open_source(tmp_path)
    (tmp_path / sources.INDEX).write_text("{}")
    with pytest.raises(ValueError, match="is no index of shards"):
        sources.open_source(tmp_path)


def test_shards_that_repeat_a_tensor_are_refused(tmp_path):
    write_shards(tmp_path)
    save_file(TENSORS, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="repeats tensor 'a' of another shard"):
        sources.open_source(tmp_path)


def test_pytorch_directories_are_read_like_the_others(tmp_path):
    # tests/weights/test_torch_files.py has the format; this is the hub's naming, whole and in shards.
    torch = pytest.importorskip("torch")
    (tmp_path / "whole").mkdir()
    (tmp_path / "shards").mkdir()
    torch.save({key: torch.tensor(x) for key, x in TENSORS.items()}, tmp_path / "whole" / sources.TORCH_SINGLE)
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for key, file in weight_map.items():
        torch.save({key: torch.tensor(TENSORS[key])}, tmp_path / "shards" / file)
    (tmp_path / "shards" / sources.TORCH_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert set(everything(sources.open_source(tmp_path / "whole"))) == set(TENSORS)
    found = everything(sources.open_source(tmp_path / "shards"))
    np.testing.assert_array_equal(found["b"], TENSORS["b"])
    save_file({"a": TENSORS["c"]}, tmp_path / "whole" / sources.SINGLE)  # preferred where both are there
    np.testing.assert_array_equal(everything(sources.open_source(tmp_path / "whole"))["a"], TENSORS["c"])


def test_places_without_weights_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected a safetensors or PyTorch file"):
        sources.open_source(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor .*it holds \['config\.json'\]"):
        sources.open_source(tmp_path)


def test_parts_of_a_model_published_apart_are_one_source(tmp_path):
    first, second = (tmp_path / name for name in ("language", "vision"))
    for directory, tensors in ((first, {"a": np.ones((2, 3), np.float32)}), (second, {"b": np.zeros(4, np.float32)})):
        directory.mkdir()
        save_file(tensors, directory / sources.SINGLE)
    joint = sources.open_sources([first, second])
    assert joint.shapes == {"a": (2, 3), "b": (4,)}
    assert joint.read("a", (slice(0, 1), slice(None))).tolist() == [[1, 1, 1]]
    assert str(first) in joint.name and str(second) in joint.name
    with pytest.raises(ValueError, match="repeats tensor 'a'"):
        sources.open_sources([first, first])
