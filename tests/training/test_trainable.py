"""Which parameters train: patterns that match nothing, or nothing that is learned, are refused by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from robovlms_jax.training import trainable

PATHS = ("backbone/text/layers/attn/q/kernel", "head/out/bias", "head/out/kernel", "auxiliary/forward/kernel")
PARAMS = {path: jax.ShapeDtypeStruct((3, 3), jnp.float32) for path in PATHS}
BATCH = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def loss(params, batch, key):
    """As a policy's whose forward prediction is off, with a bias whose gradient is stopped."""

    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    x, _ = jax.lax.scan(layer, batch, params["backbone"]["text"]["layers"]["attn"]["q"]["kernel"][None])
    out = x @ params["head"]["out"]["kernel"] + jax.lax.stop_gradient(params["head"]["out"]["bias"])[0]
    return jnp.square(out).mean(), {"unweighted": params["auxiliary"]["forward"]["kernel"].sum()}


@pytest.mark.parametrize(("pattern", "near"), [("^haed/", "head"), ("axiliary/", "auxiliary"), ("text/atn", "text/")])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest(pattern, near):
    with pytest.raises(ValueError, match=rf"match no parameter: '{pattern}' \(near: \[.*'.*{near}".replace("^", r"\^")):
        trainable.split(dict.fromkeys(PATHS), ("^head/", pattern))


@pytest.mark.parametrize("pattern", ["^auxiliary/", "bias$", "auxiliary|bias"])
def test_a_pattern_of_parameters_that_no_task_depends_on_is_refused_by_name(pattern):
    with pytest.raises(ValueError, match=r"no active task depends on.*: '\^?(auxiliary|bias)"):
        trainable.require_reached(loss, PARAMS, BATCH, ("^head/", pattern))


@pytest.mark.parametrize("patterns", [(".*",), ("^head/", "attn"), ("^(head|auxiliary)/",), ("head/out/kernel",)])
def test_a_pattern_by_which_something_learns_is_accepted(patterns):
    trainable.require_reached(loss, PARAMS, BATCH, patterns)
    with pytest.raises(ValueError, match="'bias'"):  # one beside it by which nothing does is not excused
        trainable.require_reached(loss, PARAMS, BATCH, (*patterns, "bias"))
