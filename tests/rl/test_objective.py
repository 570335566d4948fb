"""Updates from decisions: against a hand-computed one, and a bandit that is solved."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.heads.continuous import ContinuousPrediction
from robovlms_jax.rl import behaviours, objective
from robovlms_jax.rl.config import UpdateConfig
from robovlms_jax.rl.critic import Critic
from robovlms_jax.training import stages, step
from robovlms_jax.training.config import OptimizerConfig, TrainConfig
from robovlms_jax.training.state import create

HEAD = types.SimpleNamespace(scaled=(0,), binary=(), action_dim=1)
BEHAVIOUR = behaviours.Gaussian((0.2,), 0.0, 0.03, 1.0)


class Bandit:
    """One state, one action of one number: a `Learner` whose whole head is the mean."""

    def prediction(self, params, batch: int) -> ContinuousPrediction:
        return ContinuousPrediction(jnp.broadcast_to(params["head"]["mean"], (batch, 1, 1)), jnp.zeros((batch, 1, 0)))

    def reconsider(self, params, view, drawn, actions: int) -> objective.Reconsidered:
        batch = len(drawn.actions)
        seen = self.prediction(params, batch)
        found, entropy = BEHAVIOUR.log_prob(HEAD, seen, params["rl"]["behaviour"], drawn)
        return objective.Reconsidered(found, entropy, jnp.broadcast_to(params["rl"]["value"], (batch,)))


def start() -> dict:
    return {
        "head": {"mean": jnp.float32(-0.5)},
        "rl": {"behaviour": BEHAVIOUR.parameters(), "value": jnp.float32(0.0)},
    }


def decisions(actions: jax.Array, log_prob: jax.Array, advantage: jax.Array, **changes) -> objective.Decisions:
    zeros = jnp.zeros(len(actions))
    mask = jnp.ones((len(actions), 1), bool)
    drawn = behaviours.Chosen(actions)
    made = objective.Decisions(None, drawn, mask, log_prob, log_prob, zeros, advantage, zeros, zeros > 0)
    return made.replace(**changes)


@functools.partial(jax.jit, static_argnums=2)
def tried(params, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """Actions float32[batch, 1, 1] and their log-probabilities."""
    seen = Bandit().prediction(params, batch)
    _, drawn = BEHAVIOUR.draw(HEAD, seen, params["rl"]["behaviour"], key)
    return drawn.actions, BEHAVIOUR.log_prob(HEAD, seen, params["rl"]["behaviour"], drawn)[0]


def test_the_first_update_is_the_plain_policy_gradient():
    """Nothing has moved yet: all ratios are 1, and the gradient of the mean is -E[A (a - mean) / std^2]."""
    params = start()
    actions, log_prob = tried(params, jax.random.key(0), 16)
    advantage = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    loss = objective.DecisionLoss(Bandit(), objective.tasks_of(UpdateConfig(value_weight=0.0)))
    batch = decisions(actions, log_prob, advantage)
    step_of = jax.jit(lambda params: jax.value_and_grad(loss, has_aux=True)(params, batch, None, loss.count(batch)))
    (_, metrics), gradient = step_of(params)
    np.testing.assert_allclose(metrics["ratio"], 1, atol=1e-6)
    assert abs(metrics["moved"]) < 1e-6
    assert metrics["clipped"] == 0
    by_hand = -(advantage * (actions[:, 0, 0] + 0.5) / 0.2**2).mean()
    np.testing.assert_allclose(gradient["head"]["mean"], by_hand, rtol=1e-5)
    units = (actions[:, 0, 0] + 0.5) / 0.2
    np.testing.assert_allclose(
        gradient["rl"]["behaviour"]["log_std"][0], -(advantage * (units**2 - 1)).mean(), rtol=1e-4, atol=1e-6
    )


def test_a_decision_that_has_become_certain_has_a_finite_loss_and_gradient():
    """As sums over a chunk may: the old policy gave it a probability of e^-200."""
    params = start()
    actions, log_prob = tried(params, jax.random.key(0), 3)
    batch = decisions(actions, log_prob - 200, jnp.array([0.0, 1.0, -1.0]))
    loss = objective.DecisionLoss(Bandit(), objective.tasks_of(UpdateConfig(level="chunk")))
    step_of = jax.jit(lambda params: jax.value_and_grad(loss, has_aux=True)(params, batch, None, 3.0))
    (value, _), gradient = step_of(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient)))


def test_what_is_held_goes_back_to_where_it_was_and_the_rest_does_not():
    """The mean has moved from -0.5, where decisions were drawn and are held, to -0.4: the gradient leads back."""
    before, params = start(), start()
    actions, log_prob = tried(before, jax.random.key(0), 256)
    params["head"]["mean"] += 0.1
    loss = objective.DecisionLoss(Bandit(), (objective.HoldTask(2.0, "action"),))
    zeros = jnp.zeros(256)
    gradient = jax.jit(jax.grad(lambda params, batch: loss(params, batch, None, loss.count(batch))[0]))
    batches = [decisions(actions, log_prob, zeros, held=jnp.full(256, held)) for held in (True, False)]
    found = [gradient(params, batch)["head"]["mean"] for batch in batches]
    assert found[1] == 0
    assert found[0] > 0.5  # of the exact 2 * 0.1 / 0.2^2
    assert "hold" in {task.name for task in objective.tasks_of(UpdateConfig(hold_weight=1.0))}
    assert "hold" not in {task.name for task in objective.tasks_of(UpdateConfig())}


def test_decisions_that_do_not_count_change_nothing():
    params = start()
    actions, log_prob = tried(params, jax.random.key(0), 4)
    advantage = jnp.array([1.0, -2.0, 50.0, 3.0])
    tasks = objective.tasks_of(UpdateConfig(divergence_weight=0.1, entropy_weight=0.1))
    loss = objective.DecisionLoss(Bandit(), tasks)
    few = decisions(actions[:2], log_prob[:2] - 0.1, advantage[:2])
    mask = jnp.array([[True], [True], [False], [False]])
    all_of_them = decisions(actions, log_prob - 0.1, advantage, mask=mask, target=jnp.array([0, 0, 9.0, 9.0]))
    found = [jax.jit(jax.grad(lambda p, b=b: loss(p, b, None, loss.count(b))[0]))(params) for b in (few, all_of_them)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


@pytest.mark.parametrize("level", ["chunk", "action", "token"])
def test_a_ratio_is_of_the_chunk_each_action_or_each_number(level):
    logs = jnp.log(jnp.array([[[1.1, 1.2], [1.3, 1.0], [9.0, 9.0]]]))
    mask = jnp.array([[True, True, False]])
    found, counts = objective.by_level(logs, mask, level)
    expected = {"chunk": [1.1 * 1.2 * 1.3], "action": [1.1 * 1.2, 1.3], "token": [1.1, 1.2, 1.3, 1.0]}[level]
    np.testing.assert_allclose(jnp.exp(found)[counts], expected, rtol=1e-5)


def test_the_critic_learns_from_the_first_querys_features_and_does_not_teach_them():
    critic, features = Critic((4,)), jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    params = meshes.unbox(jax.jit(critic.init)(jax.random.key(0), features)["params"])
    value = jax.jit(lambda params, features: critic.apply({"params": params}, features))
    gradients = jax.jit(jax.grad(lambda *what: jnp.square(value(*what) - 1).sum(), (0, 1)))
    own, of_features = gradients(params, features)
    assert float(jnp.abs(own["layer_0"]["kernel"]).max()) > 0 == float(jnp.abs(of_features).max())
    np.testing.assert_array_equal(value(params, features), value(params, features.at[:, 1:].set(9.0)))


@pytest.mark.parametrize("method", ["ppo", pytest.param("awr", marks=pytest.mark.slow)])
def test_a_bandit_is_solved_in_two_hundred_updates(method):
    """The reward is highest at 0.3; the mean begins at -0.5 and must come within 0.02. An update is `make_train_step`'s
    over the tasks, as in a run."""
    optimizer = OptimizerConfig(learning_rate=0.03, schedule="cosine")
    train = TrainConfig(steps=200, trainable=("^head/", "^rl/"))
    (stage,) = stages.plan(train, optimizer)
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    state = create(start(), stage.trainable, stage.tx, 0, mesh)
    loss = objective.DecisionLoss(Bandit(), objective.tasks_of(UpdateConfig(method=method)))
    update = step.make_train_step(loss, stage.tx, stage.learning_rate, state, mesh)

    @jax.jit
    def collect(params, key):
        actions, log_prob = tried(params, key, 64)
        reward = -jnp.square(actions[:, 0, 0] - 0.3)
        value = jnp.broadcast_to(params["rl"]["value"], reward.shape)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        return decisions(actions, log_prob, advantage, value=value, target=reward)

    for number in range(200):
        state, metrics = update(state, collect(state.params, jax.random.key(number)))
        assert abs(float(metrics["ratio"]) - 1) < 1e-3
    assert abs(float(state.params["head"]["mean"]) - 0.3) < 0.02
    assert abs(float(state.params["rl"]["value"])) < 0.1  # what little is lost around the best action


def test_impossible_updates_are_refused():
    for field, value in (("discount", 0.0), ("trace", 1.5), ("clip_low", 1.0), ("dual_clip", 0.5), ("epochs", 0)):
        with pytest.raises(ValueError, match=f"update.{field}"):
            dataclasses.replace(UpdateConfig(), **{field: value})
