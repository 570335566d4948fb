"""An entry for a dataset that nobody described, from common names; what is guessed is logged, once."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from robovlms_jax.data import features, notices
from robovlms_jax.data.registry import entry as entries

logger = logging.getLogger(__name__)

STATIC = ("image", "static_image", "image_0", "rgb", "rgb_static", "front_rgb", "image_primary", "agentview_rgb")
WRIST = ("wrist_image", "image_wrist", "hand_image", "rgb_gripper", "eye_in_hand_rgb", "wrist_rgb")
LANGUAGE = ("language_instruction", "observation/natural_language_instruction")
SUCCESS = ("success", "episode_metadata/success", "episode_metadata/is_success")
STATE = "steps/observation/state"

_ON_THE_ARM = ("wrist", "hand", "gripper")
_SPOKEN = {"instruction", "instructions", "language", "task", "goal", "prompt", "command", "sentence", "annotation"}
_SPOKEN |= {"annotations", "caption", "text", "description", "utterance"}
_UNSPOKEN = {
    "path",
    "filepath",
    "file",
    "filename",
    "folder",
    "id",
    "uuid",
    "hash",
    "date",
    "time",
    "timestamp",
    "user",
}
_UNSPOKEN |= {"operator", "collector", "robot", "lab", "building", "location", "scene", "name", "version", "embedding"}
_UNSPOKEN |= {"image", "images", "rgb", "depth", "cam", "camera", "jpeg", "png", "split", "model", "url", "uri", "type"}

_LISTS = ("arm", "state", "more_instructions", "directories", "units")


def infer(name: str, fields: Mapping[str, features.Field], given: Mapping[str, Any] | None = None) -> entries.Entry:
    """An entry from the common field names; `given` replaces any of it.

    `action` must have seven numbers: metres, radians, gripper 1 open. `observation/state` of seven numbers is taken for
    xyz, roll, pitch, yaw, gripper; of eight it has too many meanings, and is left out unless `state_encoding` says one.

    Raises ValueError listing what there is when names or sizes are not common ones.
    """
    given = _checked(name, given or {})
    guess: dict[str, Any] = {}
    notes: list[str] = []
    _guess_cameras(fields, given, guess, notes)
    _guess_action(name, fields, given, guess, notes)
    _guess_state(fields, given, guess, notes)
    _guess_instruction(name, fields, given, guess, notes)
    if "success" not in given and (flags := [p for p in SUCCESS if p in fields and entries.is_flag(fields[p])]):
        guess["success"] = flags[0]
        notes.append(f"success: {flags[0]}")
    try:
        entry = entries.Entry(name, **{**guess, **given})
    except TypeError as error:
        raise ValueError(f"dataset {name!r}: a field of its description is of the wrong type: {error}.") from error
    if not entry.cameras:
        raise ValueError(f"dataset {name!r} is not in the registry and {_no_camera(fields)}")
    if notes:
        notices.once(logger, f"dataset {name!r} has no description; guessed: {'; '.join(notes)}", logging.INFO)
    return entry


def _checked(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with lists as tuples. Raises ValueError for a field that does not exist."""
    known = {field.name for field in dataclasses.fields(entries.Entry)}
    for key in given:
        if key not in known - {"name"}:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"dataset {name!r} has {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; known: {sorted(known)}.")
            )
    checked = {}
    for key, value in given.items():
        value = (value,) if key in _LISTS and isinstance(value, str) else value
        checked[key] = tuple(value) if isinstance(value, list) else value
    return checked


def _guess_cameras(
    fields: Mapping[str, features.Field], given: Mapping[str, Any], guess: dict[str, Any], notes: list[str]
) -> None:
    prefix = "steps/observation/"
    usable = [
        path.removeprefix(prefix)
        for path, field in fields.items()
        if path.startswith(prefix) and field.is_picture and not field.is_depth
    ]
    taken = [given.get(camera) for camera in ("static", "secondary", "wrist")]
    free = [key for key in usable if key not in taken]
    for camera, names in (("static", STATIC), ("wrist", WRIST)):
        guess[camera] = next((key for key in names if key in free), "")
    others = [key for key in free if not any(word in key.lower() for word in _ON_THE_ARM)]
    if not guess["static"] and len(others) == 1:
        guess["static"] = others[0]
    for camera in ("static", "wrist"):
        if guess[camera] and camera not in given:
            notes.append(f"{camera}: {guess[camera]}")


