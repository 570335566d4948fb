"""Losses per entry against torch, and means over masks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.policies import losses


@pytest.mark.parametrize("delta", [0.1, 1.0, 2.5])
def test_regression_losses_equal_torchs(delta):
    # Fails where smooth-L1's beta is mistaken for Huber's delta, or where the squared error is halved.
    torch = pytest.importorskip("torch")

    rng = np.random.default_rng(0)
    prediction, target = rng.normal(0, 2, (2, 50)).astype(np.float32)
    here, there = torch.from_numpy(prediction), torch.from_numpy(target)
    functional = torch.nn.functional
    expected = {
        "huber": functional.huber_loss(here, there, reduction="none", delta=delta),
        "smooth_l1": functional.smooth_l1_loss(here, there, reduction="none", beta=delta),
        "mse": functional.mse_loss(here, there, reduction="none"),
    }
    assert set(expected) == set(losses.REGRESSION)
    for name, value in expected.items():
        np.testing.assert_allclose(losses.REGRESSION[name](prediction, target, delta), value.numpy(), rtol=1e-5)


def test_cross_entropies_equal_torchs():
    torch = pytest.importorskip("torch")

    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (5, 7)).astype(np.float32)
    ids = rng.integers(0, 7, 5)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(ids), reduction="none")
    np.testing.assert_allclose(losses.token_cross_entropy(jnp.asarray(logits), jnp.asarray(ids)), expected, rtol=1e-5)
    truth = rng.random(7) > 0.5
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits[0]), torch.from_numpy(truth.astype(np.float32)), reduction="none"
    )
    np.testing.assert_allclose(losses.binary_cross_entropy(logits[0], truth), expected, rtol=1e-5)


def test_means_count_masked_entries_of_the_whole_batch():
    # What a mask hides may be anything; micro-batches add up to the batch; nothing at all is zero.
    values = jnp.array([[[1.0, 3.0], [jnp.inf, 0.0]], [[5.0, 5.0], [jnp.nan, 1.0]]])
    mask = jnp.array([[True, False], [True, False]])
    whole = losses.masked_mean(values, mask, jnp.float32(2))
    assert whole == 3.5
    assert sum(losses.masked_mean(values[i], mask[i], jnp.float32(2)) for i in range(2)) == whole
    assert losses.masked_mean(values, jnp.zeros((2, 2), bool), jnp.float32(0)) == 0
