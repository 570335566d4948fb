"""Relative actions in the world's frame and in the tool's. Pure functions on NumPy or jax arrays.

An action is float[..., 6 or more]: translation, Euler rotation, and what passes through untouched (a gripper). A pose
is float[..., 6 or more], of which the first six numbers are the tool centre point's xyz (m) and Euler xyz (rad) in the
world, as CALVIN's `robot_obs` begins.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from robovlms_jax.actions import namespaces, rotations

if TYPE_CHECKING:
    from robovlms_jax.types import Array

TRANSLATION_M = 0.02
"""Metres per unit of CALVIN's relative actions: 1 / 50."""

ROTATION_RAD = 0.05
"""Radians per unit of CALVIN's relative actions: 1 / 20."""


@dataclasses.dataclass(frozen=True)
class ToolFrame:
    """Relative actions as the tool sees them: its own axes, so that "forward" stays forward when the hand turns.

    The default is exact: with R the tool's rotation and R' the one the action asks for, translation becomes R^T p and
    rotation the Euler angles of R^T R', in units of `unit`. Both ways are inverses of each other.
    """

    unit: float = ROTATION_RAD
    """Radians that one unit of rotation turns."""
    order: rotations.Order = "fixed"
    inverted: bool = False
    """Rotation as the Euler angles of R'^T R, the turn back."""

    def from_world(self, actions: Array, pose: Array) -> Array:
        """World-frame relative actions float[..., >= 6] at poses float[..., >= 6] -> tool frame, same shape."""
        xp = namespaces.of(actions)
        rotation = rotations.from_euler(pose[..., 3:6], self.order)
        target = rotations.from_euler(pose[..., 3:6] + self.unit * actions[..., 3:6], self.order)
        turn = xp.swapaxes(rotation, -1, -2) @ target
        turn = xp.swapaxes(turn, -1, -2) if self.inverted else turn
        move = xp.swapaxes(rotation, -1, -2) @ actions[..., :3, None]
        turn = rotations.to_euler(turn, self.order) / self.unit
        return xp.concatenate([move[..., 0], turn, actions[..., 6:]], axis=-1)

    def to_world(self, actions: Array, pose: Array) -> Array:
        """Inverse of `from_world`."""
        xp = namespaces.of(actions)
        rotation = rotations.from_euler(pose[..., 3:6], self.order)
        turn = rotations.from_euler(self.unit * actions[..., 3:6], self.order)
        turn = xp.swapaxes(turn, -1, -2) if self.inverted else turn
        target = rotations.to_euler(rotation @ turn, self.order)
        move = rotation @ actions[..., :3, None]
        turn = rotations.wrap(target - pose[..., 3:6]) / self.unit
        return xp.concatenate([move[..., 0], turn, actions[..., 6:]], axis=-1)


UPSTREAM_TOOL = ToolFrame(unit=0.01, order="intrinsic", inverted=True)
"""RoboVLMs' `tcp_rel`: rotations as if infinitesimal, CALVIN's angles read in the other order, and the turn back
instead of the turn. Its way back to the world cannot run there; here it inverts what `from_world` does."""
