"""A table that looks otherwise (`envs.looks`): arrays of the same shapes for every look, drawn by one program."""

from __future__ import annotations

import dataclasses

import numpy as np

from robovlms_jax.envs import looks
from robovlms_jax.playtable import scene as scenes
from robovlms_jax.playtable.pictures import cameras, shading
from robovlms_jax.playtable.scene import Appearance, Boxes, Scene

_BELOW_M = -5.0  # things that a look does not have lie under the floor


def looking(name: str, look: looks.Look) -> Scene:
    """The table of that name with a look, NumPy."""
    scene = scenes.draw_up(name)
    if look.wood is not None:
        wooden = np.isin(scenes.BOX_MATERIAL, ["wood", "front", "pedestal"])
        scene = dataclasses.replace(scene, box_color=np.where(wooden[:, None], look.wood, scene.box_color))
    if look.grain is not None:
        scene = dataclasses.replace(scene, grain=scenes.wood_grain(*look.grain))
    spare = looks.NUM_THINGS - len(look.things)
    things = [*look.things, *[looks.Thing((0.0, 0.0, _BELOW_M), (0.01, 0.01, 0.01), (0.0, 0.0, 0.0))] * spare]
    eye, target = cameras.STATIC_EYE_M + look.eye_shift_m, cameras.STATIC_TARGET_M + look.target_shift_m
    appearance = Appearance(
        light=shading.LIGHT if look.light is None else np.array(look.light),
        tint=look.brightness * np.array(look.tint),
        static_eye=eye,
        static_axes=cameras.axes_towards(eye, target),
        things=Boxes(
            np.array([thing.center for thing in things]),
            np.tile(np.eye(3), (len(things), 1, 1)),
            np.array([thing.half for thing in things]),
        ),
        things_color=np.array([thing.color for thing in things]),
    )
    return scenes.in_single_precision(dataclasses.replace(scene, appearance=appearance))


def button_x_m(name: str) -> float:
    """Where the button is, m."""
    return float(scenes.draw_up(name).anchors.button_top[0])
