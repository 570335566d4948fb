"""Skills for drawer, sliding door, button and lever: the waypoints of each task from the corridor on."""

from __future__ import annotations

import jax.numpy as jnp

from robovlms_jax.actions import rotations
from robovlms_jax.playtable.experts import cases, waypoints
from robovlms_jax.playtable.experts.cases import Case, Step
from robovlms_jax.playtable.scene import DRAWER, LEAN, SLIDER, SWITCH
from robovlms_jax.types import Array

_LEVER_TILT_RAD = -0.33


def drawer(case: Case) -> list[Step]:
    """side +1: hook the bar from behind and pull; -1: push it from the front."""
    x, bar, z = case.scene.anchors.drawer_handle
    x, bar = x + 0.06 * case.noise[0], bar - case.state.mechanisms[DRAWER]
    rear, front = bar + 0.015 + cases.FINGER_M + 0.006, bar - 0.015 - cases.FINGER_M - 0.02
    opened = case.state.mechanisms[DRAWER]
    end = jnp.where(case.side > 0, rear - (0.25 - opened), front + opened + 0.03)
    y = jnp.where(case.side > 0, rear, front)
    down = cases.angles(cases.DOWN_RAD[2])
    z = z + 0.005 + 0.004 * case.noise[1]
    return [
        Step(cases.at(x, y, case.height), down, waypoints.CLOSED),
        Step(cases.at(x, y, z), down, waypoints.CLOSED, 2),
        Step(cases.at(x, end, z), down, waypoints.CLOSED, 3, 0.7),
        Step(cases.at(x, end, case.height), down, waypoints.CLOSED),
    ]


def slider(case: Case) -> list[Step]:
    """side +1: push the handle to the left, from its right; -1: the other way."""
    return slide_door(case, case.side > 0, True)


def slide_door(case: Case, to_left: Array, use: Array | bool) -> list[Step]:
    """Push the door's handle to the left or right end, also with a block in the hand. use: False leaves it all out."""
    x, y, z = case.scene.anchors.slider_handle
    travel, now = case.scene.joint_range[SLIDER], case.state.mechanisms[SLIDER]
    side = jnp.where(to_left, 1.0, -1.0)
    holds = case.state.held >= 0
    gap = side * (0.021 + cases.PAIR_M + jnp.where(holds, case.state.width / 2, 0.0))
    # Going right, the hand turns round beyond the handle: who turns too early must still be past it.
    clear = jnp.where(to_left, 0.025, 0.055)
    begin = x - now + gap + side * (clear + 0.008 * case.noise[0])
    end = x - jnp.where(to_left, travel + 0.012, -0.012) + gap
    down = cases.angles(cases.DOWN_RAD[2] + 0.05 * case.noise[1])
    y, z = y - 0.036, z - 0.04 + 0.008 * case.noise[2]
    return [
        Step(cases.at(begin, cases.CORRIDOR_M, case.height), down, waypoints.CLOSED, use=use),
        Step(cases.at(begin, y, z), down, waypoints.CLOSED, 2, use=use),
        Step(cases.at(end, y, z), down, waypoints.CLOSED, 3, 0.8, use=use),
        Step(cases.at(end + 0.5 * gap, cases.CORRIDOR_M, z), down, waypoints.CLOSED, use=use),
        Step(cases.at(end + 0.5 * gap, cases.CORRIDOR_M, case.height), down, waypoints.CLOSED, use=use),
    ]


def led(case: Case) -> list[Step]:
    """Press the button: on and off are one movement."""
    x, y, z = case.scene.anchors.button_top
    x, y = x + 0.01 * case.noise[0], y + 0.01 * case.noise[1]
    down = cases.angles(cases.DOWN_RAD[2] + 0.1 * case.noise[2])
    return [
        Step(cases.at(x, y, z + 0.06), down, waypoints.CLOSED, 1),
        Step(cases.at(x, y, z + cases.TIP_M - 0.03), down, waypoints.CLOSED, 2, 0.6),
        Step(cases.at(x, y, case.height), down, waypoints.CLOSED),
    ]


def lightbulb(case: Case) -> list[Step]:
    """side +1: push the lever's bar up along the cabinet's front; -1: press it down from above."""
    at, on = case.state.mechanisms[SWITCH], case.side > 0
    lean = jnp.asarray(LEAN, jnp.float32)
    handle = case.scene.anchors.switch_handle
    far = handle[0] > 0  # at the right end of the table only a hand that leans back reaches the lever, at its near end
    half = case.scene.anchors.switch_half
    x = jnp.where(far, 0.033 - half, 0.0) + 0.32 * half * case.noise[0]
    bar = handle + lean * at + cases.at(x, 0.0, 0.0)
    yaw = jnp.where(far, 1.3, cases.DOWN_RAD[2]) + 0.05 * case.noise[1]
    angles = cases.angles(yaw, jnp.where(on, _LEVER_TILT_RAD, -0.5))
    # half extent of the bar along either direction: 0.021 m
    front, _, out = rotations.from_euler(angles).T
    below, above = bar - front * (0.021 + cases.FINGER_M + 0.012), bar - out * (0.021 + cases.TIP_M + 0.012)
    start, into = jnp.where(on, below, above), jnp.where(on, front, out)
    # Deep behind the bar, for the same reason: who turns early must still come down on it, not before it.
    start = start.at[1].add(jnp.where(on, 0.0, 0.03))
    touch = start + 0.016 * into
    end = touch + lean * jnp.where(on, 0.108 - at, -0.02 - at)
    return [
        Step(cases.at(start[0], cases.CORRIDOR_M, start[2] + 0.01), angles, waypoints.CLOSED),
        Step(start, angles, waypoints.CLOSED, 2),
        Step(touch, angles, waypoints.CLOSED, 0, 0.6),
        Step(end, angles, waypoints.CLOSED, 3, 0.6),
        Step(cases.at(end[0], cases.CORRIDOR_M, end[2] + 0.02), angles, waypoints.CLOSED),
    ]
