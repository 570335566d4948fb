"""Adapters trained beside matrices in eight bits (QLoRA): what a run begins with, keeps, saves and serves; adapters
of another model."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments import calvin_abcd, plan
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.runs import load, run
from robovlms_jax.runs import setup as setups
from robovlms_jax.weights import peft
from tests.backbones.test_peft import with_adapters
from tests.experiments.test_calvin_abcd import small
from tests.runs.test_stages import QUICK

ADAPTERS = {
    "backbone.lora_rank": 4,
    "backbone.storage": "int8",
    "train.trainable": ("lora_", "^head/", "^readout/"),
}


def flat(run_directory, **options):
    return flatten_dict(load.open_model(run_directory, **options)[1], sep="/")


def test_a_base_in_int8_needs_adapters_and_stays_as_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"set backbone\.lora_rank"):
        BackboneConfig(storage="int8")
    wrong = ADAPTERS | {"train.trainable": ("lora_", "^backbone/text/", "^head/")}
    with pytest.raises(ValueError, match=r"trains backbone/text/.* that backbone\.storage=int8 keeps"):
        setups.prepare(small(tmp_path, **QUICK, **wrong))


@pytest.mark.slow
def test_the_preset_takes_a_quarter_of_the_bases_memory_and_no_more_for_the_rest():
    found = {}
    for name in ("kosmos_lstm_lora", "kosmos_lstm_qlora"):
        preset = calvin_abcd.PRESETS[name]
        config = plan.PlanConfig(**{field: getattr(preset, field) for field in vars(preset)}, devices=1)
        found[name] = plan.plan(config)["bytes_per_device"]
    lora, qlora = found.values()
    assert qlora["parameters"] < 0.3 * lora["parameters"] and qlora["optimizer"] == lora["optimizer"]
    assert qlora["activations"] < 1.05 * lora["activations"] and qlora["total"] < lora["total"]


@pytest.mark.slow
def test_adapters_are_trained_beside_a_policy_in_int8_and_it_goes_on_as_float(tmp_path):
    base = run.train("sample", small(tmp_path / "base", **QUICK, **{"train.steps": 2}))
    settings = {**QUICK, **ADAPTERS, "train.init_from": str(base), "optimizer.learning_rate": 1e-2}
    rounded = run.train("sample", small(tmp_path / "rounded", **settings, **{"train.steps": 3}))
    before, after = flat(base, weights="int8"), flat(rounded)
    kept = [path for path, x in after.items() if x.dtype == jnp.int8]
    assert len(kept) > 10 and json.loads((rounded / "config.json").read_text())["backbone"]["storage"] == "int8"
    for path in kept:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    assert any(np.any(x) for path, x in after.items() if path.endswith("lora_b"))
    # As float matrices they are int8 times scale, in serving and as the beginning of another run.
    plain = flat(rounded, weights="float32")
    path = kept[0]
    scale = after[path.rpartition("/")[0] + "/scale"]
    np.testing.assert_allclose(plain[path], after[path] * scale, rtol=1e-6)
    floats = {**QUICK, "backbone.lora_rank": 4, "train.init_from": str(rounded), "train.trainable": ("^head/",)}
    later = flat(run.train("sample", small(tmp_path / "later", **floats, **{"train.steps": 1})))
    for path in kept:
        np.testing.assert_allclose(later[path], plain[path], rtol=1e-6, err_msg=path)


def test_an_adapter_of_another_model_is_refused_before_any_parameter_is_made(tmp_path):
    config, _, params = with_adapters("llava-1.5-7b", "lora")
    peft.export(unflatten_dict(params, sep="/"), config.rules, config.lora, tmp_path)
    changes = {"backbone.lora_rank": config.lora_rank, "backbone.lora_alpha": config.lora_alpha}
    with pytest.raises(ValueError, match="is not an adapter of this backbone: it has no matrices for"):
        setups.prepare(small(tmp_path / "run", **QUICK, **changes, **{"backbone.adapter": str(tmp_path)}))
