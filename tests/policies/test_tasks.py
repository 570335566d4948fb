"""Losses as tasks: one forward pass, weights, several sources."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from robovlms_jax.policies import objective
from robovlms_jax.policies.auxiliary_config import AuxiliaryConfig
from robovlms_jax.policies.tasks import base, registry
from tests import toy

MODEL = toy.make_model(auxiliary=AuxiliaryConfig(caption_weight=0.2))
BATCH = toy.make_batch(np.random.default_rng(0))


def test_the_loss_is_the_weighted_sum_of_tasks_on_one_forward_pass(monkeypatch):
    params, passes = toy.random_params(MODEL, BATCH), []
    forward = objective._forward
    monkeypatch.setattr(objective, "_forward", lambda *x: passes.append(1) or forward(*x))

    def losses(params):
        tasks = registry.make(MODEL.config)
        whole, metrics = objective.RobotLoss(MODEL)(params, BATCH)
        chosen = [base.reweigh(tasks, weights) for weights in ({"caption": 0.0}, {"actions": 0.0, "caption": 3.0})]
        return whole, metrics, [objective.RobotLoss(MODEL, x)(params, BATCH)[0] for x in chosen]

    whole, metrics, (actions, caption) = jax.device_get(jax.jit(losses)(params))
    assert len(passes) == 3  # one for each of the three losses
    assert metrics["loss"] == whole and metrics["loss_caption"] > 0
    np.testing.assert_allclose(whole, actions + 0.2 * metrics["loss_caption"], rtol=1e-5)
    np.testing.assert_allclose(caption, 3.0 * metrics["loss_caption"], rtol=1e-5)


def test_weights_of_unknown_tasks_and_of_none_are_refused():
    tasks = registry.make(MODEL.config)
    with pytest.raises(
        ValueError, match=r"\['forward'\], which this policy does not learn; .*\['actions', 'caption'\]"
    ):
        base.reweigh(tasks, {"forward": 1.0})
    with pytest.raises(ValueError, match="nothing would be learned"):
        base.reweigh(tasks, {"actions": 0.0, "caption": 0.0})


class Constant:
    """The loss of a source that has nothing to do with robots: the mean of its numbers, with noise where asked."""

    def count(self, batch):
        return batch.size * 1.0

    def __call__(self, params, batch, key=None, count=None):
        noise = 0.0 if key is None else jax.random.normal(key)
        value = (batch.sum() + noise) / count
        return value, {"loss": value, "acc": value}


def test_sources_add_up_and_keep_their_metrics_apart():
    loss_fn = objective.LossBySource({"a": Constant(), "b": Constant()})
    batches = {"a": np.full(2, 1.0), "b": np.full(4, 3.0)}
    loss, metrics = loss_fn(None, batches, None, loss_fn.count(batches))
    assert loss == 4.0
    assert metrics == {"loss": 4.0, "loss_a": 1.0, "acc": 1.0, "loss_b": 3.0, "acc_b": 3.0}


def test_a_sources_weight_counts_in_the_sum_and_leaves_its_own_metrics_alone():
    loss_fn = objective.LossBySource({"a": Constant(), "b": Constant()}, weights={"b": 0.25})
    batches = {"a": np.full(2, 1.0), "b": np.full(4, 3.0)}
    loss, metrics = loss_fn(None, batches, None, loss_fn.count(batches))
    assert loss == 1.75
    assert metrics == {"loss": 1.75, "loss_a": 1.0, "acc": 1.0, "loss_b": 3.0, "acc_b": 3.0}


def test_a_source_beside_it_changes_nothing_that_the_first_one_draws():
    one, two = ({name: Constant() for name in names} for names in ("a", "ab"))
    batches, key = {"a": np.full(2, 1.0), "b": np.full(2, 1.0)}, jax.random.key(0)
    found = []
    for losses in (one, two):
        loss_fn = objective.LossBySource(losses)
        found.append(loss_fn(None, batches, key, loss_fn.count(batches))[1])
    assert found[0]["acc"] == found[1]["acc"] != found[1]["acc_b"]
