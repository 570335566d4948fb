"""Weights by name: repositories on the hub, folders whose names hold commas."""

from __future__ import annotations

import fnmatch
import json
import pathlib

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from robovlms_jax.inputs import tokenizers
from robovlms_jax.weights import sources


class Hub:
    """Stands in for snapshot_download: one repository, whose files are copied to a cache as they are asked for."""

    def __init__(self, repository: pathlib.Path, cache: pathlib.Path):
        self.repository, self.cache, self.asked = repository, cache, []
        repository.mkdir()
        cache.mkdir()
        self.write("config.json", {"model_type": "llava"})

    def write(self, name: str, values: dict) -> None:
        (self.repository / name).write_text(json.dumps(values))

    def download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision))
        for path in self.repository.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                (self.cache / path.name).write_bytes(path.read_bytes())
        return str(self.cache)

    def resolve(self, path: str = "hf://owner/name", **more: bool) -> set[str]:
        assert tokenizers.resolve_weights(path, **more) == self.cache
        return {path.name for path in self.cache.iterdir()} - {"config.json"}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def write_weights(hub: Hub, *names: str) -> None:
    for name in names:
        if name.endswith(".safetensors"):
            save_file({"a": np.ones(2, np.float32)}, hub.repository / name)
        else:
            torch = pytest.importorskip("torch")
            torch.save({"a": torch.ones(2)}, hub.repository / name)


def test_repositories_with_pytorch_files_alone_are_downloaded_and_opened(hub):
    write_weights(hub, "pytorch_model-00001-of-00001.bin", "training_args.bin")
    hub.write(sources.TORCH_INDEX, {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}})
    assert hub.resolve() == {sources.TORCH_INDEX, "pytorch_model-00001-of-00001.bin"}
    assert sources.open_source(hub.cache).shapes == {"a": (2,)}


@pytest.mark.parametrize("index", [False, True])
def test_the_same_weights_in_other_formats_stay_on_the_hub(hub, index):
    write_weights(hub, sources.SINGLE, "model.fp16.safetensors", "consolidated.safetensors", "pytorch_model.bin")
    if index:  # of the repository it was made from
        hub.write(sources.INDEX, {"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    assert hub.resolve() == {sources.SINGLE} | ({sources.INDEX} if index else set())
    assert sources.open_source(hub.cache).shapes == {"a": (2,)}


def test_shards_are_downloaded_by_their_index(hub):
    write_weights(hub, "part.safetensors", "other.safetensors", "pytorch_model.bin")
    hub.write(sources.INDEX, {"weight_map": {"a": "part.safetensors"}})
    assert hub.resolve() == {sources.INDEX, "part.safetensors"}


def test_without_tensors_only_small_files_are_downloaded(hub):
    write_weights(hub, sources.SINGLE)
    assert hub.resolve(tensors=False) == set()


def test_quantised_repositories_are_refused_before_their_weights_are_downloaded(hub):
    write_weights(hub, sources.SINGLE)
    hub.write("config.json", {"quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(ValueError, match=r"hf://owner/name: quantization_config: .*AWQ .*Take the repository"):
        hub.resolve()
    assert {path.name for path in hub.cache.iterdir()} == {"config.json"}


@pytest.mark.parametrize("revision", ["bfloat16", "refs/pr/3", "v1.0"])
def test_a_revision_is_asked_for_with_every_file(hub, revision):
    write_weights(hub, "pytorch_model.bin")
    hub.resolve(f"hf://owner/name@{revision}")
    assert set(hub.asked) == {("owner/name", revision)} and len(hub.asked) > 2


@pytest.mark.parametrize("path", ["hf://owner/name/folder", "hf://owner/name/folder@main", "hf://owner/name@"])
def test_names_that_are_none_of_a_repository_are_refused(hub, path):
    with pytest.raises(ValueError, match=rf"{path} is no repository; expected hf://OWNER/NAME or"):
        hub.resolve(path)
    assert hub.asked == []


def test_a_comma_may_belong_to_a_directory(tmp_path):
    language, vision = tmp_path / "llava, mpt", tmp_path / "clip"
    language.mkdir()
    vision.mkdir()
    assert tokenizers.split_weights(str(language)) == [str(language)]
    assert tokenizers.split_weights(f"{language},{vision}") == [str(language), str(vision)]
    assert tokenizers.split_weights(f"{vision}, {language}, hf://a/b") == [str(vision), str(language), "hf://a/b"]
    assert tokenizers.split_weights("/nowhere,hf://a/b") == ["/nowhere", "hf://a/b"]


def test_commas_that_can_be_read_in_two_ways_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a,b"):
        pathlib.Path(name).mkdir()
    with pytest.raises(ValueError, match=r"can be read as \['a', 'b'\] or as \['a,b'\]; rename"):
        tokenizers.split_weights("a,b")


@pytest.mark.parametrize("weights", ["a,", ",a", " "])
def test_an_empty_part_is_not_the_current_directory(weights):
    with pytest.raises(ValueError, match="hold an empty part"):
        tokenizers.split_weights(weights)


def test_a_file_in_place_of_a_directory_is_told_so(tmp_path):
    path = tmp_path / sources.SINGLE
    path.touch()
    with pytest.raises(FileNotFoundError, match="a file's directory is expected"):
        tokenizers.resolve_weights(path)
