"""A policy's decisions are decided again as they were, and an iteration learns from them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.config import ProprioConfig
from robovlms_jax.policies.heads import discrete
from robovlms_jax.policies.vla import VLA
from robovlms_jax.rl import behaviours, learning, objective, starts
from robovlms_jax.rl import tables as playing
from robovlms_jax.rl.config import BehaviourConfig, UpdateConfig
from robovlms_jax.runs import build
from robovlms_jax.training import checkpoints, guards, stages
from robovlms_jax.training.config import OptimizerConfig, TrainConfig
from tests import processes, toy
from tests.rl.test_rollouts import SIZES, encode

HEADS = {
    "lstm": {"history": "policy_head", "window": 2},
    "adapters": {"history": "policy_head", "window": 2},
    "flow": {"history": "policy_head", "window": 2, "head": toy.HEADS["flow"]},
    "mlp": {"history": "interleaved", "window": 2, "head": toy.HEADS["mlp"]},
    "discrete": {
        "history": "one_step",
        "window": 1,
        "readout": "token",
        "head": discrete.DiscreteHeadConfig(num_bins=32, decoding="parallel"),
    },
}


def policy(head: str) -> tuple[VLA, dict]:
    """A small one with random parameters that sees the robot's state."""
    model = toy.make_model(chunk=3, proprio=ProprioConfig(enabled=True), **HEADS[head])
    if head == "adapters":
        model = dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, lora_rank=2))
    window = model.config.window
    batch = toy.make_batch(np.random.default_rng(0), window=window, windows=1, chunk=3)
    sensors = {"proprio": np.zeros((2, window, 7), np.float32)}
    batch = batch.replace(inputs=batch.inputs.replace(sensors=sensors))
    return model, toy.random_params(model, batch)


def learner(
    head: str, *, patterns: tuple[str, ...], seed: int = 0, reward=None, sizes=(1, 1, 1), tables=2, held=(), **update
) -> learning.Reinforcement:
    model, params = policy(head)
    mesh = meshes.make_mesh(sizes, jax.devices()[: math.prod(sizes)])
    if sizes[1:] != (1, 1):
        params = jax.device_put(params, build.abstract_params(model, mesh)[1])
    update = UpdateConfig(minibatches=2, **update)
    settings = learning.Settings(BehaviourConfig(), update, tables, 4, tuple(SIZES.items()), 2, 4, held)
    train = TrainConfig(steps=8, trainable=patterns)
    (stage,) = stages.plan(train, OptimizerConfig(learning_rate=1e-3))
    return learning.Reinforcement(model, params, settings, stage, mesh, seed, reward)


def world(groups: tuple[int, ...] = (0, 0)) -> playing.World:
    trials = starts.draw(("open_drawer", "turn_on_led"), ("A", "D"), 4, seed=0, spread=0.1)
    return playing.make_world(trials, encode, SIZES["static"]).take(np.arange(len(groups)), np.array(groups))


@pytest.mark.parametrize(
    "head", ["lstm", *(pytest.param(head, marks=pytest.mark.slow) for head in ("flow", "mlp", "discrete"))]
)
def test_a_decision_is_as_probable_when_it_is_reconsidered(head):
    """The ratio of the first minibatch is 1: what was drawn, from what was known then, by another program."""
    model, params = policy(head)
    own = objective.Learner(model, behaviours.make(model.config, BehaviourConfig()), (8,))
    params = {**params, "rl": own.extra_params(jax.random.key(0))}
    batch = toy.make_batch(np.random.default_rng(1), window=1, windows=1, chunk=3)
    seen = batch.inputs.replace(sensors={"proprio": np.ones((2, 1, 7), np.float32)})
    carry = model.init_carry(2, params, seen.text_ids.shape[1])

    @jax.jit
    def decide(params, seen, carry):
        features, context = own.perceive(params, seen, carry, jnp.ones(2, bool))
        actions, drawn, _ = own.head(params, features, context.head, jax.random.key(3))
        log_prob, _ = own.log_prob(params, features, context.head, drawn)
        return actions, drawn, log_prob, (features, context.head), own.value(params, features)

    actions, drawn, log_prob, (features, head_carry), value = decide(params, seen, carry)
    assert np.abs(actions).max() <= 1
    assert set(np.unique(actions[..., 6])) <= {-1.0, 1.0}
    views = [objective.View(None, features, head_carry)]
    if head != "mlp":  # of interleaved frames the history's state has no leading axis of decisions
        views.append(objective.View(seen, None, carry))
    for view in views:
        again = jax.jit(own.reconsider, static_argnums=3)(params, view, drawn, 2)
        assert np.abs(np.exp(again.log_prob - log_prob[:, :2]) - 1).max() < 1e-3
        np.testing.assert_allclose(again.value, value, atol=1e-4)


