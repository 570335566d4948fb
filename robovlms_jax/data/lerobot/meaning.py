"""What a LeRobotDataset's numbers and cameras are: said in a file of ours, read from info.json's names, or assumed.

What is assumed is said once; what cannot be told is refused with the names found and the file to write.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args

from robovlms_jax import json_files
from robovlms_jax.control import robot
from robovlms_jax.data.lerobot import any_robot, meta, names, spans
from robovlms_jax.data.lerobot import cameras as pictures
from robovlms_jax.data.registry import entry as entries
from robovlms_jax.data.registry import libero, robot_entry

CONVENTIONS = "meta/robovlms.json"

_TEXT, _TEXTS = "a text", "a list of texts"
_FIELDS: Mapping[str, str] = {
    "arm": _TEXTS,
    "gripper": _TEXT,
    "static": _TEXT,
    "secondary": _TEXT,
    "wrist": _TEXT,
    "state": _TEXTS,
    "state_encoding": f"one of {', '.join(get_args(entries.StateEncoding))}",
    "robot": "a robot's description",
    "units": "six numbers above 0",
    "rotation": "euler_xyz or axis_angle",
    "frame": "world, base or tcp",
    "control_hz": "a number of 0 or more",
    "skip_first": "a whole number of 0 or more",
    "drop_still": "true or false",
    "success": _TEXT,
}
"""Fields of `registry.entry.Entry` that a conventions file may have; sentences come from meta/tasks."""

SUCCESS = ("next.success", "success", "is_success", "is_episode_successful", "episode_success")
"""Features that may tell failures. Recorders fill some of them with false throughout, so none is believed unasked."""

NAMED: Mapping[str, Callable[[Collection[str]], dict[str, Any]]] = {"libero": libero.lerobot_conventions}
"""Conventions that need no file: name -> a function of the features' names."""

_END_EFFECTOR = ("arm", "gripper", "static", "secondary", "wrist", "state", "state_encoding")
"""Fields that describe an end effector and the cameras that it is trained with."""

_WRIST = ("wrist", "hand", "gripper")


@dataclasses.dataclass(frozen=True)
class Meaning:
    """cameras: our name -> feature key. opening: whether the state's last number says how far the gripper is open.
    guessed_arm: nobody said that the arm's numbers are motion within one step."""

    entry: entries.Entry
    cameras: Mapping[str, str]
    robot: robot.RobotSpec
    opening: bool
    guessed_arm: bool = False


def read(info: meta.Info, conventions: str | os.PathLike[str], notes: meta.Notes) -> Meaning:
    """Raises ValueError naming file, field, what was found and what to write.

    Args:
      conventions: file that replaces <root>/meta/robovlms.json, or a name of `NAMED`; "" = that one, where it exists.
    """
    path = pathlib.Path(conventions) if conventions else info.root / CONVENTIONS
    if str(conventions) in NAMED:
        given = NAMED[str(conventions)](info.features)
    else:
        given = _read_conventions(path) if conventions or path.exists() else {}
    if "robot" in given:
        return _of(info, any_robot.described(info, given, path), path)
    if not set(given) & set(_END_EFFECTOR) and (found := any_robot.by_names(info, notes)):
        return _of(info, dataclasses.replace(found, **given), path)
    guess: dict[str, Any] = _guess_cameras(info, given, notes)
    is_delta = not ({"arm", "gripper"} & set(given))
    action = any_robot.field_of(info, any_robot.ACTIONS)
    if is_delta:
        guess |= _guess_action(info, action, path, notes)
    elif not {"arm", "gripper"} <= set(given):
        lacking = "gripper" if "arm" in given else "arm"
        guess |= {k: v for k, v in _guess_action(info, action, path, notes).items() if k == lacking}
    state = any_robot.field_of(info, any_robot.STATES)
    if not {"state", "state_encoding"} & set(given):
        guess |= _guess_state(info, state, notes)
    try:
        entry = entries.Entry("lerobot", **{"instruction": "", **guess, **given})
        for name in entry.numeric_fields:
            if name not in info.features:
                raise ValueError(f"info.json has no feature {name!r}; it has {sorted(info.features)}")
        problem = entry.widths({name: info.width(name) for name in entry.numeric_fields})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if problem:
        raise ValueError(f"{path}: {problem} (data/README.md).")
    cameras = {camera: key.removeprefix("steps/observation/") for camera, key in entry.cameras.items()}
    _check_cameras(info, cameras, path)
    _check_success(info, entry.success, path)
    if entry.control_hz and not math.isclose(entry.control_hz, info.fps, rel_tol=0.02):
        raise ValueError(f"{path}: control_hz is {entry.control_hz:g}, {info.path} says fps {info.fps:g}.")
    sizes = {camera: spans.image_size(info, key) for camera, key in cameras.items()}
    described = dataclasses.replace(
        entry.robot,
        name=info.robot_type or info.root.name or "robot",
        rate_hz=info.fps,
        cameras=tuple(robot.Camera(camera, *size) for camera, size in sizes.items()),
    )
    return Meaning(entry, cameras, described, bool(entry.state), guessed_arm="arm" not in given)


