"""Several robots with other actions, cameras and units on one backbone: own heads or a shared one, own statistics."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments import cotrain
from robovlms_jax.control.interface import Observation
from robovlms_jax.control.robot import CALVIN, Camera, Dimension, RobotSpec
from robovlms_jax.data.lerobot import synthetic
from robovlms_jax.load import load_policy
from robovlms_jax.policies import embodiments
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.discrete import DiscreteHeadConfig
from robovlms_jax.runs import run, steps
from robovlms_jax.runs import setup as setups
from robovlms_jax.schema import from_dict, to_dict
from robovlms_jax.training.config import StageConfig
from tests.experiments.test_calvin_abcd import params_of, small
from tests.runs.test_further import assert_measured

LIFTER = RobotSpec(
    "lifter",
    10.0,
    (Camera("front", 32, 48),),
    (
        Dimension("x", "m/s", "velocity", "base", "base", -0.5, 0.5),
        Dimension("claw", "1", "binary", "gripper", "", 0.0, 1.0, "low"),
        Dimension("lift", "m", "absolute", "other", "", 0.0, 0.4),
    ),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return synthetic.write(tmp_path_factory.mktemp("lerobot") / "lifter", LIFTER, episodes=4, length=8)


@pytest.fixture
def among(root, tmp_path):
    """Settings -> a small run's configuration, with the lifter beside CALVIN's robot."""

    def make(**changes):
        settings = {
            "data.others.roots": {"lifter": str(root)},
            "data.others.datasets": {"lifter": "lerobot"},
            "train.sources": {"robot": 1.0, "lifter": 1.0},
            "data.static_shift": 0,
            "data.wrist_shift": 0,
            "evaluation.batches": 1,
            "evaluation.episodes": 0,
            "train.profile": 0,
        }
        return small(tmp_path / "run", **(settings | changes))

    return make


def gradients(setup, prefix: str = "") -> dict[str, dict[str, np.ndarray]]:
    """Source -> gradient of its loss by every parameter whose path begins so."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), setup.abstracts[0].params)
    loss = steps.make_loss(setup.config, setup.model, setup.stages[0])
    batches = {name: setup.sources[name].evaluation_batch(np.arange(1)) for name in loss.losses}
    flat = flatten_dict(params, sep="/")
    chosen = {path: x for path, x in flat.items() if path.startswith(prefix)}

    def loss_of(name, chosen):
        return loss.losses[name](unflatten_dict(flat | chosen, sep="/"), batches[name])[0]

    grads = jax.jit(lambda x: {name: jax.grad(functools.partial(loss_of, name))(x) for name in batches})(chosen)
    return jax.device_get(grads)


def moved(grads: dict[str, np.ndarray], prefix: str) -> bool:
    return any(x.any() for path, x in grads.items() if path.startswith(prefix))


def test_every_robot_has_a_head_and_statistics_of_its_own(among):
    setup = setups.prepare(among())
    (other,) = setup.config.policy.others
    assert other.robot == setup.others["lifter"].dataset.robot and other.cameras == ("front",)
    dataset = setup.others["lifter"].dataset
    for bounds, quantile in ((other.action_low, "q01"), (other.action_high, "q99")):
        np.testing.assert_allclose(bounds, dataset.statistics.action[quantile][[0, 2]], rtol=1e-6)
    shapes = setup.abstracts[0].trainable
    assert shapes["robot_lifter/head/arm/layer_1/kernel"].shape[-1] == 2 * setup.config.policy.chunk
    assert shapes["head/arm/layer_1/kernel"].shape[-1] == 6 * setup.config.policy.chunk


def test_a_stages_weights_are_those_of_every_robots_tasks(among):
    setup = setups.prepare(among())
    assert_measured(setup, steps.make_loss(setup.config, setup.model), setup.batch_shapes(setup.stages[0]))
    half = dataclasses.replace(setup.stages[0], weights={"actions": 0.5})
    losses = steps.make_loss(setup.config, setup.model, half).losses
    assert [losses["robot"].tasks[0].weight, losses["lifter"].loss.tasks[0].weight] == [0.5, 0.5]
    none = dataclasses.replace(half, weights={"actions": 0.0}, sources={"lifter": 1.0})
    with pytest.raises(ValueError, match=r"stage 'train', source 'lifter': all tasks have weight 0"):
        steps.make_loss(setup.config, setup.model, none)


@pytest.mark.slow
def test_every_robot_teaches_its_own_head_and_the_common_backbone(among):
    grads = gradients(setups.prepare(among()))
    for name, own, foreign in (("robot", "head/", "robot_lifter/"), ("lifter", "robot_lifter/head/", "head/")):
        assert moved(grads[name], own) and not moved(grads[name], foreign), name
        assert moved(grads[name], "backbone/vision/") and moved(grads[name], "readout/"), name


