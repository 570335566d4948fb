"""The four LIBERO sets without idle steps, as OpenVLA publishes them (openvla/modified_libero_rlds on Hugging Face).

The action is what robosuite's OSC_POSE controller takes at 20 Hz: 1.0 moves 0.05 m or turns 0.5 rad (as a rotation
vector) about the axes of the robot's base; the gripper's command is -1 to open, +1 to close. The state is xyz, a
rotation vector and the places of two fingers that mirror each other (0.04 m open, 0 closed).
"""

from __future__ import annotations

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