def _of(info: meta.Info, entry: robot_entry.RobotEntry, path: pathlib.Path) -> Meaning:
    """A robot described number by number."""
    for name in entry.numeric_fields:
        if name not in info.features:
            raise ValueError(f"{path}: info.json has no feature {name!r}; it has {sorted(info.features)}.")
    if problem := entry.widths({name: info.width(name) for name in entry.numeric_fields}):
        raise ValueError(f"{path}: {problem} (data/README.md).")
    _check_success(info, entry.success, path)
    if not entry.pictures:
        raise ValueError(f"{info.path} describes no RGB camera; its features are {sorted(info.features)}.")
    _check_cameras(info, entry.pictures, path)
    return Meaning(entry, entry.pictures, entry.robot, False)


def _read_conventions(path: pathlib.Path) -> dict[str, Any]:
    try:
        given = json_files.read(path)
    except OSError as error:
        raise ValueError(f"data.conventions: {path} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} is no JSON object, found {type(given).__name__}.")
    problems = []
    for name, value in given.items():
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_FIELDS)}."
            problems.append(f"{name!r} is no field; {hint}")
        elif not _fits(name, value):
            wanted = f"; write {json.dumps([value])}" if _FIELDS[name] == _TEXTS and isinstance(value, str) else ""
            problems.append(f"{name!r} must be {_FIELDS[name]}, found {json.dumps(value)}{wanted}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)} (data/README.md).")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


_CHOICES = {"rotation": ("euler_xyz", "axis_angle"), "frame": ("world", "base", "tcp")}


def _fits(name: str, value: Any) -> bool:
    expected = _FIELDS[name]
    if name == "robot":
        return isinstance(value, dict)
    if expected == _TEXTS:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if expected == _TEXT:
        return isinstance(value, str)
    if name == "state_encoding":
        return value in get_args(entries.StateEncoding)
    if name in _CHOICES:
        return value in _CHOICES[name]
    if name == "units":
        numbers = isinstance(value, list) and all(type(x) in (int, float) and x > 0 for x in value)
        return numbers and len(value) == 6
    if name == "drop_still":
        return isinstance(value, bool)
    whole = int if name == "skip_first" else int | float
    return isinstance(value, whole) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _unclear(info: meta.Info, field: str, path: pathlib.Path, found: str) -> ValueError:
    column = f"{field or 'action'}[6]"
    example = json.dumps({"arm": [f"{field or 'action'}[:6]"], "gripper": f"from_range({column}, 0, 100)"})
    return ValueError(
        f"{info.path}: {found}; expected seven numbers: metres and radians (x, y, z, roll, pitch, yaw) to move by in "
        f"one step, then the gripper (1 open, 0 closed), or names of joints to go to (*.pos). Say how to make them of "
        f"what is stored in {path}, or in a file passed as --data.conventions, such as {example}; or describe the "
        f"robot as it is, {any_robot.EXAMPLE} (data/README.md)."
    )


