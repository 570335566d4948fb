"""Pairs that teach nothing say what was learned of the others beyond learning them by heart (DPO)."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.heads.continuous import ContinuousPrediction
from robovlms_jax.rl import behaviours, direct, objective
from robovlms_jax.rl.config import ReinforceConfig, UpdateConfig
from robovlms_jax.runs import preferring, reinforced, reinforcing
from robovlms_jax.training import stages
from robovlms_jax.training.config import OptimizerConfig, TrainConfig
from robovlms_jax.training.state import create
from tests.rl.test_objective import BEHAVIOUR, HEAD, start

PAIRS = 403
CONFIG = ReinforceConfig(
    checkpoint="RUN", tasks=("open_drawer",), group=2, pool=PAIRS, update=UpdateConfig(method="dpo", minibatches=4)
)

ANSWERED = dataclasses.replace(CONFIG, labels="runs/labels", group=ReinforceConfig.group)


class Memory:
    """A `Learner` with one number for all decisions, and one for each that it can learn by heart."""

    def __init__(self, *how):
        pass

    def reconsider(self, params, view, drawn, actions: int) -> objective.Reconsidered:
        mean = params["head"]["mean"] + params["head"]["own"][view.features]
        seen = ContinuousPrediction(mean[:, None, None], jnp.zeros((len(mean), 1, 0)))
        found, entropy = BEHAVIOUR.log_prob(HEAD, seen, params["rl"]["behaviour"], drawn)
        return objective.Reconsidered(found, entropy, jnp.zeros(len(mean)))


@pytest.fixture
def memory(monkeypatch):
    """Answers float32[PAIRS] by action float32[PAIRS, 2] -> a policy of `Memory` that learns from them, and pairs of
    rollouts of one decision, each pair from a start of its own."""
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])

    def begin(learner, params, stage, mesh, seed):
        placed = jax.device_put(params, meshes.replicated(mesh))
        return create(placed, stage.trainable, stage.tx, seed, mesh), {}

    monkeypatch.setattr(direct.rollouts, "require_playable", lambda config: None)
    monkeypatch.setattr(direct.behaviours, "make", lambda *how: None)
    monkeypatch.setattr(direct.objective, "Learner", Memory)
    monkeypatch.setattr(direct.learning, "begin", begin)
    monkeypatch.setattr(direct.learning, "is_head_alone", lambda *how: True)

    def made(answer, config: ReinforceConfig = CONFIG):
        actions = np.random.default_rng(0).normal(-0.5, 0.2, (PAIRS, 2)).astype(np.float32)
        flat, params = behaviours.Chosen(actions.reshape(-1, 1, 1)), start()
        params["head"]["own"] = jnp.zeros(2 * PAIRS)
        numbers = np.arange(2 * PAIRS)
        known = np.asarray(Memory().reconsider(params, objective.View(None, numbers, None), flat, 1).log_prob)
        pieces = direct.Pieces(
            numbers.reshape(-1, 2), np.zeros((PAIRS, 2), int), np.ones((PAIRS, 2), int), answer(actions)
        )
        held = preferring._held_out(pieces, config)
        decisions = direct.Known(objective.View(None, numbers, None), flat, known)
        found = direct.Comparisons(pieces, decisions, np.ones(2 * PAIRS, int), 1, 2 * PAIRS, held)
        optimizer = OptimizerConfig(learning_rate=2e-2, rates={"^head/mean$": 0.1})
        (stage,) = stages.plan(TrainConfig(steps=99, trainable=("^head/",)), optimizer)
        model = types.SimpleNamespace(config=None)
        update = dataclasses.replace(config.update, label_noise=0.0)
        return direct.DirectPreferences(model, params, None, update, stage, mesh, 0), found

    return made


def by_chance(actions: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2, len(actions)).astype(np.float32)


def further(actions: np.ndarray) -> np.ndarray:
    return (actions[:, 0] > actions[:, 1]).astype(np.float32)


def test_answers_by_chance_are_learned_by_heart_and_those_held_out_show_it(memory):
    config = dataclasses.replace(CONFIG, held_out=0.5)
    own, pairs = memory(by_chance, config)
    for number in range(4):
        _, found = own.iterate(pairs, number)
    assert found["preferred_taught"] > 0.95 and abs(found["preferred_held_out"] - 0.5) < 0.12
    assert found["loss_taught"] < np.log(2) - 0.02 and abs(found["loss_held_out"] - np.log(2)) < 5e-3
    assert found["margin_taught"] > 5 * abs(found["margin_held_out"])
    assert (found["pairs_taught"], found["pairs_held_out"]) == (201, 202)


def test_answers_that_are_right_are_given_of_pairs_that_taught_nothing_too(memory):
    own, pairs = memory(further)
    for number in range(4):
        _, found = own.iterate(pairs, number)
    assert found["preferred_taught"] > 0.95 and found["preferred_held_out"] == 1
    assert found["loss_held_out"] < np.log(2) and found["margin_held_out"] > 0


def test_what_is_held_out_moves_nothing_and_is_measured_as_the_loss_says(memory):
    """Of 403 pairs 40 are held out, in blocks of 90: the last block is filled up, which must not count."""
    own, pairs = memory(further)
    assert len(pairs.held_out) == 40 and len(pairs.teaching) == 363
    _, found = own.iterate(pairs, 0)
    moved = np.asarray(own.state.params["head"]["own"]).reshape(-1, 2)
    assert not moved[pairs.held_out].any() and (moved[pairs.teaching] != 0).any(1).mean() > 0.9
    _, by_loss = jax.jit(own.loss)(own.state.params, pairs.take(pairs.teaching), None, len(pairs.teaching))
    for name in ("loss", "preferred", "margin"):
        np.testing.assert_allclose(found[f"{name}_taught"], by_loss[name], rtol=1e-5, atol=1e-6)


def test_without_a_share_all_pairs_teach_and_nothing_is_said_of_others(memory):
    own, pairs = memory(further, dataclasses.replace(CONFIG, held_out=0.0))
    assert len(pairs.teaching) == PAIRS and not len(pairs.held_out)
    assert not [name for name in own.iterate(pairs, 0)[1] if name.endswith(("_taught", "_held_out"))]


def pieces_of(rollout, better) -> direct.Pieces:
    rollout = np.asarray(rollout)
    return direct.Pieces(rollout, np.zeros_like(rollout), np.ones_like(rollout), np.asarray(better, np.float32))


def test_whole_starts_are_held_out_so_that_no_rollout_is_on_both_sides():
    config = dataclasses.replace(CONFIG, group=4, held_out=0.2)
    rng = np.random.default_rng(0)
    rollout = np.stack([4 * start + rng.permutation(4)[:2] for start in np.repeat(np.arange(30), 5)])
    pieces = pieces_of(rollout, rng.integers(0, 2, len(rollout)))
    held = preferring._held_out(pieces, config)
    assert len({*rollout[held, 0] // 4}) == 6 and held.sum() == 30
    assert not {*rollout[held].ravel()} & {*rollout[~held].ravel()}
    np.testing.assert_array_equal(held, preferring._held_out(pieces, config))
    other = preferring._held_out(pieces, dataclasses.replace(config, seed=1))
    assert (held != other).any()


def test_of_a_persons_answers_some_that_prefer_one_are_held_out():
    rollout = np.stack([np.arange(40), np.arange(40) + 1], axis=1)
    pieces = pieces_of(rollout, np.where(np.arange(40) % 2, 1.0, 0.5))
    held = preferring._held_out(pieces, ANSWERED)
    assert held.sum() == 2 and (pieces.first_better[held] == 1).all()


@pytest.mark.parametrize(
    ("better", "changes", "message"),
    [
        ([1.0] * 4, {}, r"3 answers to learn from, of which 3 prefer one, .*minibatches=4 .*\(1 more are held out\)"),
        ([1.0, *[0.5] * 9], {}, r"9 answers to learn from, of which 0 prefer one, .*--held_out 0\)"),
    ],
)
def test_too_few_answers_to_hold_some_out_are_refused(better, changes, message):
    config = dataclasses.replace(ANSWERED, **changes)
    pieces = pieces_of(np.arange(2 * len(better)).reshape(-1, 2), better)
    with pytest.raises(ValueError, match=message):
        preferring._require_enough(pieces, preferring._held_out(pieces, config), config)
    without = dataclasses.replace(config, held_out=0.0)
    preferring._require_enough(pieces, preferring._held_out(pieces, without), without)


def test_shares_that_make_no_sense_are_refused():
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"held_out=.* must lie in \[0, 1\)"):
            dataclasses.replace(CONFIG, held_out=share)
    with pytest.raises(ValueError, match=r"give 0 pairs at most to learn from \(1 starts are held out\)"):
        dataclasses.replace(CONFIG, pool=1)
    dataclasses.replace(CONFIG, pool=1, group=4, held_out=0.0)


def test_a_run_of_a_version_without_held_out_pairs_goes_on_without(tmp_path, monkeypatch):
    monkeypatch.setattr(reinforcing.seals, "identity", lambda path: types.SimpleNamespace(label="step_1-abc"))
    for config, goes_on in ((CONFIG, {"held_out": 0.0}), (ReinforceConfig(checkpoint="RUN"), {})):
        out = tmp_path / config.update.method
        out.mkdir()
        reinforcing._settle(config, out)
        settings = json.loads((out / "reinforce.json").read_text())
        del settings["held_out"]
        (out / "reinforce.json").write_text(json.dumps(settings))
        resumed = dataclasses.replace(config, resume=True)
        if goes_on:
            with pytest.raises(ValueError, match=r"other settings \(held_out: "):
                reinforcing._settle(resumed, out)
        reinforcing._settle(dataclasses.replace(resumed, **goes_on), out)


def test_the_report_says_what_is_given_of_both_kinds_of_pairs():
    last = {"pairs_taught": 1800, "pairs_held_out": 200}
    for part, share in (("taught", 0.93), ("held_out", 0.61)):
        last |= {f"preferred_{part}": share, f"loss_{part}": 0.25, f"margin_{part}": 4.0}
    said = reinforced._answers({"labels": ""}, last)
    assert "1800 teach, 200 are held out, about rollouts from other starts" in said
    assert "gives 93.0% of those that teach" in said and "61.0% of those that are held out" in said
    assert "may have taught in others" in reinforced._answers({"labels": "runs/labels"}, last)
    assert "not known" in reinforced._answers({"labels": ""}, {})
    row = {"step": 1, "preferred": 0.9, "from_reference": 0.1, **last}
    table = reinforced._curve([row])
    assert "| given after it | of those held out |" in table[2] and "| 93.0% | 61.0% |" in table[4]
