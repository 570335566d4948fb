"""The robot's own state as policies see it. Training and serving read the same numbers, here and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robovlms_jax.types import Array

DIM = 7
"""Numbers of CALVIN's: tool centre point xyz (m) and Euler xyz (rad) in the world frame, then the last gripper command
(+1 open, -1 closed)."""

ROBOT_OBS_DIM = 15
"""CALVIN's layout: tcp xyz, tcp Euler xyz, gripper width (m), 7 joints (rad), last gripper command."""


def from_robot_state(state: Array, dim: int = DIM) -> Array:
    """What a policy takes from an environment's or a dataset's robot state.

    Upstream picks the same numbers (tcp pose and the last column) for its state token. The gripper is the *command*
    given last, not the measured width.

    Args:
      state: float[..., 15] in CALVIN's layout, or float[..., dim] that already is what this returns.
      dim: numbers of the robot's state (`RobotSpec.state`); CALVIN's layout is for its 7 only.
    Returns:
      float[..., dim], same kind of array and dtype.
    Raises:
      ValueError: any other number of columns.
    """
    if state.shape[-1] == dim:
        return state
    if dim != DIM:
        raise ValueError(f"robot state has {state.shape[-1]} numbers; expected the robot's {dim}.")
    if state.shape[-1] != ROBOT_OBS_DIM:
        raise ValueError(
            f"robot state has {state.shape[-1]} numbers; expected {ROBOT_OBS_DIM} in CALVIN's layout, or {DIM}: tcp "
            "xyz (m), tcp Euler xyz (rad), gripper (+1 open, -1 closed)."
        )
    xp = state.__array_namespace__()
    return xp.concat([state[..., :6], state[..., 14:]], axis=-1)
