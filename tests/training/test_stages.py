"""Stages of a run: what they are made of, how batches are shared, what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from robovlms_jax import cli
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import from_dict, to_dict
from robovlms_jax.training import stages
from robovlms_jax.training import state as states
from robovlms_jax.training.config import OptimizerConfig, StageConfig, TrainConfig

TWO = (
    StageConfig(steps=3, name="align", trainable=("head/",), optimizer=OptimizerConfig(learning_rate=1e-3)),
    StageConfig(steps=4, weights={"caption": 0.0}),
)


def test_without_stages_a_run_is_one_made_of_its_own_settings():
    train, settings = TrainConfig(steps=7, seed=3, trainable=("head/",)), OptimizerConfig(learning_rate=1e-3)
    (stage,) = stages.plan(train, settings)
    assert (stage.begin, stage.end, stage.trainable, stage.seed) == (0, 7, ("head/",), 3)
    assert stage.optimizer is settings and not stage.weights and stage.sources == {"robot": 1.0}


def test_stages_follow_each_other_and_take_what_they_do_not_say_from_the_run():
    first, second = stages.plan(TrainConfig(stages=TWO, seed=3), OptimizerConfig())
    assert [(x.name, x.begin, x.end) for x in (first, second)] == [("align", 0, 3), ("2", 3, 7)]
    assert first.optimizer.learning_rate == 1e-3 and second.optimizer == OptimizerConfig()
    assert first.seed == 3 != second.seed
    assert second.position(5) == {"index": 1, "name": "2", "step": 2}


def test_stages_survive_their_json_and_add_up_to_the_runs_steps():
    config = cli.override(ExperimentConfig(), **{"train.stages": TWO})
    assert from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert config.resolve(1000, 24).train.steps == 7


def test_a_stages_warm_up_in_epochs_becomes_steps():
    asked = StageConfig(steps=9, optimizer=OptimizerConfig(warmup_epochs=2.0))
    config = cli.override(ExperimentConfig(), **{"train.stages": (asked,), "train.batch_size": 128})
    (stage,) = config.resolve(256, 24).train.stages
    assert (stage.optimizer.warmup_steps, stage.optimizer.warmup_epochs) == (4, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageConfig(steps=0, name="x"), "stage 'x' has steps=0"),
        (lambda: StageConfig(steps=1, name="x", trainable=()), "stage 'x': trainable must hold at least one pattern"),
        (lambda: StageConfig(steps=1, name="x", trainable=("(",)), r"stage 'x': trainable has '\('"),
        (lambda: StageConfig(steps=1, weights={"actions": -1.0}), "a stage: weights has {'actions': -1.0}"),
        (lambda: StageConfig(steps=1, sources={"robot": 0.0}), "no share above 0"),
        (lambda: TrainConfig(stages=TWO, epochs=1.0), "both say how long"),
        (lambda: TrainConfig(stages=TWO[:1] * 2), "two stages of one name"),
    ],
)
def test_a_stage_that_means_nothing_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_stage_that_does_not_fit_the_run_is_refused_before_anything_is_compiled():
    paths = ["head/kernel", "backbone/embed"]
    bad = TrainConfig(stages=(*TWO, StageConfig(steps=1, name="late", trainable=("heads/",))))
    with pytest.raises(ValueError, match=r"stage 'late': .*'heads/' \(near"):
        stages.check(stages.plan(bad, OptimizerConfig()), paths)
    alone = TrainConfig(stages=(StageConfig(steps=1, name="only", trainable=("^nothing/",)),))
    with pytest.raises(ValueError, match=r"stage 'only': .*no parameter: '\^nothing/'\. Paths begin with"):
        stages.check(stages.plan(alone, OptimizerConfig()), paths)


@pytest.mark.parametrize(
    ("shares", "total", "multiple", "expected"),
    [
        ({"robot": 1.0}, 8, 4, {"robot": 8}),
        ({"robot": 3.0, "web": 1.0}, 8, 1, {"robot": 6, "web": 2}),
        ({"robot": 0.99, "web": 0.01}, 8, 2, {"robot": 6, "web": 2}),  # nobody gets nothing
        ({"robot": 1.0, "web": 0.0}, 8, 1, {"robot": 8}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 8, 1, {"a": 3, "b": 3, "c": 2}),
    ],
)
def test_batches_are_shared_in_proportion(shares, total, multiple, expected):
    (stage,) = stages.plan(TrainConfig(stages=(StageConfig(steps=1, sources=shares),)), OptimizerConfig())
    assert stages.rows(stage, total, multiple) == expected


def test_batches_that_cannot_be_shared_are_refused():
    asked = StageConfig(steps=1, name="mixed", sources={"robot": 1.0, "web": 1.0})
    (stage,) = stages.plan(TrainConfig(stages=(asked,)), OptimizerConfig())
    with pytest.raises(ValueError, match=r"stage 'mixed': 8 segments .*\['robot', 'web'\] in multiples of 8"):
        stages.rows(stage, 8, 8)


def test_the_next_stage_begins_with_the_averages_that_the_one_before_served():
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    params = {"a": {"kernel": jax.device_put(np.zeros(3, np.float32), meshes.replicated(mesh))}, "b": {}}
    params["b"]["kernel"] = params["a"]["kernel"] + 1
    pair = (StageConfig(steps=3, name="a"), StageConfig(steps=2, name="b"))
    first, second = stages.plan(TrainConfig(stages=pair), OptimizerConfig(ema=0.5))
    state = states.create(params, ("a/",), first.tx, 5, mesh)
    state = state.replace(opt_state=state.opt_state._replace(ema={"a/kernel": state.trainable["a/kernel"] + 7}))
    after = states.resplit(state, ("b/",), second.tx, mesh)
    assert after.frozen["a/kernel"].tolist() == [7, 7, 7] and after.trainable["b/kernel"].tolist() == [1, 1, 1]


def test_shares_and_warm_ups_that_come_to_something_else_are_said():
    train = TrainConfig(stages=(StageConfig(steps=5, name="x", sources={"robot": 1000.0, "web": 1.0}),))
    (stage,) = stages.plan(train, OptimizerConfig(warmup_steps=5))
    said = stages.remarks(stage, stages.rows(stage, 4))
    assert "web has 25.0% of every batch, and 0.1% was asked for" in said[0]
    assert "warmup_steps=5 is no less than its 5 steps" in said[1] and len(said) == 2
    assert stages.undrawn([stage], ["robot", "web", "idle"]) == ["idle"]


def test_the_next_stage_keeps_parameters_and_begins_with_an_optimizer_of_its_own():
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    whole = meshes.replicated(mesh)
    params = {name: {"kernel": jax.device_put(np.full(3, i, np.float32), whole)} for i, name in enumerate(("a", "b"))}
    first, second = stages.plan(TrainConfig(stages=TWO), OptimizerConfig())
    state = states.create(params, ("a/",), first.tx, 5, mesh)
    state = state.replace(step=jax.numpy.int32(3), skipped=jax.numpy.int32(1))
    after = states.resplit(state, ("b/",), second.tx, mesh)
    assert set(after.trainable) == {"b/kernel"} and set(after.frozen) == {"a/kernel"}
    assert (int(after.step), int(after.skipped), int(after.begun)) == (3, 1, 2)
    np.testing.assert_array_equal(after.rng, state.rng)
    abstract = states.abstract(params, jax.tree.map(lambda x: x.sharding, params), ("b/",), second.tx, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(after)
