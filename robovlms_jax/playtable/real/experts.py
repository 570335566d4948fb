"""PlayTable's scripted experts on the real simulator's tables: its readings become the state that they plan from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robovlms_jax.actions import rotations
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable.experts import cases, plans
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.real.geometry import Geometry
from robovlms_jax.playtable.scene import BOX_BODY

_ROBOT = tasks.BODIES.index("robot")
_IN_HAND_M = (0.03, 0.04, 0.05)  # how far along the tool's axes the centre of a held block may lie


def plan(geometry: Geometry, situation: Mapping[str, Any], task: str, seed: int) -> tuple[np.ndarray, ...]:
    """The fields of `envs.calvin.walking.Plan` for a task, from where `Stage.situation` says that everything is."""
    state = state_of(geometry, situation)
    return tuple(jax.device_get(_plan(geometry, state, np.int32(plans.TASKS.index(task)), np.uint32(seed))))


@functools.partial(cpu.jit, kind="tiny_run_once")  # compiled in a third of the time
def _plan(geometry: Any, state: bodies.State, task: Any, seed: Any) -> Any:
    return plans.plan(geometry, state, task, jax.random.key(seed))


def state_of(geometry: Geometry, situation: Mapping[str, Any]) -> bodies.State:
    """NumPy. What PlayTable knows of its own blocks (which is held, what each stands on) is told by contacts here."""
    robot, table = (np.asarray(situation[name], np.float64) for name in ("robot_obs", "scene_obs"))
    rotation = rotations.from_euler(robot[3:6])
    position = np.asarray(situation["block_position"], np.float64)
    turned = rotations.from_quaternion(np.asarray(situation["block_rotation"], np.float64))
    contacts = np.asarray(situation["contacts"])
    in_hand = (position - robot[:3]) @ rotation
    held = _held(contacts, in_hand, closed=robot[14] < 0)
    which = max(held, 0)
    numbers = {
        "position": robot[:3],
        "rotation": rotation,
        "target_position": situation["target_position"],
        "target_euler": situation["target_euler"],
        "width": robot[6],
        "command": robot[14],
        "joints": robot[7:14],
        "mechanisms": np.clip(table[:4], 0.0, geometry.joint_range),
        "led": table[5],
        "block_position": position,
        "block_rotation": turned,
        "block_velocity": np.zeros((len(position), 6)),
        "hold_position": in_hand[which] if held >= 0 else np.zeros(3),
        "hold_rotation": rotation.T @ turned[which] if held >= 0 else np.eye(3),
    }
    support = np.array([_support(contacts, position, block, held) for block in range(len(position))], np.int32)
    floats = {name: np.asarray(value, np.float32) for name, value in numbers.items()}
    return bodies.State(**floats, held=np.int32(held), support=support)


def _held(contacts: np.ndarray, in_hand: np.ndarray, *, closed: bool) -> int:
    """Number of the block between the closed fingers; -1: none. in_hand: float[3, 3], blocks in the tool's frame."""
    touched = contacts[1 : 1 + len(in_hand), _ROBOT] & (np.abs(in_hand) < _IN_HAND_M).all(-1)
    if not closed or not touched.any():
        return bodies.FREE
    return int(np.argmin(np.where(touched, np.linalg.norm(in_hand, axis=-1), np.inf)))


def _support(contacts: np.ndarray, position: np.ndarray, block: int, held: int) -> int:
    """What `bodies.State.support` says of a block: a lower block that it touches, else the first part of the table."""
    if block == held:
        return bodies.FREE
    row, count = contacts[1 + block], len(position)
    below = [b for b in range(count) if row[1 + b] and position[block, 2] > position[b, 2] + 0.02]
    if below:
        return cases.BLOCK_SUPPORT + below[0]
    for body in ("shelf", "drawer", "base", "door", "button", "switch"):
        if row[tasks.BODIES.index(body)]:
            return int(np.flatnonzero(np.isin(BOX_BODY, tasks.BODIES.index(body)))[0])
    return bodies.FREE
