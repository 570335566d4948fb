"""What the names of a field's numbers, as info.json lists them, say about the numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from robovlms_jax.control import robot

POSE = ("x", "y", "z", "roll", "pitch", "yaw")
QUATERNION = ("qx", "qy", "qz", "qw")

_CORES: Mapping[str, str] = {
    **{name: name for name in (*POSE, *QUATERNION)},
    **{f"d{name}": name for name in POSE},
    **dict(zip(("quat_x", "quat_y", "quat_z", "quat_w"), QUATERNION, strict=True)),
    **dict(zip(("euler_x", "euler_y", "euler_z"), POSE[3:], strict=True)),
    **dict.fromkeys(
        ("gripper", "grip", "gripper_open", "gripper_opening", "gripper_width", "gripper_state"), "gripper"
    ),
    **dict.fromkeys(("gripper_closed", "gripper_close", "gripper_closedness"), "closed"),
}
"""Name without filling words -> what it says. Rotations called rx, rot_x or wx may be a rotation vector: not here."""

_FILLING = re.compile(
    "actions?|observation|obs|state|ee|eef|tcp|end|effector|endeffector|pose|pos|position|target|cmd|command|delta|rel|"
    "relative|cartesian|translation|trans|arm|robot|left|right|m|rad"
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_JOINT = re.compile(r"joint|motor|servo|shoulder|elbow|wrist|waist|forearm|finger|\bj\d")
_NUMBERED = re.compile(r"(?:action|actions|state|dim|a|d|s|value|axis|element|feature)?[ _.-]*\d+")


def of(feature: Mapping[str, Any]) -> list[str]:
    """The names in order, flattened: lists, {"motors": [...]}, {"x": 0, "y": 1}, nested; [] where they say nothing, as
    one label for all or bare numbers do."""
    listed = _flat(feature.get("names"))
    one_for_all = len(listed) == 1 and math.prod(feature["shape"]) > 1
    return [] if one_for_all or all(_NUMBERED.fullmatch(name.lower()) for name in listed) else listed


def _flat(names: Any) -> list[str]:
    if names is None:
        return []
    if isinstance(names, dict):
        if names and all(isinstance(place, int) for place in names.values()):
            return [str(name) for name, _ in sorted(names.items(), key=lambda item: item[1])]
        parts = {key: _flat(value) for key, value in names.items()}
        several = sum(bool(part) for part in parts.values()) > 1
        return [f"{key}.{name}" if several else name for key, part in parts.items() for name in part]
    if isinstance(names, list | tuple):
        return [name for part in names for name in _flat(part)]
    return [str(names)]


def meaning(name: str) -> str:
    """One of `POSE`, `QUATERNION`, "gripper", "closed" (a gripper, 1 closed), "joint", or "" = unknown."""
    words = [word for word in re.split(r"[^a-z0-9]+", _CAMEL.sub("_", name).lower()) if word]
    kept = [word for word in words if not _FILLING.fullmatch(word)]
    if kept and kept[-1] in POSE[3:]:
        kept = [word for word in kept if word not in ("rotation", "rot", "orientation", "euler", "rpy")]
    core = "_".join(word for word, before in zip(kept, [None, *kept], strict=False) if word != before)
    if not {"abs", "absolute", "vel", "velocity"} & set(words) and core in _CORES:
        return _CORES[core]
    return "joint" if _JOINT.search(name.lower()) or (len(words) > 1 and words[-1] == "pos") else ""


def columns(names: Sequence[str]) -> dict[str, int]:
    """meaning -> its column, of those that exactly one name has."""
    meanings = [meaning(name) for name in names]
    return {m: i for i, m in enumerate(meanings) if m and meanings.count(m) == 1}


def dimensions(field: str, names: Sequence[str], width: int, *, is_delta: bool = False) -> tuple[robot.Dimension, ...]:
    """A field's numbers for `RobotSpec`.

    Args:
      names: [] or one of each.
      is_delta: they are what actions are assumed to be: metres and radians to move by, gripper 1 open.
    """
    if len(names) != width:
        names = [*POSE, "gripper"] if is_delta and width == 7 else [f"{field}[{i}]" for i in range(width)]
    unique = [f"{name}[{i}]" if list(names).count(name) > 1 else name for i, name in enumerate(names)]
    meanings = [meaning(name) for name in names]
    made = []
    for column, (name, what) in enumerate(zip(unique, meanings, strict=True)):
        dimension = robot.Dimension(name)
        if what in ("gripper", "closed"):
            bounds = {"low": 0.0, "high": 1.0} if is_delta else {}
            open_at = {"gripper": "high", "closed": "low"}[what] if is_delta else ""
            dimension = robot.Dimension(
                name, "1" if is_delta else "", "continuous", "gripper", open_at=open_at, **bounds
            )
        elif what == "joint":
            dimension = robot.Dimension(name, quantity="joint")
        for group, quantity, unit in (
            (POSE[:3], "position", "m"),
            (POSE[3:], "euler_xyz", "rad"),
            (QUATERNION, "quaternion_xyzw", ""),
        ):
            if what in group:
                start = column - group.index(what)
                whole = start >= 0 and tuple(meanings[start : start + len(group)]) == group
                known = {"unit": unit, "kind": "delta"} if is_delta else {}
                dimension = robot.Dimension(name, quantity=quantity if whole else "other", **known)
        made.append(dimension)
    return tuple(_alone(made))


def _alone(made: Sequence[robot.Dimension]) -> list[robot.Dimension]:
    """Without quantities whose neighbours are more than whole groups, which `RobotSpec` refuses."""
    try:
        robot.RobotSpec("", action=tuple(made))
        return list(made)
    except ValueError:
        grouped = robot.GROUP_SIZES
        return [dataclasses.replace(d, quantity="other") if d.quantity in grouped else d for d in made]
