"""Runs in stages, from their first to their last step: one is the plain run, and several can be stopped anywhere."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from robovlms_jax.data import sources
from robovlms_jax.runs import run, steps
from robovlms_jax.runs import setup as setups
from robovlms_jax.training import items
from robovlms_jax.training.config import OptimizerConfig, StageConfig
from tests.conftest import shorten_runs
from tests.experiments.test_calvin_abcd import SMALL, params_of, small

TWO = (
    StageConfig(steps=2, name="head", trainable=("^head/",), optimizer=OptimizerConfig(learning_rate=1e-2)),
    StageConfig(
        steps=3,
        name="more",
        trainable=("^head/", "^backbone/text/final_norm/"),
        optimizer=OptimizerConfig(learning_rate=1e-3, clip_norm=0.0),
    ),
)
"""The second trains a part of the backbone, too: the last, so that hardly anything has a gradient to be compiled."""
QUICK = {"train.profile": 0, "data.num_workers": 0}


@pytest.fixture(scope="module", autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patch:
        shorten_runs(patch)
        yield


def train(output, **changes):
    return run.train("sample", small(output, **QUICK, **changes))


def assert_same(first, second):
    expected = params_of(second)
    for path, x in params_of(first).items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


ONCE = StageConfig(steps=SMALL.train.steps, optimizer=SMALL.optimizer)
"""Ten steps by the preset's optimizer, as others take them: their compiled programs are found."""


def test_one_stage_is_set_up_as_the_plain_run(tmp_path):
    # All that a run's steps are made of: what a stage says, its loss, its state, and which segments come when.
    plain, staged = (setups.prepare(small(tmp_path, **QUICK, **changes)) for changes in ({}, {"train.stages": (ONCE,)}))
    (whole,), (stage,) = plain.stages, staged.stages
    assert dataclasses.replace(stage, name=whole.name) == whole
    made = []
    for setup in (plain, staged):
        (stage,), (abstract,) = setup.stages, setup.abstracts
        loss, batch = steps.make_loss(setup.config, setup.model, stage), setup.batch_shapes(stage)
        program = str(jax.make_jaxpr(loss)(abstract.params, batch, jax.random.key(0)))
        order = sources.fingerprints(setup.sources, setup.rows(stage), stage.seed)
        made.append((program, order, [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(abstract)]))
    assert made[0] == made[1]


@pytest.mark.slow  # every day: the test above
def test_one_stage_is_the_plain_run(tmp_path):
    assert_same(train(tmp_path / "plain"), train(tmp_path / "staged", **{"train.stages": (ONCE,)}))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("stages") / "whole"
    return train(output, **{"train.stages": TWO, "train.checkpoint_every": 1, "train.keep_checkpoints": 9})


def test_a_checkpoint_knows_its_stage_and_step_within_it(uninterrupted):
    found = {step: items.read_position(uninterrupted / "checkpoints" / str(step)) for step in (2, 3)}
    assert found[2]["stage"] == {"index": 0, "name": "head", "step": 2}
    assert found[3]["stage"] == {"index": 1, "name": "more", "step": 1}
    assert (found[2]["begun"], found[3]["begun"]) == (0, 2)
    assert found[2]["order"]["robot"]["seed"] != found[3]["order"]["robot"]["seed"]


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, marks=pytest.mark.slow, id="in the first stage"),
        pytest.param(2, marks=pytest.mark.slow, id="between stages"),
        pytest.param(4, id="in the second stage"),  # the hardest: parameters, moments and order of the second
    ],
)
def test_a_run_stopped_in_any_stage_goes_on_bit_for_bit(uninterrupted, tmp_path, step):
    # Fails if a stage's optimizer, its data or the split of parameters is not the one that the checkpoint was made in.
    output = tmp_path / "resumed"
    shutil.copytree(uninterrupted, output)
    for later in range(step + 1, 6):
        shutil.rmtree(output / "checkpoints" / str(later))
    train(output, **{"train.stages": TWO, "train.checkpoint_every": 9, "train.resume": True})
    assert_same(output, uninterrupted)


def test_a_stage_that_trains_only_what_none_of_its_tasks_needs_is_refused_before_anything_is_compiled(tmp_path):
    idle = StageConfig(steps=1, name="later", trainable=("^auxiliary/",), weights={"forward": 0.0})
    changes = {"policy.auxiliary.forward.loss_weight": 1.0, "train.stages": (*TWO, idle)}
    with pytest.raises(ValueError, match=r"stage 'later': .*no active task depends on.*'\^auxiliary/' \(auxiliary/for"):
        train(tmp_path, **changes)
    learns = dataclasses.replace(idle, weights={})
    setups.prepare(small(tmp_path, **QUICK, **changes | {"train.stages": (*TWO, learns)}))
