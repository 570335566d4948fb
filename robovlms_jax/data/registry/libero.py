"""LIBERO in the three forms it is published in: the four sets without idle steps as OpenVLA publishes them in RLDS
(openvla/modified_libero_rlds on Hugging Face), copies as LeRobotDatasets, and LIBERO's own HDF5 files.

The action is what robosuite's OSC_POSE controller takes at 20 Hz: 1.0 moves 0.05 m or turns 0.5 rad (as a rotation
vector) about the axes of the robot's base; the gripper's command is -1 to open, +1 to close. The state is xyz, a
rotation vector and the places of two fingers that mirror each other (0.04 m open, 0 closed).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from robovlms_jax.data.registry.entry import Entry

NAMES = ("libero_spatial_no_noops", "libero_object_no_noops", "libero_goal_no_noops", "libero_10_no_noops")

ENTRIES: dict[str, Entry] = {
    name: Entry(
        name,
        gripper="invert(clip(action[6]))",
        units=(0.05,) * 3 + (0.5,) * 3,
        rotation="axis_angle",
        frame="base",
        wrist="wrist_image",
        optional_cameras=("wrist",),
        state=("observation/state[:3]", "axis_angle(observation/state[3:6])", "zeros(1)", "observation/state[6]"),
        state_encoding="POS_EULER",
        control_hz=20,
        shapes={"action": (7,), "observation/state": (8,)},
    )
    for name in NAMES
}
"""By name."""

HDF5 = dataclasses.replace(
    ENTRIES[NAMES[0]],
    name="libero",
    arm=("actions[:6]",),
    gripper="invert(clip(actions[6]))",
    state=("ee_states[:3]", "axis_angle(ee_states[3:6])", "zeros(1)", "gripper_states[0]"),
    shapes={},
)
"""LIBERO's own files, read by `data.libero_hdf5`; the numbers are the same under other names."""

_LEROBOT = (
    ("observation.images.image", "observation.images.image2", "observation.state", "action"),
    ("observation.images.image", "observation.images.wrist_image", "observation.state", "action"),
    ("image", "wrist_image", "state", "actions"),
)
"""How copies as LeRobotDatasets call pictures, pictures of the hand, state and action."""


def lerobot_conventions(features: Collection[str]) -> dict[str, Any]:
    """What the numbers of a LeRobotDataset with LIBERO mean, as fields of its conventions (`lerobot.meaning`).

    Raises ValueError: features of another dataset; lists the known ones.
    """
    whole = [names for names in _LEROBOT if set(names) <= set(features)]
    for static, wrist, state, action in [*whole, *_LEROBOT]:  # a copy may lack the hand's camera
        if {static, state, action} <= set(features):
            return {
                "static": static,
                "wrist": wrist if wrist in features else "",
                "arm": (f"{action}[:6]",),
                "gripper": f"invert(clip({action}[6]))",
                "units": HDF5.units,
                "rotation": HDF5.rotation,
                "frame": HDF5.frame,
                "state": (f"{state}[:3]", f"axis_angle({state}[3:6])", "zeros(1)", f"{state}[6]"),
                "state_encoding": HDF5.state_encoding,
            }
    known = "; ".join(", ".join(names) for names in _LEROBOT)
    raise ValueError(
        f"data.conventions=libero: the dataset has features {sorted(features)}; LIBERO's copies have {known}."
    )