def _guess_action(
    name: str,
    fields: Mapping[str, features.Field],
    given: Mapping[str, Any],
    guess: dict[str, Any],
    notes: list[str],
) -> None:
    action = fields.get("steps/action")
    is_numeric = action is not None and action.is_numeric
    if "arm" in given and is_numeric and "shapes" not in given:
        guess["shapes"] = {"action": action.shape}  # said to be understood, whatever its size
    missing = [key for key in ("arm", "gripper") if key not in given]
    if not missing:
        return
    if not is_numeric or action.size != 7:
        there = {path: str(f) for path, f in fields.items() if f.is_numeric and f.per_step and "action" in path}
        numbers = {path: str(f) for path, f in fields.items() if f.is_numeric and f.per_step}
        found = f"has {action.size} numbers ({action})" if is_numeric else "is not a field of numbers"
        raise ValueError(
            f"dataset {name!r}: steps/action {found}; without a description seven are expected (xyz in metres and "
            "roll, pitch, yaw in radians to move by, gripper 1 open, 0 closed). Eight are often seven joints and a "
            "gripper or a pose with a quaternion, fourteen two arms, six lack the gripper: nothing is guessed. Say "
            f"which numbers they are with {' and '.join(missing)} in a description (data/README.md), for example "
            '{arm: ["action[:3]", "euler(action[3:7])"], gripper: "action[7]"}. Numbers there are: '
            f"{there or numbers}."
        )
    if "arm" in missing:
        notes.append("arm: action[:6], metres and radians (roll, pitch, yaw) per step")
    if "gripper" in missing:
        notes.append("gripper: action[6], 0 closed to 1 open")


def _guess_state(
    fields: Mapping[str, features.Field], given: Mapping[str, Any], guess: dict[str, Any], notes: list[str]
) -> None:
    state = fields.get(STATE)
    if "state" in given or state is None or not state.is_numeric or not state.per_step:
        return
    whole = {
        ("POS_EULER", 7): ("observation/state[:6]", "zeros(1)", "observation/state[6]"),
        ("POS_EULER", 8): ("observation/state",),
        ("POS_QUAT", 8): ("observation/state",),
        ("JOINT", 7): ("observation/state", "zeros(1)"),
        ("JOINT", 8): ("observation/state",),
    }
    encoding = given.get("state_encoding", "")
    if encoding == "NONE":
        return
    if encoding:
        if (encoding, state.size) in whole:
            guess["state"] = whole[encoding, state.size]
        return
    if state.size == 7:
        guess["state"], guess["state_encoding"] = whole["POS_EULER", 7], "POS_EULER"
        notes.append(
            f"state: {STATE} ({state}) as xyz, roll, pitch, yaw, gripper; state_encoding says it if it is another"
        )
    else:
        notes.append(
            f"no state, as {STATE} ({state}) may be a pose with Euler angles, a quaternion or a rotation vector, or "
            'joints; describe it to use it, such as state_encoding: JOINT, or state: ["observation/state[:3]", '
            '"axis_angle(observation/state[3:6])", "zeros(1)", "observation/state[6]"] with state_encoding: POS_EULER'
        )


def _guess_instruction(
    name: str,
    fields: Mapping[str, features.Field],
    given: Mapping[str, Any],
    guess: dict[str, Any],
    notes: list[str],
) -> None:
    if "instruction" in given:
        return
    named = [key for key in LANGUAGE if f"steps/{key}" in fields and entries.is_language(fields[f"steps/{key}"])]
    texts = [path for path, field in fields.items() if field.kind == "text" and not _tokens(path) & _UNSPOKEN]
    spoken = [path for path in texts if _tokens(path) & _SPOKEN]
    if named:
        guess["instruction"] = named[0]
        spoken = [f"steps/{named[0]}", *spoken]
    else:
        candidates = [path for path in spoken if not _numbered(path, spoken)] or spoken or texts
        exact = [path for path in candidates if path.rpartition("/")[2] in ("language_instruction", "instruction")]
        candidates = exact if len(exact) == 1 else candidates
        if len(candidates) > 1:
            raise ValueError(
                f"dataset {name!r}: any of the texts {candidates} may be the instruction; say instruction: NAME in a "
                "description (data/README.md)."
            )
        guess["instruction"] = candidates[0] if candidates else ""
    chosen = guess["instruction"]
    notes.append(f"instruction: {chosen}" if chosen else "no instruction, as no text looks like one")
    more = tuple(path for path in spoken if chosen and _numbered(path, [features.locate(fields, chosen)]))
    if more and "more_instructions" not in given:
        guess["more_instructions"] = more
        notes.append(f"other wordings: {', '.join(more)}")


def _tokens(path: str) -> set[str]:
    return set(re.split(r"[_\W]+", path.rpartition("/")[2].lower()))


def _numbered(path: str, paths: list[str]) -> bool:
    """Whether `path` is one of `paths` with a number behind."""
    return re.sub(r"_?\d+$", "", path) in set(paths) - {path}


def _no_camera(fields: Mapping[str, features.Field]) -> str:
    """What images there are, and why none was taken."""

    def listed(fits: Callable[[features.Field], bool]) -> dict[str, str]:
        return {path: f"{field}{entries.why_not_picture(field)}" for path, field in fields.items() if fits(field)}

    images = listed(lambda field: field.kind == "image" or bool(entries.why_not_picture(field)))
    texts = listed(lambda field: field.kind == "text" and field.per_step)
    outside = not any(path.startswith("steps/observation/") for path in fields)
    return (
        "no camera was found below steps/observation"
        + (", which does not exist" if outside else "")
        + f"; images: {images}; texts, which may hold encoded pictures: {texts}; other fields: "
        f"{[path for path in fields if path not in images and path not in texts]}. Describe it in a file "
        "(data/README.md), such as {static: front_rgb, wrist: hand_rgb}; ../ leads out of observation."
    )
