"""Serving types change no number."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax import load
from robovlms_jax.policies import objective
from tests.toy import init, make_batch, make_model


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
