"""Adapters as PEFT's files: opened by peft itself, and read back from what peft writes."""

import copy
import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from robovlms_jax.nn.linear import Lora, merge_lora
from robovlms_jax.weights import peft as adapters
from tests.backbones import families
from tests.backbones.oracle import abstract, from_torch, randomize

peft = pytest.importorskip("peft", reason="not in environments without torch")

FAMILIES = ("kosmos-2", "llava-1.5-7b", "qwen2.5-vl-3b", "florence-2-base", "internvl3-1b", "instructblip-flan-t5-xl")
"""Names as published, names that transformers 5 changed, convolutions over three axes, names below `model.`, a tower
without a level of names, layers that differ in turns."""
SLOW = ("florence-2-base",)
KINDS = ("lora", "rslora", "dora")


def with_adapters(name: str, kind: str, rank: int = 2):
    """A tiny torch model, our configuration of it with adapters, and parameters that are all random."""
    config, torch_model, params = _with_adapters(name, kind, rank)
    return config, copy.deepcopy(torch_model), dict(params)  # peft changes a model that it is given


@functools.cache
def _with_adapters(name: str, kind: str, rank: int):
    config = dataclasses.replace(families.tiny(name), lora_rank=rank, lora_alpha=6.0, lora_kind=kind)
    torch_model = randomize(families.torch_model(config))
    plain = dataclasses.replace(config, lora_rank=0)
    params = flatten_dict(from_torch(plain, families.published(torch_model, torch_model.state_dict())), sep="/")
    rng = np.random.default_rng(0)
    for path, x in flatten_dict(abstract(config), sep="/").items():
        if path not in params:
            params[path] = (0.1 * rng.normal(size=x.shape) + path.endswith("lora_m")).astype(np.float32)
    return config, torch_model, {path: np.asarray(x) for path, x in params.items()}


def merged(params, lora: Lora):
    return flatten_dict(merge_lora(unflatten_dict(params, sep="/"), lora), sep="/")


def assert_close(found, expected):
    assert set(found) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(pytest.param(name, "lora", marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILIES),
        ("kosmos-2", "rslora"),
        ("llava-1.5-7b", "dora"),
    ],
)
def test_peft_opens_what_is_exported_and_computes_the_same_matrices(tmp_path, name, kind):
    config, torch_model, params = with_adapters(name, kind)
    adapters.export(unflatten_dict(params, sep="/"), config.rules, config.lora, tmp_path)
    model = peft.PeftModel.from_pretrained(torch_model, tmp_path)
    tensors = load_file(tmp_path / adapters.TENSORS)
    theirs = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.replace(".default", "").removesuffix(".weight") for name in theirs} == {
        name.removesuffix(".weight") for name in tensors
    }
    state = {name: x.detach() for name, x in model.merge_and_unload().state_dict().items()}
    found = from_torch(dataclasses.replace(config, lora_rank=0), state)
    assert_close(flatten_dict(found, sep="/"), merged(params, config.lora))


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_writes_is_read_with_a_smaller_rank_and_another_scale_too(tmp_path, kind):
    config, torch_model, params = with_adapters("llava-1.5-7b", kind, rank=4)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=r"model\.language_model\.layers\.\d+\.self_attn\.(q|o)_proj",
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        alpha_pattern={"o_proj": 7},
    )
    model = peft.get_peft_model(torch_model, settings)
    for name, x in model.named_parameters():
        if "lora_" in name:
            rng = np.random.default_rng(len(name))
            x.data += 0.1 * torch.tensor(rng.normal(size=tuple(x.shape)), dtype=x.dtype)
    model.save_pretrained(tmp_path)
    found = adapters.load(tmp_path, unflatten_dict(params, sep="/"), config.rules, config.lora)
    assert {path.split("/")[-2] for path in found} == {"q", "o"}
    ours = {path: x for path, x in params.items() if "lora_" not in path} | found
    state = {name: x.detach() for name, x in model.merge_and_unload().state_dict().items()}
    expected = from_torch(dataclasses.replace(config, lora_rank=0), state)
    assert_close(merged(ours, config.lora), flatten_dict(expected, sep="/"))


def changed_biases(params, patterns):
    """Parameters with other values of the biases that a pattern is found in; their paths."""
    chosen = {path for path in params if path.endswith("/bias") and any(re.search(x, path) for x in patterns)}
    rng = np.random.default_rng(1)
    moved = {path: params[path] + rng.normal(size=params[path].shape).astype(np.float32) for path in sorted(chosen)}
    return params | moved, chosen


