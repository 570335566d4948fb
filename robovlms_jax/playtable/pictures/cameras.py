"""The static camera and the one on the hand, placed as in CALVIN."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from robovlms_jax.control import interface
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.scene import Appearance
from robovlms_jax.types import Array

SIZES = {"static": 200, "wrist": 84}
"""CALVIN's picture sizes, px."""
STATIC_EYE_M, STATIC_TARGET_M = np.array([2.871, -2.167, 2.555]), np.array([-0.026, -0.030, 0.392])
_PEOPLE_TARGET_M = STATIC_TARGET_M + np.array([0.0, 0.0, 0.03])
"""The static camera's picture for people is turned up and wider by so much that both lamps are whole in it."""
_STATIC_UP = np.array([0.404, 0.226, 0.886])
_WRIST_EYE_M = np.array([-0.1, 0.0, -0.142], np.float32)  # frame of the tool centre point
_WRIST_TILT_RAD = 0.2708
_VIEW_RAD = {
    "static": np.deg2rad(10.0),
    "people": np.deg2rad(11.5),
    "wrist": np.deg2rad(75.0),
}  # angle of view, both ways


class Camera(NamedTuple):
    """A pinhole camera. eye: float[3], m, world. rotation: float[3, 3], columns point right, down and forward.
    view: angle of view in rad."""

    eye: Array
    rotation: Array
    view: float


def axes_towards(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`Camera.rotation` of the static camera, moved to `eye` and looking at `target`, float64[3] in m."""
    forward = target - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, _STATIC_UP)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward], axis=1)


def camera(state: bodies.State | None, name: str, appearance: Appearance | None = None) -> Camera:
    """The camera "static", "wrist", or "people": where the static one usually stands, with more of the table in it,
    which no policy sees. Only the one on the hand needs a state. appearance: where the static one stands, if not as
    usual."""
    if name == "static" and appearance is not None:
        return Camera(appearance.static_eye, appearance.static_axes, _VIEW_RAD[name])
    if name in ("static", "people"):
        axes = axes_towards(STATIC_EYE_M, STATIC_TARGET_M if name == "static" else _PEOPLE_TARGET_M)
        return Camera(jnp.asarray(STATIC_EYE_M, jnp.float32), jnp.asarray(axes, jnp.float32), _VIEW_RAD[name])
    if name == "wrist":
        c, s = np.cos(_WRIST_TILT_RAD), np.sin(_WRIST_TILT_RAD)
        axes = jnp.array([[0.0, -c, s], [1.0, 0.0, 0.0], [0.0, s, c]], jnp.float32)
        return Camera(state.position + state.rotation @ _WRIST_EYE_M, state.rotation @ axes, _VIEW_RAD[name])
    raise ValueError(f"unknown camera {name!r}; cameras: {', '.join(interface.CAMERAS)}.")


def focal(camera: Camera, size: int) -> np.float32:
    """Pixels per unit of slope."""
    return np.float32(size / 2 / np.tan(camera.view / 2))