def test_a_behaviour_may_have_no_parameters():
    """Nothing is left of an empty dict once parameters have been told apart by their paths."""
    params = {"rl": {"behaviour": behaviours.FlowNoise(0.5).parameters(), "value": {"out": np.ones(1)}}}
    split = unflatten_dict(flatten_dict(params, sep="/"), sep="/")
    assert objective.behaviour_of(params) == objective.behaviour_of(split) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "patterns"),
    [
        ("lstm", ("^head/", "^rl/")),
        ("adapters", ("^head/", "lora_", "^rl/")),
        ("flow", ("^head/", "^rl/")),
        ("discrete", ("^backbone/connector/", "^rl/")),
    ],
)
def test_an_iteration_learns_with_a_first_ratio_of_one_and_goes_on_to_the_bit_after_a_stop(tmp_path, head, patterns):
    """Two iterations of PPO in one go, and one, a checkpoint, and the other: the same parameters. Nothing changes but
    what is trained, and of that every part does."""
    whole = learner(head, patterns=patterns, divergence_stop=0.0)
    frozen = jax.tree.map(np.array, whole.state.frozen)
    untouched = whole.state.params
    untouched = jax.tree.map(jnp.copy, untouched)  # updates take the state's own buffers
    decisions, numbers = whole.iterate(world(), 0)
    assert decisions.mask.any() and numbers["updates"] == 2
    first = whole.loss(untouched, decisions, None, whole.loss.count(decisions))[1]
    assert abs(float(first["ratio"]) - 1) < 1e-3 and abs(float(first["moved"])) < 1e-4
    saver = checkpoints.Checkpointer(tmp_path, keep=1, serving={"config": {}, "assets": {}})
    saver.save(whole.state, {})
    saver.wait()
    whole.iterate(world(), 1)
    again = learner(head, patterns=patterns, divergence_stop=0.0)
    again.state, _ = saver.restore(again.state)
    saver.close()
    again.iterate(world(), 1)
    assert int(whole.state.step) == int(again.state.step) == 4
    moved = set()
    for path, x in whole.state.trainable.items():
        np.testing.assert_array_equal(x, again.state.trainable[path], err_msg=path)
        if float(jnp.abs(x - whole.reference[path]).max()) > 1e-5:
            moved |= {pattern for pattern in patterns if re.search(pattern, path)}
    assert moved == {*patterns}
    jax.tree.map(np.testing.assert_array_equal, frozen, whole.state.frozen)
    trained = [path for path in whole.state.trainable if not any(re.search(pattern, path) for pattern in patterns)]
    assert not trained and all("lora_" not in path for path in frozen)
    assert whole.policy().keys() >= {"backbone", "proprio", "readout"} and "rl" not in whole.policy()


@pytest.mark.slow
def test_a_backbone_learns_from_stored_pictures_and_groups_without_a_winner_teach_nothing():
    grpo = learner("lstm", patterns=("^head/", "^backbone/connector/", "^rl/behaviour/"), method="grpo")
    decisions, _ = grpo.iterate(world(), 0)
    assert decisions.view.seen.images["static"].dtype == jnp.uint8
    assert not decisions.mask.any()  # nobody succeeds in four steps
    for path, x in grpo.state.trainable.items():
        np.testing.assert_array_equal(x, grpo.reference[path], err_msg=path)
    with_value = decisions.replace(
        mask=jnp.ones_like(decisions.mask), advantage=jnp.linspace(-1, 1, len(decisions.advantage))
    )
    gradient = jax.jit(jax.grad(lambda p: grpo.loss(p, with_value, None, grpo.loss.count(with_value))[0]))(
        grpo.state.params
    )
    assert float(jnp.abs(jax.tree.leaves(gradient["backbone"]["connector"])[0]).max()) > 0


def test_groups_are_not_compared_before_their_trials_may_end():
    settings = learning.Settings(BehaviourConfig(), UpdateConfig(method="grpo"), 8, 5, (), 4, 20)
    with pytest.raises(ValueError, match=r"decisions=4 of 4 control steps .* --decisions 5"):
        dataclasses.replace(settings, decisions=4)
    dataclasses.replace(settings, decisions=4, update=UpdateConfig())  # a value stands for what would follow


