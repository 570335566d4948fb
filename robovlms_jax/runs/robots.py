"""Where a policy meets a dataset or a simulator: is it the same robot?"""

from __future__ import annotations

import dataclasses
import logging

from robovlms_jax.control import robot
from robovlms_jax.data import base, mirror
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.policies.config import PolicyConfig

logger = logging.getLogger(__name__)


def as_recorded(policy: PolicyConfig, dataset: base.Dataset) -> PolicyConfig:
    """The policy for the dataset's robot: the default takes it from there, another must be the same.

    Raises ValueError that lists what differs, or says which bounds are needed.
    """
    if policy.robot == robot.CALVIN:
        if dataset.robot != robot.CALVIN:
            logger.info(
                "robot %s: actions %s, cameras %s", dataset.robot.name, describe(dataset.robot), list(dataset.cameras)
            )
        return dataclasses.replace(policy, robot=dataset.robot)
    require_recorded(policy, dataset)
    return policy


def say_differences(earlier: PolicyConfig, policy: PolicyConfig, origin: str) -> list[str]:
    """Log, and return, what was another robot's in the run that parameters are taken from: pre-training may be.

    Args:
      origin: of the parameters, for the log.
    """
    if earlier.robot == robot.CALVIN:  # a checkpoint older than descriptions says that of every robot
        return []
    listed = robot.differences(earlier.robot, policy.robot)
    if listed:
        logger.warning(
            "%s was trained for robot %s, this run is for %s:\n  %s",
            *(origin, earlier.robot.name, policy.robot.name, "\n  ".join(listed)),
        )
    return listed


def describe(spec: robot.RobotSpec) -> str:
    """Names, kinds and units of the actions in one line: "pan absolute (rad), gripper binary"."""
    return ", ".join(f"{d.name} {d.kind}{f' ({d.unit})' if d.unit else ''}" for d in spec.action)


def require_recorded(policy: PolicyConfig, dataset: base.Dataset) -> None:
    """`require_same` for data to learn from, whose state is used by policy.auxiliary.ahead, too."""
    asks = policy.auxiliary.ahead.loss_weight > 0
    require_same(policy, dataset.robot, f"{dataset.name} was recorded by", with_state=asks)


def require_same(policy: PolicyConfig, found: robot.RobotSpec, where: str, *, with_state: bool = False) -> None:
    """Raise ValueError that lists everything that differs between the policy's robot and the one it meets, of what the
    policy uses: cameras it looks through, actions, and the state where it is told.

    Args:
      where: how the sentence about the other robot begins, such as "PlayTable is driven by".
      with_state: compare the state, whether the policy is told it or not.
    """
    # Whoever describes no camera sends those that are asked for.
    cameras = tuple(camera for camera in policy.robot.cameras if camera.name in policy.cameras) if found.cameras else ()
    expected = dataclasses.replace(policy.robot, cameras=cameras)
    if not (with_state or policy.proprio.enabled) and policy.representation == "robot":
        expected, found = (dataclasses.replace(spec, state=()) for spec in (expected, found))
    listed = robot.differences(expected, found)
    if listed:
        raise ValueError(
            f"{where} another robot ({found.name}) than the policy is for ({expected.name}):\n  "
            + "\n  ".join(listed)
            + "\nUse what belongs together, or correct the wrong description (policy.robot, meta/robovlms.json)."
        )


def mirror_of(policy: PolicyConfig, augment: AugmentConfig, spec: robot.RobotSpec) -> mirror.Mirror:
    """How training samples of a robot are mirrored (data.augment.mirror). Raises ValueError: they have something of
    which no mirror image is known."""
    unknown = {
        "policy.sensors": [sensor.name for sensor in policy.sensors],
        "policy.representation": [policy.representation] if policy.representation != "robot" else [],
        "policy.auxiliary.clip.weights": [policy.auxiliary.clip.weights] if policy.auxiliary.clip.weights else [],
        "policy.auxiliary.scene": [policy.auxiliary.scene.array] if policy.auxiliary.scene.loss_weight else [],
    }
    found = {field: values for field, values in unknown.items() if values}
    if found:
        raise ValueError(
            f"data.augment.mirror={augment.mirror}: of {found} no mirror image is known. Leave it at 0, or those out."
        )
    used = policy.moving if policy.auxiliary.ahead.loss_weight else ()
    used = range(len(spec.state)) if policy.proprio.enabled else used
    return mirror.of_robot(spec, augment.mirror, augment.mirror_axis, state=used)
