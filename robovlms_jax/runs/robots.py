"""Where a policy meets a dataset or a simulator: is it the same robot?"""

from __future__ import annotations

import dataclasses
import logging

from robovlms_jax.control import robot
from robovlms_jax.data import base
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
    require_same(policy.robot, dataset.robot, f"{dataset.name} was recorded by", policy.cameras)
    return policy


def describe(spec: robot.RobotSpec) -> str:
    """Names, kinds and units of the actions in one line: "pan absolute (rad), gripper binary"."""
    return ", ".join(f"{d.name} {d.kind}{f' ({d.unit})' if d.unit else ''}" for d in spec.action)


def require_same(expected: robot.RobotSpec, found: robot.RobotSpec, where: str, cameras: tuple[str, ...]) -> None:
    """Raise ValueError that lists everything that differs between the policy's robot and the one it meets.

    Args:
      where: how the sentence about the other robot begins, such as "PlayTable is driven by".
      cameras: those the policy looks through; others may be missing.
    """
    seen = tuple(camera for camera in expected.cameras if camera.name in cameras)
    if not found.cameras:  # whoever describes none sends what it is asked for
        seen = ()
    listed = robot.differences(dataclasses.replace(expected, cameras=seen), found)
    if listed:
        raise ValueError(
            f"{where} another robot ({found.name}) than the policy is for ({expected.name}):\n  "
            + "\n  ".join(listed)
            + "\nUse what belongs together, or correct the wrong description (policy.robot, meta/robovlms.json)."
        )
