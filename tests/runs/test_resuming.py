"""What a run goes on with, and which settings it may change."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from robovlms_jax import cli
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.policies.heads.gpt import GPTHeadConfig
from robovlms_jax.policies.sensors.vector import VectorConfig
from robovlms_jax.runs import resume_rules, resuming
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import from_dict, to_dict
from robovlms_jax.training import checkpoints, optimizer
from robovlms_jax.training import state as states
from robovlms_jax.training.config import OptimizerConfig

SAVED = cli.override(ExperimentConfig(), **{"data.text_length": 24, "train.steps": 100})


def point(saved: ExperimentConfig = SAVED, step: int = 50) -> resuming.Point:
    return resuming.Point(pathlib.Path(f"/runs/arm/checkpoints/{step}"), saved, {}, {})


def test_every_field_is_in_exactly_one_row_and_no_row_is_idle():
    # A new field of any configuration has to be put into `RULES`, with a reason.
    fields = list(resume_rules.fields_of())
    assert {"policy.head.kind", "policy.head.num_bins", "policy.auxiliary.clip.weights", "mesh.fsdp"} <= set(fields)
    for path in fields:
        assert resume_rules.rule_of(path).reason
    idle = [p for rule in resume_rules.RULES for p in rule.fields if not any(fnmatch.fnmatchcase(f, p) for f in fields)]
    assert not idle
    with pytest.raises(LookupError, match=r"train.pause is in 0 rows"):
        resume_rules.rule_of("train.pause")


def test_a_robot_whose_dimensions_only_mean_something_else_is_another():
    (first, *others), robot = SAVED.policy.robot.action, SAVED.policy.robot
    other = dataclasses.replace(robot, action=(dataclasses.replace(first, frame="base"), *others))
    (found,) = resuming.differing_fields(*({"policy": {"robot": to_dict(x)}} for x in (robot, other)))
    assert found.path == "policy.robot.action" and resume_rules.rule_of(found.path).kind == "refused"


def test_a_sensor_may_change_its_dropout_and_nothing_else():
    sensor = VectorConfig("torque", size=3)
    saved = cli.override(SAVED, **{"policy.sensors": (sensor,)})

    def settle(*sensors):
        return resuming.settle(point(saved), cli.override(saved, **{"policy.sensors": sensors}))

    assert settle(dataclasses.replace(sensor, dropout=0.5)).policy.sensors[0].dropout == 0.5
    for change, what in (
        ({"size": 4}, r"policy\.sensors\.torque\.size: 3 in the checkpoint, 4 now"),
        ({"field": "effort"}, r"policy\.sensors\.torque\.field: '' in the checkpoint, 'effort' now"),
        ({"name": "force"}, r"policy\.sensors: .* in the checkpoint"),
    ):
        with pytest.raises(ValueError, match=what):
            settle(dataclasses.replace(sensor, **change))
    with pytest.raises(ValueError, match=r"policy\.sensors: .* in the checkpoint, \[\] now"):
        settle()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.log_every": 1, "train.steps": 50, "evaluation.batches": 3, "rollouts.trials": 4, "mesh.fsdp": 2},
        {"data.num_workers": 4, "data.root": "/elsewhere", "train.init_from": "/gone", "backbone.remat": "full"},
        {"optimizer.learning_rate": 1.0, "train.on_nonfinite": "skip"},
        {"train.epochs": 3.0, "optimizer.warmup_epochs": 1.0},
    ],
)
def test_what_may_change_changes(changes):
    settled = resuming.settle(point(), cli.override(ExperimentConfig(), **{"train.steps": 100, **changes}))
    assert settled.data.text_length == 24
    for path, value in changes.items():
        if path != "optimizer.warmup_epochs":  # warm-up is over, or as long as it was
            part, name = path.split(".")
            assert getattr(getattr(settled, part), name) == value


def test_what_changes_how_training_goes_on_is_said(caplog):
    resuming.settle(point(), cli.override(SAVED, **{"optimizer.learning_rate": 1.0, "train.log_every": 1}))
    assert "resuming with optimizer.learning_rate: 2e-05 in the checkpoint, 1.0 now" in caplog.text
    assert "log_every" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy.action_low": (-1.0,) * 6},
            r"policy.action_low: \[-0.65.*\] in the checkpoint, \[-1.0.*\] now \(what",
        ),
        (
            {"policy.window": 4},
            r"policy.window: 8 in the checkpoint, 4 now .*init_from /runs/arm and another --out",
        ),
        ({"policy.head": GPTHeadConfig()}, r"policy.head.kind: 'lstm' in the checkpoint, 'gpt' now"),
        ({"backbone.name": "moondream"}, "backbone.name: 'kosmos-2' in the checkpoint"),
        ({"train.trainable": ("head/",)}, r"train.trainable: \['\.\*'\] in the checkpoint, \['head/'\] now"),
        ({"data.dataset": "bridge"}, "data.dataset: 'calvin' in the checkpoint, 'bridge' now .*new stage"),
        ({"data.text_length": 32}, "data.text_length: 24 in the checkpoint, 32 now"),
        ({"train.seed": 1}, r"train.seed: 0 in the checkpoint, 1 now .*--train.allow_new_order"),
        ({"train.steps": 49}, r"train.steps=49 is less than the 50 steps .* Pass --train.steps 50 or more"),
    ],
)
def test_what_would_change_the_meaning_of_parameters_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        resuming.settle(point(), cli.override(SAVED, **changes))


def test_all_that_differs_is_named_at_once_and_order_alone_may_be_given_up(caplog):
    changes = {"train.seed": 1, "data.exclude_tasks": ("open_drawer",), "train.batch_size": 64}
    with pytest.raises(ValueError, match=r"(?s)data.exclude_tasks.*train.batch_size.*train.seed"):
        resuming.settle(point(), cli.override(SAVED, **changes))
    allowed = cli.override(SAVED, **changes, **{"train.allow_new_order": True})
    assert resuming.settle(point(), allowed).train.seed == 1
    assert "resuming with train.seed: 0 in the checkpoint, 1 now" in caplog.text
    with pytest.raises(ValueError, match=r"policy.chunk") as caught:
        resuming.settle(point(), cli.override(SAVED, **changes, **{"policy.chunk": 2}))
    assert "allow_new_order" not in str(caught.value)


def test_weights_are_not_read_again_and_another_path_is_said(caplog):
    settled = resuming.settle(point(), cli.override(SAVED, **{"backbone.weights": "/other"}))
    assert settled.backbone.weights == ""
    assert "backbone.weights: '' in the checkpoint, '/other' now; the checkpoint's is kept" in caplog.text


def test_bounds_and_bins_that_came_from_the_data_stay_and_what_today_would_give_is_said(caplog):
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 7)).astype(np.float32)
    head = DiscreteHeadConfig(binning="quantile", num_bins=16)
    plain = PolicyConfig(history="interleaved", readout="token", head=head, action_scaling="quantile")
    asked = dataclasses.replace(SAVED, policy=plain)

    def statistics(x):
        return {"q01": np.quantile(x, 0.01, axis=0), "q99": np.quantile(x, 0.99, axis=0)}

    policy = plain.with_statistics(statistics(actions)).with_bins(actions)
    policy = dataclasses.replace(policy, head=dataclasses.replace(policy.head, vocab_end=300))
    settled = resuming.settle(point(dataclasses.replace(SAVED, policy=policy)), asked)
    assert settled.policy == policy
    assert resuming.compare_statistics(settled.policy, statistics(actions), actions) == []
    low, high, edges = resuming.compare_statistics(settled.policy, statistics(2 * actions), actions**3)
    assert low.startswith("policy.action_low stays (-0.4") and "would be (-0.9" in low
    assert high.startswith("policy.action_high") and edges.startswith("policy.head.quantile_edges stay")
    assert "by today's training actions: policy.action_low stays" in caplog.text


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0), (1.0, 0.5)])
def test_clipping_may_be_switched_on_or_off_and_moments_go_on(tmp_path, before, after):
    # What is advised after a divergence. Fails if the optimizer's state has another structure than was saved.
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    whole = meshes.replicated(mesh)

    def config(clip: float) -> ExperimentConfig:
        return cli.override(SAVED, **{"optimizer.clip_norm": clip, "train.steps": 9})

    def begin(clip: float):
        tx = optimizer.make_optimizer(OptimizerConfig(clip_norm=clip), 9)
        params = {"head": {"kernel": jax.device_put(np.zeros((2, 3), np.float32), whole)}}
        return tx, states.create(params, (".*",), tx, 0, mesh)

    tx, state = begin(before)
    gradient = {"head/kernel": np.ones((2, 3), np.float32)}
    moved = state.replace(step=jax.numpy.int32(1), opt_state=tx.update(gradient, state.opt_state, state.trainable)[1])
    saver = checkpoints.Checkpointer(tmp_path, keep=2, serving={"config": to_dict(config(before)), "assets": {}})
    saver.save(moved, {"next_step": 1, "order": {"seed": 0}})
    saver.wait()
    found = resuming.open_point(tmp_path)
    assert (found.step, found.order, found.config.optimizer.clip_norm) == (1, {"seed": 0}, before)
    tx, fresh = begin(after)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
    restored = resuming.restore(saver, found, shapes, config(after).optimizer)
    saver.close()
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    assert not bool(restored.halted)
    moments = (optax.tree.get(x, "mu")["head/kernel"] for x in (restored.opt_state, moved.opt_state))
    np.testing.assert_array_equal(*moments)
    tx.update(gradient, restored.opt_state, restored.trainable)


def test_a_configuration_of_an_earlier_version_lacks_new_fields_and_is_compared_by_their_defaults():
    values = json.loads(json.dumps(to_dict(SAVED)))
    del values["train"]["allow_new_order"], values["policy"]["action_mu"]
    saved = from_dict(ExperimentConfig, values)
    assert resuming.settle(point(saved), SAVED) == SAVED
