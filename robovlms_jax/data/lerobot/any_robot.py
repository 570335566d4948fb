"""A LeRobotDataset of any robot: what its actions and states are, number by number, from a file of ours or from
info.json's names."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from robovlms_jax.control import robot as robots
from robovlms_jax.data.lerobot import cameras, meta, names, spans
from robovlms_jax.data.registry import robot_entry

ACTIONS, STATES = ("action", "actions"), ("observation.state", "state")
"""Names of the fields; the first that is there counts."""

EXAMPLE = '{"robot": {"action": [{"name": "elbow", "kind": "absolute", "quantity": "joint", "unit": "rad"}, ...]}}'
"""A description to begin with, for messages."""


def field_of(info: meta.Info, candidates: Sequence[str]) -> str:
    """The first of the candidates that info.json has; "" where none is."""
    return next((name for name in candidates if name in info.features), "")


def described(info: meta.Info, given: Mapping[str, Any], path: pathlib.Path) -> robot_entry.RobotEntry:
    """The robot that a conventions file describes, {"robot": {"action": [{"name", "kind", ...}], ...}}.

    Dimensions are found by their names in info.json, or by their order where it names none. What the file does not say
    of cameras, rate and name is info.json's. Raises ValueError naming the file and the field.
    """
    content = given["robot"]
    others = sorted(set(given) & {"arm", "gripper", "static", "secondary", "wrist", "state", "state_encoding"})
    if not isinstance(content, Mapping) or others:
        found = f"also has {others}, which describe an end effector" if others else f"has robot={content!r}"
        raise ValueError(f'{path}: {found}; expected {{"robot": {{"action": [{{"name": ..., "kind": ...}}]}}}}.')
    spec = robots.from_json({"name": info.robot_type or info.root.name or "robot", **content}, f"{path}: robot")
    if spec.rate_hz and not math.isclose(spec.rate_hz, info.fps, rel_tol=0.02):
        raise ValueError(f"{path}: robot.rate_hz is {spec.rate_hz:g}, {info.path} says fps {info.fps:g}.")
    known = cameras.by_name(info)
    chosen = {camera.name: known.get(camera.name, camera.name) for camera in spec.cameras} or known
    unknown = [camera for camera, key in chosen.items() if key not in info.features]
    if unknown:
        raise ValueError(f"{path}: robot.cameras names {unknown}; info.json has {sorted(known)}.")
    columns = {
        part: _columns(info, candidates, getattr(spec, part), f"{path}: robot.{part}")
        for part, candidates in (("action", ACTIONS), ("state", STATES))
    }
    return _entry(info, spec, columns, chosen, given)


def by_names(info: meta.Info, notes: meta.Notes) -> robot_entry.RobotEntry | None:
    """The robot whose actions info.json names as joints and grippers to go to; None where the names say anything else,
    or not that they are places to go to.

    They are where each name ends in "pos" (LeRobot's own robots), or where the state has the same names.
    """
    action, state = field_of(info, ACTIONS), field_of(info, STATES)
    if not action:
        return None
    listed = names.of(info.features[action])
    meanings = [names.meaning(name) for name in listed]
    if len(listed) != info.width(action) or "joint" not in meanings:
        return None
    if not set(meanings) <= {"joint", "gripper", "closed"}:
        return None
    same = bool(state) and names.of(info.features[state]) == listed
    if not same and not all(name.lower().endswith(("pos", "position")) for name in listed):
        return None
    parts = {"action": names.dimensions(action, listed, len(listed)), "state": ()}
    if state:
        parts["state"] = names.dimensions(state, names.of(info.features[state]), info.width(state))
    spec = robots.RobotSpec(info.robot_type or info.root.name or "robot", info.fps, **parts)
    why = "the state has the same" if same else "they are called positions"
    notes.guess(
        f"{action!r} by its names {listed}: places to go to of {meanings.count('joint')} joints, for {why}, in the "
        f"units that are stored, with {len(listed) - meanings.count('joint')} continuous grippers. Where this is "
        'wrong, describe it: {"robot": ...} in meta/robovlms.json.'
    )
    columns = {
        part: [f"{field}[{i}]" for i in range(len(parts[part]))]
        for part, field in (("action", action), ("state", state))
    }
    return _entry(info, spec, columns, cameras.by_name(info), {})


def _entry(
    info: meta.Info,
    spec: robots.RobotSpec,
    columns: Mapping[str, Sequence[str]],
    chosen: Mapping[str, str],
    given: Mapping[str, Any],
) -> robot_entry.RobotEntry:
    sizes = {camera: spans.image_size(info, key) for camera, key in chosen.items()}
    spec = dataclasses.replace(
        spec, rate_hz=info.fps, cameras=tuple(robots.Camera(camera, *size) for camera, size in sizes.items())
    )
    more = {name: given[name] for name in ("skip_first", "drop_still", "control_hz", "success") if name in given}
    return robot_entry.RobotEntry(
        "lerobot",
        described=spec,
        actions=tuple(columns["action"]),
        states=tuple(columns["state"]),
        pictures=dict(chosen),
        instruction="",
        **more,
    )


def _columns(
    info: meta.Info, candidates: Sequence[str], dimensions: Sequence[robots.Dimension], where: str
) -> list[str]:
    """An expression for each dimension. Raises ValueError."""
    if not dimensions:
        return []
    field = field_of(info, candidates)
    if not field:
        raise ValueError(
            f"{where}: info.json has no feature {' or '.join(candidates)}; it has {sorted(info.features)}."
        )
    listed, wanted = names.of(info.features[field]), [dimension.name for dimension in dimensions]
    if len(listed) == info.width(field) and set(wanted) <= set(listed):
        return [f"{field}[{listed.index(name)}]" for name in wanted]
    if len(wanted) != info.width(field):
        raise ValueError(
            f"{where} has {len(wanted)} dimensions {wanted}; {info.path} has {info.width(field)} numbers in {field!r}"
            f"{f', named {listed}' if listed else ' without names'}. List all of them, or names that are there."
        )
    return [f"{field}[{i}]" for i in range(len(wanted))]
