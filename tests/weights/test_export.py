"""Export, apart from what transformers makes of it (see tests/backbones)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from robovlms_jax.weights import export, sources
from robovlms_jax.weights.rules import Ignore, Rule

RULES = (Rule("w.{layer}", "layers/w", "(n h) d -> d n h"), Rule("b", "b"), Ignore("head", "tied"))
PARAMS = {"layers": {"w": np.arange(48, dtype=np.float32).reshape(2, 4, 3, 2)}, "b": np.ones(4, np.float32)}


def test_tensors_shards_index_and_config(tmp_path):
    export.export(PARAMS, RULES, tmp_path / "new", {"model_type": "toy"}, max_shard_bytes=100)
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"model_type": "toy"}
    index = json.loads((tmp_path / "new" / sources.INDEX).read_text())
    assert index["metadata"]["total_size"] == 52 * 4
    assert index["weight_map"] == {
        "w.0": "model-00001-of-00003.safetensors",
        "w.1": "model-00002-of-00003.safetensors",
        "b": "model-00003-of-00003.safetensors",
    }
    found = load_file(tmp_path / "new" / "model-00002-of-00003.safetensors")["w.1"]
    np.testing.assert_array_equal(found, PARAMS["layers"]["w"][1].transpose(1, 2, 0).reshape(6, 4))


def test_parameters_and_rules_must_cover_each_other(tmp_path):
    params = {"layers": {"w": PARAMS["layers"]["w"], "lora_a": np.ones(2)}}
    with pytest.raises(
        ValueError, match=r"without a rule \['layers/lora_a'\], rules without a parameter \['b'\].*merge_lora"
    ):
        export.export(params, RULES, tmp_path, {})


def test_other_weights_are_not_overwritten(tmp_path):
    export.export(PARAMS, RULES, tmp_path, {})
    with pytest.raises(FileExistsError, match="export to an empty directory"):
        export.export(PARAMS, RULES, tmp_path, {})


def test_parts_are_written_as_the_one_tensor_they_came_from(tmp_path):
    rows = tuple(Rule("w.{layer}.qkv", f"w/{name}", f"({part}/3 n) d -> d n") for part, name in enumerate("qkv"))
    params = {"w": {name: np.full((2, 4, 3), i, np.float32) for i, name in enumerate("qkv")}}
    export.export(params, rows, tmp_path, {})
    found = load_file(tmp_path / sources.SINGLE)
    assert set(found) == {"w.0.qkv", "w.1.qkv"}
    np.testing.assert_array_equal(found["w.1.qkv"], np.repeat([0, 1, 2], 3)[:, None] * np.ones(4))
