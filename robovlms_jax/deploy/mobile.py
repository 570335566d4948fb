"""From an arm's seven numbers to a base's three: linear_x (forward), linear_y (left), angular_z (counter-clockwise).

An action is x, y, z, roll, pitch, yaw, gripper. Two mappings, chosen by name:

- `norm`, as the mobile robot's design documents have it: linear_x = |(x, y)|, linear_y = y, angular_z = yaw. Its
  linear_x is never negative, so the robot cannot drive backwards; y counts twice, so a command to the side also drives
  forward; and it is not linear, so what it maps cannot be recovered.
- `planar`, the one to use: linear_x = x, linear_y = y, angular_z = yaw. Linear, and `arm_from_base` undoes it.

A policy with three action dimensions needs neither. `OnBase` is a policy of an arm as one of a base, and
`loop.run(..., base=BaseMapping())` drives by it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from robovlms_jax.control.interface import ActionChunk, Observation, Policy
from robovlms_jax.control.robot import RobotSpec
from robovlms_jax.deploy.limits import BASE, MOBILE, is_number

ARM_DIM, BASE_DIM = 7, 3


@dataclasses.dataclass(frozen=True)
class BaseMapping:
    """How actions of an arm drive a base.

    variant: see the module. linear_m_s, angular_rad_s: what 1.0 of the action is.
    speed_m_s, turn_rad_s: the most that comes out; the velocity in the plane is shortened, its direction kept.
    drive: "holonomic" drives to the side; "differential" cannot: there `lateral` says what linear_y becomes.
    lateral: "turn" adds a turn of `turn_per_lateral` rad/s for each m/s to the left, "refuse" raises ValueError.
    """

    variant: Literal["planar", "norm"] = "planar"
    linear_m_s: float = 0.5
    angular_rad_s: float = 1.5
    speed_m_s: float = 0.5
    turn_rad_s: float = 1.5
    drive: Literal["holonomic", "differential"] = "holonomic"
    lateral: Literal["turn", "refuse"] = "refuse"
    turn_per_lateral: float = 2.0

    def __post_init__(self):
        for field, values in (
            ("variant", ("planar", "norm")),
            ("drive", ("holonomic", "differential")),
            ("lateral", ("turn", "refuse")),
        ):
            if getattr(self, field) not in values:
                raise ValueError(f"base mapping: {field}={getattr(self, field)!r}; expected one of {values}.")
        for field in ("linear_m_s", "angular_rad_s", "speed_m_s", "turn_rad_s"):
            value = getattr(self, field)
            if not (is_number(value) and np.isfinite(value) and value > 0):
                raise ValueError(f"base mapping: {field}={value!r} must be a finite number above 0.")
        if not (is_number(self.turn_per_lateral) and np.isfinite(self.turn_per_lateral)):
            raise ValueError(f"base mapping: turn_per_lateral={self.turn_per_lateral!r} must be a finite number.")


def base_from_arm(actions: np.ndarray, mapping: BaseMapping) -> np.ndarray:
    """Arm actions as a base's velocities.

    Args:
      actions: float[..., 7]; an action that is not finite gives three NaN, which the safety layer stops at.
    Returns:
      float64[..., 3] in m/s, m/s and rad/s, within the mapping's limits.
    Raises:
      ValueError: other than 7 columns; a command to the side for a base that cannot and whose mapping refuses it.
    """
    actions = np.asarray(actions, np.float64)
    if actions.ndim < 1 or actions.shape[-1] != ARM_DIM:
        raise ValueError(f"arm actions have shape {list(actions.shape)}; expected [..., {ARM_DIM}].")
    finite = np.isfinite(actions).all(axis=-1, keepdims=True)
    bounded = np.clip(np.where(finite, actions, 0), -1e100, 1e100)  # products of these stay finite
    x, y, yaw = bounded[..., 0], bounded[..., 1], bounded[..., 5]
    forward = np.hypot(x, y) if mapping.variant == "norm" else x
    plane = np.stack([forward, y], axis=-1) * mapping.linear_m_s
    turn = yaw * mapping.angular_rad_s
    if mapping.drive == "differential":
        if mapping.lateral == "refuse" and np.any(plane[..., 1] != 0):
            raise ValueError(
                f"linear_y={plane[..., 1].ravel()[np.argmax(np.abs(plane[..., 1]))]:g} m/s for a differential drive, "
                "which cannot drive to the side. Choose lateral='turn', or a policy that does not ask for it."
            )
        turn = turn + plane[..., 1] * mapping.turn_per_lateral
        plane = plane * (1.0, 0.0)
    speed = np.hypot(plane[..., 0], plane[..., 1])[..., None]
    plane = plane * (mapping.speed_m_s / np.maximum(speed, mapping.speed_m_s))
    turn = np.clip(turn, -mapping.turn_rad_s, mapping.turn_rad_s)[..., None]
    return np.where(finite, np.concatenate([plane, turn], axis=-1), np.nan)


def arm_from_base(velocities: np.ndarray, mapping: BaseMapping) -> np.ndarray:
    """Inverse of variant `planar`: velocities float[..., 3] within the mapping's limits -> float64[..., 7], zeros in
    what a base has not. Raises ValueError for variant `norm`, which has no inverse, and for a wrong shape."""
    if mapping.variant != "planar":
        raise ValueError(f"variant {mapping.variant!r} has no inverse: it forgets the sign of x. Use 'planar'.")
    velocities = np.asarray(velocities, np.float64)
    if velocities.ndim < 1 or velocities.shape[-1] != BASE_DIM:
        raise ValueError(f"base velocities have shape {list(velocities.shape)}; expected [..., {BASE_DIM}].")
    actions = np.zeros((*velocities.shape[:-1], ARM_DIM))
    actions[..., [0, 1]] = velocities[..., :2] / mapping.linear_m_s
    actions[..., 5] = velocities[..., 2] / mapping.angular_rad_s
    return actions


class OnBase:
    """A policy of an arm (seven numbers) as a policy of a base (three).

    What a chunk says of its uncertainty stays; intervals are of the arm's numbers and are left out. What the base
    executed is not told to the policy, which then takes it that what it planned was done. Raises ValueError for a robot
    that is no base.
    """

    def __init__(self, policy: Policy, mapping: BaseMapping, robot: RobotSpec = MOBILE):
        if robot.action_names != BASE:
            raise ValueError(
                f"base mapping: robot {robot.name!r} has the {len(robot.action)} action dimensions "
                f"{list(robot.action_names)}; a mapping gives those of a base, {list(BASE)}, as limits.MOBILE has them."
            )
        self._policy, self._mapping = policy, mapping

    def reset(self, instruction: str) -> None:
        self._policy.reset(instruction)

    def act(self, observation: Observation) -> ActionChunk:
        """Raises what the policy and `base_from_arm` raise, and ValueError for an observation that asks the policy to
        go on from its last chunk: what is left of it are a base's numbers."""
        if observation.committed is not None:
            raise ValueError(
                "observation.committed is a base's velocities, which a policy of an arm cannot go on from: leave "
                "asynchronous.tell off with a base mapping."
            )
        chunk = self._policy.act(dataclasses.replace(observation, executed=None))
        actions = base_from_arm(chunk.actions, self._mapping).astype(np.float32)
        return ActionChunk(actions, uncertainty=chunk.uncertainty)


def base_path(velocities: np.ndarray, positions: np.ndarray, period_s: float) -> np.ndarray:
    """Where a base is after each tick of constant velocities; exact, arcs of circles.

    Args:
      velocities: float[M, N, 3], forward and left (m/s), turn (rad/s). positions: float[M, 3], x, y (m), heading (rad).
    Returns:
      float[M, N, 3].
    """
    turns = velocities[..., 2] * period_s
    headings = positions[:, None, 2] + np.cumsum(turns, axis=1)
    middle = headings - turns / 2
    length = period_s * np.sinc(turns / (2 * np.pi))  # a chord is shorter than its arc
    x = (velocities[..., 0] * np.cos(middle) - velocities[..., 1] * np.sin(middle)) * length
    y = (velocities[..., 0] * np.sin(middle) + velocities[..., 1] * np.cos(middle)) * length
    steps = np.stack([x, y], axis=-1)
    return np.concatenate([positions[:, None, :2] + np.cumsum(steps, axis=1), headings[..., None]], axis=-1)
