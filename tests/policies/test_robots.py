"""Heads for actions of any mixture of numbers and binary grippers, in any order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.actions import normalize
from robovlms_jax.policies.heads import base, continuous, mlp
from tests.toy import HEADS

W, C = 2, 3
MIXTURES = {"alone": (4, ()), "two grippers": (5, (0, 3)), "decisions only": (2, (0, 1))}


def make(kind, action_dim, binary):
    token = HEADS[kind].readouts == ("token",)
    queries, features = (C * action_dim, 40) if token else (2, 24)
    head = base.build(
        HEADS[kind], window=W, chunk=C, action_dim=action_dim, binary=binary, feature_dim=features, num_queries=queries
    )
    return head, jax.random.normal(jax.random.key(0), (2, W, queries, features))


@pytest.mark.parametrize(
    ("kind", "mixture"),
    [*(("mlp", mixture) for mixture in MIXTURES), ("flow", "two grippers"), ("discrete", "two grippers")],
)
def test_any_mixture_of_numbers_and_grippers_is_predicted_in_its_own_columns(kind, mixture):
    action_dim, binary = MIXTURES[mixture]
    head, features = make(kind, action_dim, binary)
    steps = jnp.ones((2, W), bool)

    @jax.jit
    def run(key):
        params = head.init(key, features, steps)
        prediction, scope = head.apply(params, features, steps), {"params": params.get("params", {})}
        actions = head.apply(scope, prediction, method="actions")
        target = jnp.where(np.isin(np.arange(action_dim), binary), 1.0, 0.3) * jnp.ones(actions.shape)
        mask, count = jnp.ones(actions.shape[:-1], bool), jnp.float32(np.prod(actions.shape[:-1]))
        return actions, *head.apply(scope, prediction, target, mask, count, method="loss")

    actions, loss, metrics = run(jax.random.key(1))
    assert actions.shape == (2, W, C, action_dim)
    numbers = [column for column in range(action_dim) if column not in binary]
    assert set(np.unique(actions[..., list(binary)])) <= {-1.0, 1.0}
    assert numbers == [] or len(np.unique(actions[..., numbers])) > 2
    assert np.isfinite(loss)
    assert any("arm" in name for name in metrics) == bool(numbers)
    assert any("gripper" in name for name in metrics) == bool(binary)


def test_each_column_is_taught_by_its_own_kind_of_loss():
    sizes = {"window": 1, "chunk": 1, "action_dim": 4, "binary": (1, 2), "feature_dim": 8, "num_queries": 1}
    head = base.build(mlp.MLPHeadConfig(gripper_loss_weight=1.0), **sizes)
    arm, logits = jnp.array([[[0.5, -0.5]]]), jnp.array([[[3.0, -3.0]]])
    prediction = continuous.ContinuousPrediction(arm, logits)
    one = jnp.ones((1, 1), bool), jnp.float32(1)
    right, metrics = head.loss(prediction, jnp.array([[[0.5, 1.0, -1.0, -0.5]]]), *one)
    assert metrics["loss_arm"] == 0 and metrics["acc_gripper"] == 1 and right < 0.1
    np.testing.assert_array_equal(head.actions(prediction)[0, 0], [0.5, 1, -1, -0.5])
    swapped, _ = head.loss(prediction, jnp.array([[[0.5, -1.0, 1.0, -0.5]]]), *one)
    assert swapped > 2.9


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_bounds_have_one_number_for_each_dimension_that_is_no_binary_gripper(drawn):
    action_dim, binary = drawn[0], tuple(sorted(drawn[1]))
    rng = np.random.default_rng(action_dim)
    low = rng.uniform(-3, -1, action_dim - len(binary))
    scaled = [column for column in range(action_dim) if column not in binary]
    actions = np.sign(rng.normal(size=(5, action_dim))).astype(np.float32)
    actions[:, scaled] = rng.uniform(low, low + 2, (5, len(scaled)))
    normalizer = normalize.Normalizer(tuple(low), tuple(low + 2), binary)
    normal = normalizer.normalize(actions)
    np.testing.assert_array_equal(normal[:, list(binary)], actions[:, list(binary)])
    assert np.abs(normal).max() <= 1 + 1e-6
    np.testing.assert_allclose(normalizer.unnormalize(normal), actions, atol=1e-5)