def test_a_trial_out_of_time_goes_on_in_its_last_looks_value_and_one_that_succeeded_ends():
    """One table: two decisions and no time left, a look, two decisions to success, the first of another trial."""

    def flags(*which: int) -> np.ndarray:
        return np.isin(np.arange(6), which)[:, None]

    names = ("over", "success", "looked", "trial")
    outcome = types.SimpleNamespace(**dict(zip(names, (flags(1, 4), flags(4), flags(2), np.zeros((6, 1), int)))))
    own = types.SimpleNamespace(settings=types.SimpleNamespace(update=UpdateConfig(discount=0.9, trace=0.5)))
    v = np.linspace(0.1, 0.7, 7)
    rewards, values = (jnp.asarray(x[:, None], jnp.float32) for x in (flags(4)[:, 0] * 1.0, v))
    advantage, target = learning.Reinforcement._judged(own, None, outcome, rewards, values)
    second, fifth = 0.9 * v[2] - v[1], 1 - v[4]
    known = [0.9 * v[1] - v[0] + 0.45 * second, second, 0.9 * v[4] - v[3] + 0.45 * fifth, fifth, 0.9 * v[6] - v[5]]
    rows = [0, 1, 3, 4, 5]  # the look itself is not learned from
    np.testing.assert_allclose(advantage[rows, 0], known, rtol=1e-5)
    np.testing.assert_allclose(target[rows, 0], np.array(known) + v[rows], rtol=1e-5)


def test_numbers_that_are_not_finite_end_the_run_instead_of_being_passed_over():
    bad = {"nonfinite": 1.0, "loss": np.nan, "moved": 0.0, "grad_norm": np.inf}
    own = types.SimpleNamespace(
        seed=0,
        state=types.SimpleNamespace(params=None),
        reference=None,
        settings=types.SimpleNamespace(update=UpdateConfig(minibatches=2)),
        _collect=lambda *what: (types.SimpleNamespace(mask=np.ones((4, 1))), {}),
        _part=lambda decisions, rows: decisions,
        _update=lambda state, decisions: (state, bad),
    )
    with pytest.raises(guards.DivergedError, match="iteration 3, update 1: grad_norm, loss not finite"):
        learning.Reinforcement.iterate(own, None, 2)


@pytest.mark.slow
def test_a_backbone_that_keeps_tokens_is_not_trained():
    with pytest.raises(ValueError, match="train the head alone"):
        learner("mlp", patterns=("^backbone/connector/",))


@pytest.mark.slow
def test_a_learned_reward_is_paid_for_what_every_decision_did():
    """A reward that is the distance to the drawer: what is paid is its mean after the decisions that were executed."""

    def far(frames):
        return frames[..., 1] + frames[..., 7 + 1]  # before, and how that changed

    own = learner("lstm", patterns=("^head/", "^rl/"), reward=far, reward_scale=0.5)
    decisions, numbers = own.iterate(world(), 0)
    assert decisions.counts.sum() > 0
    assert 0.1 < numbers["reward"] < 0.3  # half of some 40 cm


@pytest.mark.slow
def test_a_task_that_is_held_is_paid_nothing_and_weighs_where_the_policy_was():
    """Two tables, one of them opens the drawer, which is held: no advantage there, and no reward."""
    held = playing.NAMES.index("open_drawer")
    own = learner(
        "lstm", patterns=("^head/", "^rl/"), held=(held,), hold_weight=1.0, reward=lambda x: 1 + 0 * x[..., 0]
    )
    decisions, numbers = own.iterate(world(), 0)
    of_drawer = np.asarray(decisions.held)
    assert of_drawer.any() and not of_drawer.all()
    assert (np.asarray(decisions.advantage)[of_drawer] == 0).all() and decisions.mask[of_drawer].any()
    assert np.abs(np.asarray(decisions.advantage)[~of_drawer]).max() > 0
    np.testing.assert_allclose(numbers["reward"], own.settings.update.reward_scale, rtol=1e-5)  # of the others alone
    assert "loss_hold" in numbers


@pytest.mark.slow
def test_tables_and_updates_that_are_split_over_devices_have_the_results_of_one():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    said = processes.run_python("-m", "tests.rl.learning_on_devices", XLA_FLAGS=flags).split("\n")
    alike = ["True 2", "True", "True"]
    assert said[:8] == [*alike, *alike, "16 2 {2}", "True"]
