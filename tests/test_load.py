"""Serving: types change no number, settings of control reach the policy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax import build, load
from robovlms_jax.config import BackboneConfig, ExperimentConfig, PolicyConfig, to_dict
from robovlms_jax.interface import Observation
from robovlms_jax.policies import objective
from robovlms_jax.training import checkpoints
from tests.toy import HEADS, init, make_batch, make_model, random_params


def test_parameters_stored_in_the_type_of_computation_give_the_same_loss():
    # Bit for bit: fails if a block uses a parameter in float32 before it is cast, or if a norm is stored short.
    batch = make_batch(np.random.default_rng(0))
    model = make_model()
    half = dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, dtype="bfloat16"))
    params = init(model, batch)
    types = load.serving_types(params, "bfloat16")
    stored = jax.tree.map(lambda x, dtype: x.astype(dtype), params, types)
    assert stored["backbone"]["text"]["layers"]["attn"]["q"]["kernel"].dtype == jnp.bfloat16
    assert (
        stored["backbone"]["text"]["final_norm"]["scale"].dtype
        == stored["head"]["arm"]["layer_0"]["kernel"].dtype
        == jnp.float32
    )
    loss = jax.jit(functools.partial(objective.loss, half))
    assert loss(stored, batch)[0] == loss(params, batch)[0]
    assert jax.tree.leaves(load.serving_types(params, "float32")) == [x.dtype for x in jax.tree.leaves(params)]


def test_control_may_choose_settings_that_change_no_parameter(tmp_path):
    # Fails if the fields are not merged into those of training, or do not reach the model that acts.
    backbone = build.open_backbone(BackboneConfig(name="kosmos-2-twin"), ["open the drawer"])
    policy = PolicyConfig(window=1, history="one_step", chunk=2, head=HEADS["flow"])
    experiment = ExperimentConfig(backbone=BackboneConfig(name="kosmos-2-twin"), policy=policy)
    model = build.make_model(experiment, backbone.vlm)
    params = random_params(model, make_batch(np.random.default_rng(0), window=1, windows=1, chunk=2))
    checkpoints.write_policy(tmp_path / "run", params, {"config": to_dict(experiment), "assets": dict(backbone.assets)})
    frame = {"static": np.zeros((40, 40, 3), np.uint8), "wrist": np.zeros((20, 20, 3), np.uint8)}

    def act(changes):
        opened = load.load_policy(tmp_path / "run", policy=changes)
        opened.reset("open the drawer")
        return opened.act(Observation(frame)).actions

    three, one = act(None), act({"head": {"num_steps": 1}})
    np.testing.assert_array_equal(three, act({"head": {"num_steps": 3}}))
    assert np.abs(three - one).max() > 1e-3
    with pytest.raises(ValueError, match="num_stepps"):
        act({"head": {"num_stepps": 1}})
    with pytest.raises(ValueError, match=r"head/.*checkpoint .*model"):
        act({"head": {"hidden_size": 32}})