def _guess_action(info: meta.Info, field: str, path: pathlib.Path, notes: meta.Notes) -> dict[str, Any]:
    """arm and gripper by the names, or of seven numbers without names."""
    if not field:
        raise _unclear(info, field, path, f"there is no feature 'action'; there are {sorted(info.features)}")
    width, listed = info.width(field), names.of(info.features[field])
    if not listed:
        if width != 7:
            raise _unclear(info, field, path, f"{field} holds {width} numbers without names")
        notes.guess(
            f"the seven numbers of {field!r} have no names; taken as metres and radians (x, y, z, roll, pitch, yaw) to "
            "move by in one step and the gripper (1 open, 0 closed)."
        )
        return {"arm": (f"{field}[:6]",), "gripper": f"{field}[6]"}
    at = names.columns(listed)
    gripper = [what for what in ("gripper", "closed") if what in at]
    if len(listed) != width or not set(names.POSE) <= set(at) or len(gripper) != 1:
        joints = sum(names.meaning(name) == "joint" for name in listed)
        kind = ", joints, which are no motion of the gripper" if joints * 2 > len(listed) else ""
        raise _unclear(info, field, path, f"{field} holds {width} numbers, named {listed}{kind}")
    order = [at[name] for name in names.POSE]
    arm = (f"{field}[:6]",) if order == list(range(6)) else tuple(f"{field}[{column}]" for column in order)
    column = f"{field}[{at[gripper[0]]}]"
    expression = f"invert({column})" if gripper[0] == "closed" else column
    left = [name for i, name in enumerate(listed) if i not in (*order, at[gripper[0]])]
    notes.guess(
        f"{field!r} by its names {listed}: metres and radians to move by in one step, gripper {expression} (1 open, 0 "
        f"closed){f'; {left} are not used' if left else ''}."
    )
    return {"arm": arm, "gripper": expression}


def _guess_state(info: meta.Info, field: str, notes: meta.Notes) -> dict[str, Any]:
    """A pose where the names say one, else none."""
    at = names.columns(names.of(info.features[field])) if field else {}
    for encoding, rotation in (("POS_EULER", names.POSE[3:]), ("POS_QUAT", names.QUATERNION)):
        if {*names.POSE[:3], *rotation} <= set(at) and len(names.of(info.features[field])) == info.width(field):
            parts = [f"{field}[{at[name]}]" for name in (*names.POSE[:3], *rotation)]
            parts += ["zeros(1)"] if encoding == "POS_EULER" else []
            parts.append(f"{field}[{at['gripper']}]" if "gripper" in at else "zeros(1)")
            notes.guess(f"{field!r} by its names: {encoding} of {parts}.")
            return {"state": tuple(parts), "state_encoding": encoding}
    return {}


def _guess_cameras(info: meta.Info, given: Mapping[str, Any], notes: meta.Notes) -> dict[str, str]:
    listed = [key for key, feature in info.features.items() if feature.get("dtype") in ("video", "image")]
    depth = [key for key in listed if pictures.is_depth(key, info.features[key])]
    if depth:
        notes.guess(f"cameras {depth} record depth or one channel and are not used.")
    usable = [key for key in listed if key not in depth]
    wrist = [key for key in usable if any(word in key.lower() for word in _WRIST)]
    static = [key for key in usable if key not in wrist]
    chosen = {"static": next(iter(static), ""), "wrist": next(iter(wrist), "")}
    final = {**chosen, **{name: given[name] for name in ("static", "secondary", "wrist") if name in given}}
    if len(usable) > 1:
        unused = [key for key in usable if key not in final.values()]
        notes.guess(
            ", ".join(f"{camera} camera {key!r}" for camera, key in final.items() if key)
            + (f"; {unused} are not used." if unused else ".")
        )
    if not any(final.values()):
        raise ValueError(f"{info.path} describes no RGB camera; its features are {sorted(info.features)}.")
    return chosen


def _check_cameras(info: meta.Info, cameras: Mapping[str, str], path: pathlib.Path) -> None:
    for camera, key in cameras.items():
        feature = info.features.get(key, {})
        if feature.get("dtype") not in ("video", "image"):
            there = [k for k, f in info.features.items() if f.get("dtype") in ("video", "image")]
            raise ValueError(f"{path}: {camera} names {key!r}, which is no camera of info.json; there are {there}.")
        if pictures.is_depth(key, feature):
            raise ValueError(f"{path}: {camera} names {key!r}, which records depth or one channel, not RGB.")
        if feature["dtype"] == "video" and not info.video_path:
            raise ValueError(f"{info.path}: camera {key!r} is video and video_path is not given.")
    twice = [key for key in cameras.values() if list(cameras.values()).count(key) > 1]
    if twice:
        raise ValueError(f"{path}: camera {twice[0]!r} is named for two of {list(cameras)}.")


def _check_success(info: meta.Info, success: str, path: pathlib.Path) -> None:
    if success and (success not in info.features or info.width(success) != 1):
        flags = [name for name in info.features if info.features[name].get("dtype") == "bool"]
        raise ValueError(f"{path}: success names {success!r}, which is no feature of one number; flags are {flags}.")
