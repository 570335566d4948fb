"""Where things are on a table of the real CALVIN simulator, read from the scene's own files: `conf/scene/*.yaml`, the
table's URDF and the blocks'. No simulator is needed for it."""

from __future__ import annotations

import dataclasses
import pathlib
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robovlms_jax.envs.calvin import adapter, initial_states
from robovlms_jax.playtable.scene import BLOCKS, JOINTS, Anchors
from robovlms_jax.types import Array

_JOINT_NAMES = {"slider": "base__slide", "drawer": "base__drawer", "button": "base__button", "switch": "base__switch"}
# From a mechanism's joint to the place where a hand takes it, m: the meshes are the same in all four scenes.
_HANDLES = {
    "slider": (0.14, -0.0482, 0.0292),
    "drawer": (0.0, -0.25, 0.04),
    "button": (0.0, 0.0, 0.024),
    "switch": (0.0, -0.0391, 0.0379),
}
_BLOCK_SIDE_M = 0.02  # half of a block's short side: surfaces name where its centre may be


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Geometry:
    """What experts read of a table; the fields are those of `playtable.scene.Scene`."""

    anchors: Anchors
    joint_range: Array
    block_half: Array
    block_slot: Array


def read(calvin_root: str, scene: str) -> Geometry:
    """The table "A" to "D" of a checkout.

    Raises:
      FileNotFoundError: no checkout there, or a file of the scene is missing. ValueError: a file lacks something.
    """
    root = adapter.find_checkout(calvin_root)
    if scene not in initial_states.SCENES:
        raise ValueError(f"unknown scene {scene!r}; known scenes: {', '.join(initial_states.SCENES)}.")
    path = root / "conf" / "scene" / f"calvin_scene_{scene}.yaml"
    config = _yaml(path)
    try:
        scale = float(config["global_scaling"])
        objects, surfaces = config["objects"], config["surfaces"]
        table = root / "data" / objects["fixed_objects"]["table"]["file"]
        blocks = {name: root / "data" / block["file"] for name, block in objects["movable_objects"].items()}
        area, left, right = (np.array(surfaces[name]) for name in ("table", "slider_left", "slider_right"))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} lacks {error}, which every scene of calvin_env has: restore it (git checkout)."
        ) from error
    origins, limits = _joints(table, scale)
    order = [name.removeprefix("block_") for name in blocks]
    if sorted(order) != sorted(BLOCKS):
        raise ValueError(f"{path} has the blocks {order}, expected one of each of {', '.join(BLOCKS)}.")
    handles = {name: origins[name] + np.array(offset) for name, offset in _HANDLES.items()}
    shelf = [part[:, 0] + np.array([-_BLOCK_SIDE_M, _BLOCK_SIDE_M]) for part in (left, right)]
    anchors = Anchors(
        slider_handle=handles["slider"],
        drawer_handle=handles["drawer"],
        button_top=handles["button"],
        switch_handle=handles["switch"],
        shelf=np.stack(shelf),
        area=area[:, :2].T,
        switch_half=np.array(_half_width(table, "switch_link", scale)),
    )
    half = np.array([_box(blocks[f"block_{color}"], scale) / 2 for color in BLOCKS])
    found = Geometry(
        anchors, np.array([limits[name] for name in JOINTS]), half, np.array([order.index(color) for color in BLOCKS])
    )
    return jax.tree.map(lambda x: np.asarray(x, np.int32 if x.dtype.kind == "i" else np.float32), found)


def _yaml(path: pathlib.Path) -> Mapping[str, Any]:
    import yaml  # of the extra `calvin`

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}. Restore it (git checkout).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected the settings of a scene.")
    return content


def _joints(path: pathlib.Path, scale: float) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Of each of `JOINTS`: where it is at zero, float64[3], and how far it goes, both in m."""
    joints = {joint.get("name"): joint for joint in _urdf(path).iter("joint")}
    origins, limits = {}, {}
    for name, theirs in _JOINT_NAMES.items():
        try:
            origins[name] = scale * np.array(joints[theirs].find("origin").get("xyz").split(), np.float64)
            limits[name] = scale * float(joints[theirs].find("limit").get("upper"))
        except (KeyError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"{path} has no joint {theirs!r} with origin and upper limit ({error!r}).") from error
    return origins, limits


def _half_width(path: pathlib.Path, link: str, scale: float) -> float:
    """Half the extent along x of a link's mesh (Wavefront), m."""
    found = _urdf(path).find(f"link[@name='{link}']/visual/geometry/mesh")
    mesh = path.parent / ("" if found is None else found.get("filename", ""))
    if not mesh.is_file():
        raise FileNotFoundError(f"{path}: the mesh of {link!r} is not at {mesh} (git checkout restores the checkout).")
    x = [float(line.split()[1]) for line in mesh.read_text().splitlines() if line.startswith("v ")]
    return scale * (max(x) - min(x)) / 2


def _box(path: pathlib.Path, scale: float) -> np.ndarray:
    """float64[3], edges of a block's box, m."""
    box = _urdf(path).find("link/collision/geometry/box")
    size = np.array(("" if box is None else box.get("size", "")).split(), np.float64)
    if size.shape != (3,):
        raise ValueError(f"{path} has no link whose collision shape is a box with three edges.")
    return scale * size


def _urdf(path: pathlib.Path) -> ET.Element:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkout of calvin_env is not whole (git checkout).")
    try:
        return ET.parse(path).getroot()
    except ET.ParseError as error:
        raise ValueError(f"{path} is not XML: {error}. Restore it (git checkout).") from error
