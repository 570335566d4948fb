"""Numbers of an action as people read them: names, units, what they are drawn together with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from robovlms_jax.control.robot import RobotSpec

# People read millimetres and degrees; everything else here is in metres and radians.
_READABLE = {"m": (1000.0, "mm"), "rad": (180 / math.pi, "°"), "m/s": (1000.0, "mm/s"), "rad/s": (180 / math.pi, "°/s")}


@dataclasses.dataclass(frozen=True)
class Axis:
    """A dimension that is no binary gripper, as people read it.

    column: of the action. factor: makes `unit` of the robot's own ("mm" of metres).
    """

    column: int
    name: str
    factor: float
    unit: str
    title: str
    """What it is one of: "translation", "rotation", "joint"."""

    @property
    def label(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


def axes_of(robot: RobotSpec) -> list[Axis]:
    """One for each number of `offline.Summary.mae`."""
    titles = {"position": "translation", "euler_xyz": "rotation", "axis_angle": "rotation", "base": "base motion"}
    made = []
    for column in robot.scaled:
        dimension = robot.action[column]
        unit = dimension.measure[1]
        factor, readable = _READABLE.get(unit, (1.0, "" if unit == "1" else unit))
        title = titles.get(dimension.quantity, dimension.quantity.replace("_", " "))
        made.append(Axis(column, dimension.name, factor, readable, title))
    return made


def groups_of(axes: Sequence[Axis], most: int = 8) -> list[list[int]]:
    """Places of axes that share a panel: one title and unit, `most` at a time."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, axis in enumerate(axes):
        found.setdefault((axis.title, axis.unit), []).append(place)
    return [places[i : i + most] for places in found.values() for i in range(0, len(places), most)]
