"""More demonstrations by the same robot as sources of their own: learned from, or only looked at; EWC's information."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import calvin_abcd, scripted_presets
from robovlms_jax import cli
from robovlms_jax.data import opening
from robovlms_jax.policies import alignment
from robovlms_jax.runs import build, domains, fisher, measured, run, steps
from robovlms_jax.runs import setup as setups
from robovlms_jax.training import consolidation, trainable
from tests.experiments.test_calvin_abcd import params_of, small

QUICK = {"evaluation.batches": 1, "evaluation.episodes": 0, "train.profile": 0, "train.steps": 2}


@pytest.fixture
def listed(tmp_path):
    """A file with the first two of the sample's episodes."""
    episodes = opening.open_split(small(tmp_path).data, "training").episodes[:2]
    path = tmp_path / "two.json"
    path.write_text(json.dumps({e.task: [[int(e.start), int(e.end)]] for e in episodes}))
    return str(path)


def assert_measured(setup, loss, shapes):
    """What a step reports is what was said beforehand."""
    params = build.abstract_params(setup.model, setup.mesh)[0]
    said = {name for name in measured.names(setup.config) if name.startswith("train/")}
    always = {*measured.EVERY_STEP, *measured.SPEED}
    assert {f"train/{name}" for name in (*jax.eval_shape(loss, params, shapes)[1], *always)} == said


def test_a_memory_is_drawn_from_beside_the_demonstrations_and_learned_as_they_are(tmp_path, listed):
    changes = {"data.further.lists": {"memory": listed}, "train.sources": {"robot": 1.0, "memory": 1.0}}
    changes["train.source_weights"] = {"memory": 0.5}
    setup = setups.prepare(small(tmp_path / "run", **QUICK, **changes))
    assert setup.rows(setup.stages[0]) == {"robot": 1, "memory": 1}
    assert len(setup.sources["memory"].dataset.episodes) == 2
    loss = steps.make_loss(setup.config, setup.model, setup.stages[0])
    assert list(loss.losses) == ["robot", "memory"] and not loss.between
    assert loss.losses["memory"].model is loss.losses["robot"].model
    assert loss.weights == {"memory": 0.5}
    wrong = cli.override(setup.config, **{"train.source_weights": {"memories": 0.5}})
    expected = r"names \['memories'\]; sources with a loss that this run draws from are robot, memory \("
    with pytest.raises(ValueError, match=expected):
        wrong.validate(1)
    with pytest.raises(ValueError, match=expected.replace("memories", "memory").replace("robot, memory", "robot")):
        cli.override(setup.config, **{"train.sources": {}}).validate(1)  # there, and never drawn
    with pytest.raises(ValueError, match=r"source_weights is 0 for \['memory'\]; leave these out of train\.sources"):
        cli.override(setup.config, **{"train.source_weights": {"memory": 0.0}})


def test_pictures_without_labels_teach_the_vision_tower_alone_and_their_actions_do_not_matter(tmp_path, listed):
    further = {"lists": {"target": listed}, "align": {"target": 2.0}, "unlabelled": ("target",)}
    changes = {f"data.further.{name}": value for name, value in further.items()}
    changes["train.sources"] = {"robot": 1.0, "target": 1.0}
    changes |= {"policy.auxiliary.scene.loss_weight": 0.1, "policy.auxiliary.ahead.loss_weight": 0.1}
    setup = setups.prepare(small(tmp_path / "run", **QUICK, **changes))
    loss = steps.make_loss(setup.config, setup.model, setup.stages[0])
    assert list(loss.losses) == ["robot"]
    shapes = dict(setup.batch_shapes(setup.stages[0]))
    assert_measured(setup, loss, shapes)
    assert shapes["robot"].scene is not None and shapes["target"].scene is shapes["target"].ahead is None
    shapes["target"] = shapes["target"].replace(actions=None, action_mask=None)  # whoever reads them fails
    params = flatten_dict(build.abstract_params(setup.model, setup.mesh)[0], sep="/")
    aligned = loss.between["align_target"]
    trainable.require_reached(aligned, params, shapes, ("^backbone/vision/", "^backbone/connector/"))
    others = ("^backbone/text/", "^head/", "^readout/")
    with pytest.raises(ValueError, match=r"depends on.*text/.*head/.*readout/"):
        trainable.require_reached(aligned, params, shapes, others)


def test_moments_apart_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(50, 3)), rng.normal(1.0, 2.0, size=(40, 3))
    means, covariances = alignment.moments_apart(jnp.asarray(first), jnp.asarray(second))
    assert means == pytest.approx(np.square(first.mean(0) - second.mean(0)).mean(), rel=1e-4)
    expected = np.square(np.cov(first.T) - np.cov(second.T)).sum() / (4 * 3**2)
    assert covariances == pytest.approx(expected, rel=1e-4)
    assert sum(alignment.moments_apart(jnp.asarray(first), jnp.asarray(first))) == 0


