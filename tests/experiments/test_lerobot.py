"""Presets for robots that are no CALVIN: each opens its data, trains two steps and acts in its own dimensions."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from experiments import lerobot
from robovlms_jax import cli, schema
from robovlms_jax.backbones import registry
from robovlms_jax.control.interface import Observation
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.data import lerobot as format
from robovlms_jax.data import opening
from robovlms_jax.data.lerobot import synthetic
from robovlms_jax.policies import objective
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.mlp import MLPHeadConfig
from robovlms_jax.policies.serving import VLAPolicy
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import robots, run
from robovlms_jax.runs import setup as setups
from tests import toy

pytest.importorskip("pyarrow")

HEAD = MLPHeadConfig(hidden_size=8, trunk=(8,))


def configured(root, preset, **policy):
    config = lerobot.PRESETS[preset]
    small = {"history": "one_step", "window": 1, "chunk": 2, "head": HEAD, **policy}
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, **small))
    return cli.override(config, **{"data.root": str(root), "data.windows_per_segment": 1, "train.batch_size": 2})


@pytest.mark.parametrize("preset", lerobot.PRESETS)
def test_every_preset_trains_and_acts_in_its_robots_own_dimensions(tmp_path, preset):
    spec = lerobot.ROBOTS[preset]
    setup = setups.prepare(configured(synthetic.write(tmp_path / "d", spec, episodes=4, length=6), preset))
    policy = setup.config.policy
    assert policy.robot.action == spec.action and policy.cameras == spec.camera_names
    assert len(policy.action_low) == len(spec.action)  # all of them are numbers, and scaled by the data's quantiles
    assert schema.from_dict(PolicyConfig, json.loads(json.dumps(schema.to_dict(policy)))) == policy

    model = VLA(policy, registry.get("kosmos-2").tiny())
    batch = jax.tree.map(lambda x: x[None], setup.train[0])
    batch = batch.replace(inputs=batch.inputs.replace(text_ids=batch.inputs.text_ids % 90))
    params = toy.random_params(model, batch)
    step = jax.jit(jax.value_and_grad(lambda params: objective.RobotLoss(model)(params, batch)[0]))
    losses = []
    for _ in range(2):
        loss, gradients = step(params)
        losses.append(float(loss))
        params = optax.apply_updates(params, jax.tree.map(lambda x: -0.01 * x, gradients))
    assert losses[1] < losses[0]

    served = VLAPolicy(model, params, lambda _: (batch.inputs.text_ids[0], batch.inputs.text_mask[0]))
    served.reset("go to the red disc")
    images = {camera: x[0, 0] for camera, x in batch.inputs.images.items()}
    state = np.zeros(len(spec.state)) if spec.state else None
    actions = served.act(Observation(images, state)).actions
    assert actions.shape == (2, len(spec.action)) and np.isfinite(actions).all()
    assert (actions >= policy.action_low).all() and (actions <= policy.action_high).all()


def test_a_policy_of_another_robot_is_refused_with_everything_that_differs(tmp_path):
    other = dataclasses.replace(lerobot.ROBOTS["aloha"], cameras=lerobot.ROBOTS["so100"].cameras)
    root = synthetic.write(tmp_path / "d", lerobot.ROBOTS["so100"], episodes=4, length=6)
    with pytest.raises(ValueError, match=r"another robot \(so100\) than .*\(aloha\):\n  the rate .*\n  action has 6"):
        setups.prepare(configured(root, "so100", robot=other))
    joints = tuple(dataclasses.replace(d, unit="rad") for d in lerobot.SO100[:5])
    wrong = dataclasses.replace(other, action=(*joints, lerobot.SO100[5]), rate_hz=10.0)
    root = tmp_path / "d"
    config = cli.override(lerobot.PRESETS["so100"], **{"data.root": str(root), "policy.robot": wrong})
    with pytest.raises(
        ValueError, match=r"30 Hz, expected 10 Hz(\n  action\[\d\] '.*': unit is '%', expected 'rad'){5}"
    ):
        setups.prepare(config)


def test_made_up_episodes_are_read_as_they_were_described(tmp_path):
    spec = dataclasses.replace(CALVIN, cameras=lerobot.ROBOTS["so100"].cameras)
    root = synthetic.write(tmp_path / "d", spec, episodes=4, length=6)
    dataset = opening.open_split(dataclasses.replace(lerobot.PRESETS["so100"].data, root=str(root)), "training")
    assert isinstance(dataset, format.LeRobotDataset) and dataset.robot == dataclasses.replace(spec, rate_hz=30)
    actions = dataset.actions(np.arange(6))
    assert set(actions[:, 6]) == {-1.0, 1.0} and np.abs(actions[:, :6]).max() <= 1


def test_what_differs_from_the_robot_of_pre_training_is_said(caplog):
    earlier, now = (
        PolicyConfig(robot=lerobot.ROBOTS[name], cameras=("top",), action_scaling="quantile")
        for name in ("so100", "so100")
    )
    now = dataclasses.replace(now, robot=dataclasses.replace(now.robot, name="so101", rate_hz=15.0))
    assert robots.say_differences(earlier, now, "runs/before") == ["the rate is 15 Hz, expected 30 Hz"]
    assert "runs/before was trained for robot so100, this run is for so101" in caplog.text
    assert robots.say_differences(PolicyConfig(), now, "runs/before") == []


def test_where_made_up_episodes_go_is_said_before_they_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lerobot, "MADE_UP", tmp_path)
    monkeypatch.setattr(synthetic, "write", lambda root, robot: None)
    monkeypatch.setattr(run, "run", lambda *_, **__: False)
    lerobot.main(["--preset", "so100"])
    assert f"made-up episodes of so100 go to {tmp_path / 'so100'}" in capsys.readouterr().err

    for error, said in (
        (PermissionError(13, "Permission denied", str(tmp_path)), rf"error: .*Permission denied: '{tmp_path}'"),
        (ImportError("LeRobot datasets need av: pip install"), "^error: LeRobot datasets need av: pip install"),
    ):

        def write(root, robot, error=error):
            raise error

        monkeypatch.setattr(synthetic, "write", write)
        with pytest.raises(SystemExit, match=said):
            lerobot.main(["--preset", "so100"])
