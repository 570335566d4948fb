"""One backbone, several robots: what another robot's data need of a policy, beside its own robot's.

Every other robot has a view of the policy: the same history, readout, head and backbone, with that robot's cameras,
state, actions and their statistics. Backbone and readout are shared by all. Heads are either own ones, or one for all
whose outputs are the dimensions of all robots by name; a robot reads, and is taught by, the columns that it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robovlms_jax import schema
from robovlms_jax.control.robot import RobotSpec
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.others")
class OtherRobotConfig:
    """Another robot as its data describe it. A run fills it in, from the sources of data.others."""

    name: str
    """Of the source."""
    robot: RobotSpec
    cameras: tuple[str, ...]
    action_low: tuple[float, ...]
    """Lower end of each of its action dimensions that is no binary gripper; of its own data."""
    action_high: tuple[float, ...]
    state_center: tuple[float, ...] = ()
    """Of the numbers of its state; empty: the policy is not told it."""
    state_scale: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
@schema.checked("policy.shared")
class SharedActions:
    """Outputs of a head that all robots share. A run fills it in. Empty: the head has the policy's own robot's."""

    names: tuple[str, ...] = ()
    """Dimensions of all robots, each name once."""
    binary: tuple[int, ...] = ()
    """Which of them are decisions."""

    def columns(self, robot: RobotSpec) -> tuple[int, ...]:
        """The outputs that a robot's action is made of, in its order."""
        return tuple(self.names.index(dimension.name) for dimension in robot.action)

    def cut(self, prediction: Any, robot: RobotSpec) -> Any:
        """A continuous head's prediction for all dimensions -> for those of a robot."""
        scaled = [column for column in range(len(self.names)) if column not in self.binary]
        own = self.columns(robot)
        numbers = np.array([scaled.index(column) for column in own if column in scaled], int)
        decisions = np.array([self.binary.index(column) for column in own if column in self.binary], int)
        log_scale = prediction.log_scale
        return prediction.replace(
            arm=prediction.arm[..., numbers],
            gripper_logit=prediction.gripper_logit[..., decisions],
            log_scale=None if log_scale is None else log_scale[..., numbers],
        )


def shared_by(robots: Sequence[RobotSpec]) -> SharedActions:
    """The dimensions of all robots by name, in the order in which they are met.

    Raises ValueError: a name is a decision of one robot and a number of another.
    """
    kinds: dict[str, bool] = {}
    for robot in robots:
        for dimension in robot.action:
            binary = dimension.kind == "binary"
            require(
                kinds.setdefault(dimension.name, binary) == binary,
                f"policy.other_heads='shared': {dimension.name!r} of robot {robot.name!r} is "
                f"{'a decision' if binary else 'a number'}, and of another robot it is not. Give it another name in "
                "the description, or use policy.other_heads='own'.",
            )
    return SharedActions(tuple(kinds), tuple(column for column, binary in enumerate(kinds.values()) if binary))


def view(config: Any, name: str) -> Any:
    """The `PolicyConfig` of another robot, by its source's name. Raises ValueError: there is none, names those there
    are."""
    known = {other.name: other for other in config.others}
    require(
        name in known,
        f"this policy was not trained on robot {name!r}; beside its own it knows {sorted(known) or 'none'}.",
    )
    other = known[name]
    proprio = dataclasses.replace(
        config.proprio,
        enabled=bool(other.state_center),
        **({"center": other.state_center, "scale": other.state_scale} if other.state_center else {}),
    )
    return dataclasses.replace(
        config,
        robot=other.robot,
        cameras=other.cameras,
        action_scaling="bounds",
        action_low=other.action_low,
        action_high=other.action_high,
        representation="robot",
        proprio=proprio,
        sensors=(),
        auxiliary=type(config.auxiliary)(),
        others=(),
    )


def scope(name: str) -> str:
    """Where the parameters are that only this robot has."""
    return f"robot_{name}"


def own_parameters(config: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """Of a view's parameters, those that it shares with nobody."""
    return {part: x for part, x in made.items() if part not in _common(config)}


def parameters(config: Any, params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parameters that a robot's view applies, out of the policy's."""
    return {part: x for part, x in params.items() if part in _common(config)} | dict(params.get(scope(name), {}))


def _common(config: Any) -> set[str]:
    return {"backbone", "readout"} | ({"head"} if config.shared.names else set())


@dataclasses.dataclass(frozen=True, eq=False)
class OtherRobotLoss:
    """`objective.RobotLoss` of another robot's view, on the whole policy's parameters. A loss on batches of its source
    (`objective.SourceLoss`).

    config: the whole policy's. loss: the view's.
    """

    config: Any
    name: str
    loss: Any

    def count(self, batch: Any) -> jax.Array:
        return self.loss.count(batch)

    def __call__(
        self, params: Any, batch: Any, key: jax.Array | None = None, count: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.loss(parameters(self.config, params, self.name), batch, key, count)