@pytest.mark.parametrize(
    ("name", "bias", "patterns"),
    [
        ("kosmos-2", "all", [r"^(?!vision/).*bias$"]),  # what upstream's lora_bias "all" trains
        ("kosmos-2", "lora_only", [r"/q/bias$"]),
        pytest.param("moondream2", "all", ["bias$"], marks=pytest.mark.slow),  # parts of fused projections
    ],
)
def test_biases_that_learned_beside_adapters_are_in_pefts_files_and_back(tmp_path, name, bias, patterns):
    config, torch_model, base = with_adapters(name, "lora")
    params, learned = changed_biases(base, patterns)
    tree = unflatten_dict(params, sep="/")
    adapters.export(tree, config.rules, config.lora, tmp_path, trained=learned)
    assert json.loads((tmp_path / adapters.CONFIG).read_text())["bias"] == bias
    found = adapters.load(tmp_path, unflatten_dict(base, sep="/"), config.rules, config.lora)
    assert_close(merged(base | found, config.lora), merged(params, config.lora))
    if name == "kosmos-2":  # the other's torch model is composed here, without transformers' names
        model = peft.PeftModel.from_pretrained(torch_model, tmp_path)
        state = {name: x.detach() for name, x in model.merge_and_unload().state_dict().items()}
        theirs = from_torch(dataclasses.replace(config, lora_rank=0), state)
        assert_close(flatten_dict(theirs, sep="/"), merged(params, config.lora))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_writes_are_read(tmp_path, bias):
    config, torch_model, params = with_adapters("kosmos-2", "lora")
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "fc1"], bias=bias)
    model = peft.get_peft_model(torch_model, settings)
    for name, x in model.named_parameters():
        if x.requires_grad:
            rng = np.random.default_rng(len(name))
            x.data += 0.1 * torch.tensor(rng.normal(size=tuple(x.shape)), dtype=x.dtype)
    model.save_pretrained(tmp_path)
    found = adapters.load(tmp_path, unflatten_dict(params, sep="/"), config.rules, config.lora)
    norms = [path for path in found if path.endswith("norm/bias")]
    assert bool(norms) == (bias == "all")
    state = {name: x.detach() for name, x in model.merge_and_unload().state_dict().items()}
    expected = from_torch(dataclasses.replace(config, lora_rank=0), state)
    zero = {path: np.zeros_like(x) for path, x in params.items() if path.endswith("lora_b")}
    assert_close(merged(params | zero | found, config.lora), flatten_dict(expected, sep="/"))


def test_a_bias_that_pefts_files_cannot_hold_or_of_another_size_is_named(tmp_path):
    config, _, params = with_adapters("kosmos-2", "lora")
    params, learned = changed_biases(params, [r"/q/bias$"])
    tree = unflatten_dict(params, sep="/")
    with pytest.raises(ValueError, match=r"no place for the trained biases \['nowhere/bias'\]"):
        adapters.export(tree, config.rules, config.lora, tmp_path, trained={"nowhere/bias"})
    adapters.export(tree, config.rules, config.lora, tmp_path, trained=learned)
    tensors = load_file(tmp_path / adapters.TENSORS)
    key = next(key for key in tensors if key.endswith("text_model.model.layers.0.self_attn.q_proj.base_layer.bias"))
    save_file(tensors | {key: tensors[key][:-1]}, tmp_path / adapters.TENSORS)
    with pytest.raises(ValueError, match=r"q_proj.base_layer.bias has \[.*wants \["):
        adapters.require_fits(tmp_path, tree, config.rules, config.lora)
    save_file({name: x for name, x in tensors.items() if name != key}, tmp_path / adapters.TENSORS)
    with pytest.raises(ValueError, match=r"q_proj.bias in layers \[1.*in \[0\], too"):
        adapters.load(tmp_path, tree, config.rules, config.lora)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("moondream2", "lora"), ("moondream2", "dora"), ("llava-mpt-7b", "rslora"), ("smolvlm2-500m", "lora")],
)
def test_every_tensor_with_its_adapter_is_the_merged_one_and_the_way_back_is_the_same(tmp_path, name, kind):
    # Fused projections become one adapter of three ranks: fails where a part meets another's rows.
    config, _, params = with_adapters(name, kind)
    adapters.export(unflatten_dict(params, sep="/"), config.rules, config.lora, tmp_path)
    wide = dataclasses.replace(config, lora_rank=6)
    found = adapters.load(tmp_path, full_shapes(wide, params), config.rules, wide.lora)
    assert set(found) == {path for path in params if "lora_" in path}
    ours = {path: x for path, x in params.items() if "lora_" not in path} | found
    assert_close(merged(ours, wide.lora), merged(params, config.lora))
    again = adapters.load(tmp_path, full_shapes(config, params), config.rules, config.lora)  # at the rank it had
    ours = {path: x for path, x in params.items() if "lora_" not in path} | again
    assert_close(merged(ours, config.lora), merged(params, config.lora))


