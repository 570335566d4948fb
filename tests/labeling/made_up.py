"""Rollouts of a hand that goes its own way over an untouched table, without a simulator."""

from __future__ import annotations

import numpy as np

from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.scene import neutral_scene_obs
from robovlms_jax.rl.segments import Rollouts


def states(positions: np.ndarray, mechanisms: np.ndarray | None = None) -> bodies.State:
    """A state for each of float[T, 3] positions of the hand, and of float[T, 4] mechanisms."""
    count = len(positions)
    blocks = neutral_scene_obs("A")[6:].reshape(3, 6)[:, :3]

    def every(x, dtype=np.float32):
        return np.broadcast_to(np.asarray(x, dtype), (count, *np.shape(x))).copy()

    return bodies.State(
        position=np.asarray(positions, np.float32),
        rotation=every(np.eye(3)),
        target_position=np.asarray(positions, np.float32),
        target_euler=every(np.zeros(3)),
        width=every(0.08),
        command=every(1.0),
        joints=every(np.zeros(7)),
        mechanisms=np.zeros((count, 4), np.float32) if mechanisms is None else np.asarray(mechanisms, np.float32),
        led=every(0.0),
        block_position=every(blocks),
        block_rotation=every(np.tile(np.eye(3), (3, 1, 1))),
        block_velocity=every(np.zeros((3, 6))),
        held=every(-1, np.int32),
        hold_position=every(np.zeros(3)),
        hold_rotation=every(np.eye(3)),
        support=every(np.full(3, -1), np.int32),
    )


def rollouts(lengths=(12, 7, 12, 20), tasks=("open_drawer", "turn_on_led") * 2, success=()) -> Rollouts:
    """Of so many control steps each, tables A and B in turn."""
    path = np.concatenate([np.linspace(0, 0.01 * n, n + 1)[:, None] * np.ones(3) for n in lengths])
    done = np.zeros(len(lengths), bool)
    done[list(success)] = True
    return Rollouts(
        tuple("AB"[i % 2] for i in range(len(lengths))),
        tuple(tasks),
        tuple(f"do {task}" for task in tasks),
        done,
        np.cumsum([0, *(n + 1 for n in lengths)]),
        states(path),
    )
