"""A whole upstream policy, converted by our rules, gives upstream's numbers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from robovlms_jax import upstream
from robovlms_jax.backbones import registry
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import vla
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.runs import build
from robovlms_jax.types import Inputs
from robovlms_jax.weights import convert
from tests.weights.array_source import ArraySource

W, C = 8, 10


@pytest.fixture(scope="module")
def policy(golden, shared_data):
    """Model, parameters from upstream's state dict, and the recorded inputs and outputs."""
    meta = json.loads((shared_data / "golden" / "kosmos" / "meta.json").read_text())
    vlm = registry.from_hf_config(meta["kosmos_config"])
    head = LSTMHeadConfig(hidden_size=16)
    model = vla.VLA(PolicyConfig(window=W, chunk=C, cameras=("static",), head=head), vlm)
    state = {key.removeprefix("w/"): x for key, x in golden("kosmos/weights_lstm.npz").items() if key.startswith("w/")}
    assert {f"model.{key}" for key in state} >= set(meta["checkpoint_keys"])
    state = {f"model.{key}": x for key, x in state.items()}  # as a trained checkpoint spells them
    shapes, shardings = build.abstract_params(model, meshes.make_mesh((1, 1, 1), jax.devices()[:1]))
    params = convert.load_params(upstream.policy_rules(model), ArraySource(state), shapes, shardings)
    return model, params, golden("kosmos/post_lstm.npz")


def inputs_of(data, row: int) -> Inputs:
    """One sample with its own prompt unpadded: upstream moves the action token behind a batch's padding, for a sample
    alone it does not."""
    frames = np.moveaxis(data["vision_x"][row : row + 1], 2, -1)
    length = int(data["attention_mask"][row].sum())
    ids = data["lang_x"][row : row + 1, :length].astype(np.int32)
    return Inputs({"static": frames}, ids, np.ones((1, length), bool), np.ones((1, W), bool))


def apply(model, params, inputs, **kwargs):
    return jax.jit(functools.partial(model.apply, **kwargs))({"params": params}, inputs)


def longest(data) -> int:
    return int(np.argmax(data["attention_mask"].sum(1)))


def test_features_and_actions(policy, exact_matmul):
    # The longest prompt of upstream's batch has no padding, so upstream's layout and ours are the same for it.
    model, params, data = policy
    row = longest(data)
    outputs = apply(model, params, inputs_of(data, row), method="train_outputs")
    np.testing.assert_allclose(outputs.features[0], data["action_hs"][row], atol=1e-4)
    prediction = outputs.prediction
    np.testing.assert_allclose(prediction.arm[0], data["infer_arm"][row], atol=1e-5)
    np.testing.assert_allclose(prediction.gripper_logit[0, ..., 0], data["infer_gripper"][row, ..., 0], atol=1e-5)


def test_streaming(policy, exact_matmul):
    # Frame by frame past the window, as upstream's evaluator drives it (batch 1, so no padding).
    model, params, data = policy
    frames = np.moveaxis(data["stream_rgb"], 2, -1)
    row = longest(data)
    prompts = [inputs_of(data, row), inputs_of(data, 1 - row)]
    errors = []
    step = jax.jit(functools.partial(model.apply, method="step"))
    for inputs in prompts:  # which of the two prompts was used is not recorded: one of them must fit throughout
        carry, worst = model.init_carry(1), 0.0
        for t in range(frames.shape[1]):
            one = inputs.replace(images={"static": frames[:, t : t + 1]}, step_mask=np.ones((1, 1), bool))
            actions, carry = step({"params": params}, one, carry)
            worst = max(worst, float(np.abs(actions[0, :, :6] - data["stream_arm"][0, t, 0]).max()))
            worst = max(worst, float(np.any((actions[0, :, 6] > 0) != (data["stream_gripper"][0, t, 0, :, 0] > 0))))
        errors.append(worst)
    assert min(errors) < 1e-5, errors


def test_every_tensor_is_used_and_a_foreign_one_is_named(policy):
    model, params, _ = policy
    shapes = {path: x.shape for path, x in flatten_dict(params, sep="/").items()}
    source = {"model.act_head.rnn.weight_ih_l9": (64, 16)}
    with pytest.raises(ValueError, match="weight_ih_l9"):
        convert.plan(upstream.policy_rules(model), source, shapes)


def test_padding_a_prompt_keeps_upstreams_unpadded_numbers(policy, exact_matmul):
    model, params, data = policy
    row = longest(data)
    inputs = inputs_of(data, row)
    padded = inputs.replace(
        text_ids=np.pad(inputs.text_ids, ((0, 0), (0, 6)), constant_values=1),
        text_mask=np.pad(inputs.text_mask, ((0, 0), (0, 6))),
    )
    features = apply(model, params, padded, method="train_outputs").features
    np.testing.assert_allclose(features[0], data["action_hs"][row], atol=1e-4)
    assert features.dtype == jnp.float32


def test_compat_options_give_a_padded_batch_upstreams_numbers(policy, exact_matmul):
    # Both prompts of upstream's batch at once, the shorter one padded: its action token comes after eos and padding,
    # and positions count both. Without either option the shorter prompt's features are others (last lines).
    model, params, data = policy
    lengths = data["attention_mask"].sum(1)
    assert len(set(lengths)) > 1
    inputs = Inputs(
        {"static": np.moveaxis(data["vision_x"], 2, -1)},
        data["lang_x"].astype(np.int32),
        data["attention_mask"].astype(bool),
        np.ones((len(lengths), W), bool),
    )
    errors = {}
    for count, last in itertools.product((False, True), repeat=2):
        config = dataclasses.replace(model.config, compat_count_padding=count, compat_queries_last=last)
        found = apply(dataclasses.replace(model, config=config), params, inputs, method="train_outputs").features
        errors[count, last] = np.abs(found - data["action_hs"]).max(axis=(1, 2, 3))
    assert errors[True, True].max() < 1e-4
    shorter, longest_row = int(np.argmin(lengths)), longest(data)
    for other in ((False, False), (True, False), (False, True)):
        assert errors[other][longest_row] < 1e-4, "the longest prompt has no padding"
        assert errors[other][shorter] > 1e-3


def test_compat_options_leave_control_as_it_is(policy, exact_matmul):
    # Upstream's evaluator has one prompt and no padding; ours pads prompts to a multiple of eight.
    model, params, data = policy
    config = dataclasses.replace(model.config, compat_count_padding=True, compat_queries_last=True)
    inputs = inputs_of(data, longest(data))
    inputs = inputs.replace(
        images={"static": inputs.images["static"][:, :1]},
        step_mask=np.ones((1, 1), bool),
        text_ids=np.pad(inputs.text_ids, ((0, 0), (0, 3)), constant_values=1),
        text_mask=np.pad(inputs.text_mask, ((0, 0), (0, 3))),
    )
    actions = [
        jax.jit(functools.partial(each.apply, method="step"))({"params": params}, inputs, each.init_carry(1))[0]
        for each in (model, dataclasses.replace(model, config=config))
    ]
    np.testing.assert_array_equal(*actions)


def test_compat_options_are_refused_where_upstream_has_nothing_like_them():
    with pytest.raises(ValueError, match="one_step and policy_head; this one is 'interleaved'"):
        PolicyConfig(history="interleaved", compat_queries_last=True)