def test_matrices_that_are_no_modules_in_torch_are_named(tmp_path):
    config, _, params = with_adapters("qwen-vl", "lora")
    with pytest.raises(ValueError, match=r"no adapters for \['connector/.*Merge"):
        adapters.export(unflatten_dict(params, sep="/"), config.rules, config.lora, tmp_path)
    with pytest.raises(ValueError, match=r"no adapters \(lora_a\)"):
        adapters.export({"text": {"kernel": np.ones(2)}}, config.rules, config.lora, tmp_path)
    assert not any(tmp_path.iterdir())


def full_shapes(config, params):
    """Parameters with adapters of the configuration's rank: shapes where `params` has another."""
    flat = flatten_dict(abstract(config), sep="/")
    return unflatten_dict({path: x if "lora_" in path else params[path] for path, x in flat.items()}, sep="/")


@pytest.mark.parametrize(
    ("change", "lora", "message"),
    [
        ({"use_dora": True}, {}, r"kind 'dora' and rank 2.*--backbone.lora_kind dora"),
        ({}, {"rank": 1}, r"rank 2.*has kind|rank 1.*--backbone.lora_rank 2"),
        ({"bias": "some"}, {}, r"bias='some'; one of \['none', 'all', 'lora_only'\]"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            {},
            r"init_lora_weights='pissa_niter_4': .* the base's weights",
        ),
        ({"use_bdlora": {"nblocks": 2}}, {}, "use_bdlora"),
        ({"r": None}, {}, "has rank None; r and rank_pattern are whole numbers"),
        ({"peft_type": "IA3"}, {}, "IA3"),
    ],
)
def test_adapters_of_another_kind_are_refused_with_the_flags_that_fit(tmp_path, change, lora, message):
    config, _, params = with_adapters("kosmos-2", "lora")
    tree = unflatten_dict(params, sep="/")
    adapters.export(tree, config.rules, config.lora, tmp_path)
    path = tmp_path / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        adapters.load(tmp_path, tree, config.rules, dataclasses.replace(config.lora, **lora))


def test_an_adapter_of_another_model_and_a_truncated_file_are_named(tmp_path, caplog):
    config, _, params = with_adapters("kosmos-2", "lora")
    adapters.export(unflatten_dict(params, sep="/"), config.rules, config.lora, tmp_path, "hf://a/kosmos-2@v1")
    fits = functools.partial(
        adapters.require_fits, tmp_path, unflatten_dict(params, sep="/"), config.rules, config.lora
    )
    fits("/models/KOSMOS-2/")
    assert not caplog.text
    fits("/models/kosmos-2-tuned")  # of the same sizes
    assert "made for the base hf://a/kosmos-2@v1" in caplog.text and "'/models/kosmos-2-tuned'" in caplog.text
    other, _, theirs = with_adapters("llava-1.5-7b", "lora")
    with pytest.raises(
        ValueError, match=r"not an adapter of this backbone.*image_to_text_projection.*of hf://a/kosmos-2@v1"
    ):
        adapters.load(tmp_path, unflatten_dict(theirs, sep="/"), other.rules, other.lora)
    narrow = jax.tree.map(lambda x: x[..., :-1, :] if x.ndim > 3 else x, unflatten_dict(params, sep="/"))
    with pytest.raises(ValueError, match=r"lora_[AB]\S* is \[.*wants \["):
        adapters.require_fits(tmp_path, narrow, config.rules, config.lora)  # before any tensor is read
    with pytest.raises(FileExistsError, match="holds an adapter already"):
        adapters.export(unflatten_dict(params, sep="/"), config.rules, config.lora, tmp_path)
    file = tmp_path / adapters.TENSORS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        adapters.load(tmp_path, unflatten_dict(params, sep="/"), config.rules, config.lora)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        adapters.load(tmp_path / "nowhere", unflatten_dict(params, sep="/"), config.rules, config.lora)