def test_shares_apart_do_not_depend_on_how_large_features_are():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(50, 3)), rng.normal(1.0, 2.0, size=(40, 3))
    means, covariances = alignment.shares_apart(jnp.asarray(first), jnp.asarray(second))
    own, other = np.cov(first.T), np.cov(second.T)
    assert means == pytest.approx(np.square(first.mean(0) - second.mean(0)).sum() / np.trace(own), rel=1e-4)
    assert covariances == pytest.approx(np.square(own - other).sum() / np.square(own).sum(), rel=1e-4)
    again = alignment.shares_apart(jnp.asarray(7 * first), jnp.asarray(7 * second))
    np.testing.assert_allclose(again, (means, covariances), rtol=1e-4)


def test_pictures_of_a_darker_domain_are_further_apart_than_frames_of_one(monkeypatch):
    sample = calvin_abcd.PRESETS["sample"].data

    class Dark(type(opening.open_split(sample, "training"))):
        def images(self, frame_ids, cameras, out=None):
            return {camera: x // 3 for camera, x in super().images(frame_ids, cameras, out).items()}

    def opened(data, split):
        found = open_split(data, split)
        if data.root == "dark":
            found.__class__ = Dark
        return found

    open_split = lambda data, split: real(dataclasses.replace(data, root=sample.root), split)  # noqa: E731
    real = opening.open_split
    monkeypatch.setattr(domains.opening, "open_split", opened)
    found = domains.pictures_apart(scripted_presets.TWIN, sample, dataclasses.replace(sample, root="dark"), frames=40)
    assert found["means"] > 5 * found["means_within"] and found["covariances"] > found["covariances_within"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.further.lists": {"robot": "x"}}, "`robot` is the name of data.root's own"),
        ({"data.further.align": {"target": 1.0}}, r"align names \['target'\]"),
        (
            {"data.further.roots": {"target": "x"}, "data.further.unlabelled": ("target",)},
            "from which nothing is learned without a weight",
        ),
        ({"data.further.roots": {"target": "/nowhere"}}, "data.further, source 'target': "),
        ({"train.sources": {"robot": 1.0, "target": 1.0}}, r"names \['target'\]; this run has data of \['robot'\]"),
        ({"optimizer.ewc": 1.0}, "set train.init_from to that run"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_compiled(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        setups.prepare(small(tmp_path / "run", **QUICK, **changes))


def test_alignment_without_the_robots_own_pictures_is_refused(tmp_path, listed):
    changes = {"data.further.lists": {"target": listed}, "data.further.align": {"target": 1.0}}
    with pytest.raises(ValueError, match=r"compares .*'target'.* which have no share"):
        setups.prepare(small(tmp_path / "run", **QUICK, **changes, **{"train.sources": {"target": 1.0}}))


@pytest.mark.slow
def test_a_run_held_by_the_information_of_the_one_before_moves_less_and_goes_on_bit_for_bit(tmp_path):
    first = run.train("sample", small(tmp_path / "first", **QUICK))
    with pytest.raises(FileNotFoundError, match=r"experiments\.continual measures it"):
        setups.prepare(small(tmp_path / "no", **QUICK, **{"optimizer.ewc": 1.0, "train.init_from": str(first)}))
    fisher.measure(first, 4)
    measured = consolidation.read(first)
    assert all(np.isfinite(x).all() and (x >= 0).all() for x in measured.values()) and any(
        x.any() for x in measured.values()
    )
    start = params_of(first)

    def moved(name, ewc, **changes):
        plain = {"train.init_from": str(first), "optimizer.clip_norm": 0.0, "optimizer.learning_rate": 1e-3}
        settings = QUICK | plain | {"train.steps": 6, "optimizer.ewc": ewc} | changes
        done = run.train("sample", small(tmp_path / name, **settings))
        after = params_of(done)
        return after, sum(float(np.square(after[path] - start[path]).sum()) for path in start)

    free, (after, held) = moved("free", 0.0)[1], moved("held", 1e12)
    assert held < 0.8 * free
    floored, _ = moved("floored", 1e12, **{"optimizer.ewc_floor": 0.1})
    unknown = {key: measured["/".join(re.findall(r"'(\w+)'", key))] == 0 for key in start}
    loose, tight = (
        sum(float(np.square((x[path] - start[path])[mask]).sum()) for path, mask in unknown.items())
        for x in (after, floored)
    )
    assert 0 < tight < 0.8 * loose
    whole, _ = moved("whole", 1e12, **{"train.checkpoint_every": 3})
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "6")
    again, _ = moved("whole", 1e12, **{"train.checkpoint_every": 3, "train.resume": True})
    for path, x in whole.items():
        np.testing.assert_array_equal(x, again[path], err_msg=path)


def test_information_of_a_stage_without_the_robot_is_refused_by_name(tmp_path, monkeypatch):
    config = small(tmp_path / "run", **QUICK)
    monkeypatch.setattr(fisher.resuming, "open_point", lambda run: types.SimpleNamespace(config=config))
    setup = types.SimpleNamespace(config=config, model=None, stages=[None])
    monkeypatch.setattr(fisher.setups, "prepare", lambda config, point: setup)
    monkeypatch.setattr(fisher.steps, "make_loss", lambda *_: types.SimpleNamespace(losses={"questions": None}))
    with pytest.raises(ValueError, match=r"last stage of .*run trained on questions alone; .*train\.sources"):
        fisher.measure(tmp_path / "run", 4)