def test_a_shared_head_learns_from_each_robot_what_it_has(among):
    setup = setups.prepare(among(**{"policy.other_heads": "shared"}))
    shared, chunk = setup.config.policy.shared, setup.config.policy.chunk
    assert shared.names == (*CALVIN.action_names, "claw", "lift") and shared.binary == (6, 7)
    assert not any(path.startswith("robot_") for path in setup.abstracts[0].trainable)
    grads = gradients(setup, "head/")

    def columns(name: str, part: str) -> list[bool]:
        bias = grads[name][f"head/{part}/layer_1/bias"].reshape(chunk, -1)
        return bias.any(axis=0).tolist()

    assert columns("lifter", "arm") == [True, False, False, False, False, False, True]  # x and lift
    assert columns("lifter", "gripper") == [False, True] and columns("robot", "gripper") == [True, False]
    assert columns("robot", "arm")[0] and not columns("robot", "arm")[6]


def test_a_share_of_nothing_for_another_robot_is_the_plain_program(among, tmp_path):
    programs = []
    length = {"data.text_length": 32}
    for config in (
        small(tmp_path / "plain", **length, **{"data.static_shift": 0, "data.wrist_shift": 0}),
        among(**length, **{"train.sources": {"robot": 1.0, "lifter": 0.0}}),
    ):
        setup = setups.prepare(config)
        params = {k: x for k, x in setup.abstracts[0].params.items() if k != "robot_lifter"}
        loss = steps.make_loss(setup.config, setup.model, setup.stages[0])
        batch = setup.train.evaluation_batch(np.array([0, 1]))
        programs.append(str(jax.make_jaxpr(loss)(params, {"robot": batch}, jax.random.key(0))))
    assert programs[0] == programs[1]


def test_configurations_with_other_robots_survive_their_json(among):
    policy = setups.prepare(among(**{"policy.other_heads": "shared"})).config.policy
    assert from_dict(PolicyConfig, json.loads(json.dumps(to_dict(policy)))) == policy


def test_what_robots_cannot_share_is_named(among):
    number = RobotSpec("arm", 5.0, (), (Dimension("gripper", "m", "continuous", "gripper"),))
    with pytest.raises(ValueError, match="'gripper' of robot 'arm' is a number"):
        embodiments.shared_by([CALVIN, number])
    with pytest.raises(ValueError, match="needs a head that regresses actions; 'discrete'"):
        PolicyConfig(readout="token", head=DiscreteHeadConfig(), other_heads="shared", history="interleaved")
    with pytest.raises(ValueError, match=r"source 'lifter': .*nowhere"):
        setups.prepare(among(**{"data.others.roots": {"lifter": "nowhere"}}))
    with pytest.raises(ValueError, match=r"not trained on robot 'x'; beside its own it knows \['lifter'\]"):
        embodiments.view(setups.prepare(among()).config.policy, "x")


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["own", "shared"])
def test_three_stages_in_one_run_go_on_bit_for_bit_and_serve_either_robot(among, tmp_path, heads):
    questions = {"questions": str(cotrain.QUESTIONS / "train.jsonl")}
    stages = (
        StageConfig(steps=1, name="vl", trainable=("^backbone/",), sources={"questions": 1.0}),
        StageConfig(steps=1, name="robot"),
        StageConfig(steps=2, name="cross-embodiment", sources={"robot": 1.0, "lifter": 1.0, "questions": 0.5}),
    )
    settings = {"train.stages": stages, "policy.auxiliary.vl_weight": 0.1, "data.vl.paths": questions}
    settings |= {"policy.other_heads": heads, "train.batch_size": 8, "data.vl.turns": "each"}
    often = {"train.checkpoint_every": 1, "train.keep_checkpoints": 9}
    whole = run.train("sample", among(**settings, **often, **{"train.output": str(tmp_path / "whole")}))
    for step in (1, 2, 3):
        assert params_of(whole / "checkpoints" / str(step))  # each stage's checkpoint alone
        output = tmp_path / f"resumed_{step}"
        shutil.copytree(whole, output)
        for later in range(step + 1, 5):
            shutil.rmtree(output / "checkpoints" / str(later))
        changes = {"train.checkpoint_every": 9, "train.resume": True, "train.output": str(output)}
        run.train("sample", among(**settings, **changes))
        expected = params_of(whole)
        for path, x in params_of(output).items():
            np.testing.assert_array_equal(x, expected[path], err_msg=f"{step}: {path}")
    policy = load_policy(whole, robot="lifter")
    policy.reset("go")
    chunk = policy.act(Observation({"front": np.zeros((32, 48, 3), np.uint8)})).actions
    assert chunk.shape[-1] == 3 and set(np.unique(chunk[:, 1])) <= {-1.0, 1.0}


@pytest.mark.parametrize("name", cotrain.PRESETS)
def test_every_preset_names_sources_that_it_has(name):
    config = cotrain.PRESETS[name]
    known = {"robot", *config.data.vl.paths, *config.data.others.roots}
    shares = [config.train.sources, *(stage.sources for stage in config.train.stages)]
    assert all(set(each) <= known for each in shares)
