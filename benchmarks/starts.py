"""Random starts for PlayTable's benchmarks and tests, and which tasks make sense there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.envs.calvin import initial_states
from robovlms_jax.playtable.experts import cases, plans
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.scene import BLOCKS, DRAWER, SHELF_TOP_M, SLIDER, TABLE_TOP_M, Scene
from robovlms_jax.types import Array

_APART_M = 0.1  # between blocks that a random start puts on the table
_SHELF_Y_M = 0.0924
_START_NOISE = np.array([0.04, 0.04, 0.03, 0.0, 0.0, 0.1], np.float32)  # m and rad


def sample(scene: Scene, key: Array) -> tuple[Array, Array]:
    """A random start: robot_obs float32[15] near CALVIN's initial pose, scene_obs float32[24].

    Mechanisms are at either end, lamps on or off; each block is on the table (at any place of the starting area, at
    least one of them), or alone in one half of the shelf.
    """
    keys = jax.random.split(key, 6)
    ends = jax.random.bernoulli(keys[0], shape=(4,))
    slider, drawer, switch = (jnp.where(ends[i], scene.joint_range[j], 0.0) for i, j in ((0, 0), (1, 1), (2, 3)))
    # places 0 and 1 are the halves of the shelf, 2 and up are the table: no half can be drawn twice
    places = jax.random.permutation(keys[1], 5)[:3]
    low, high = scene.anchors.area.T
    candidates = jax.random.uniform(keys[2], (64, 2), minval=low, maxval=high)
    spots = jnp.zeros((0, 2))
    for _ in range(3):  # the first candidate that keeps its distance
        apart = jnp.linalg.norm(candidates[:, None] - spots, axis=-1).min(-1, initial=jnp.inf)
        spots = jnp.concatenate([spots, candidates[jnp.argmax(apart > _APART_M)][None]])
    shelf = jnp.stack([scene.anchors.shelf.mean(1), jnp.full(2, _SHELF_Y_M)], axis=-1)
    on_table = places[:, None] >= 2
    xy = jnp.where(on_table, spots, shelf[jnp.minimum(places, 1)])
    z = jnp.where(on_table, TABLE_TOP_M, SHELF_TOP_M) + 0.02
    yaw = jnp.pi / 2 + jax.random.uniform(keys[3], (3,), minval=-jnp.pi / 4, maxval=jnp.pi / 4)
    blocks = jnp.concatenate([xy, z, jnp.zeros((3, 2)), yaw[:, None]], axis=-1)[jnp.argsort(scene.block_slot)]
    lamps = jnp.stack([ends[2], ends[3]]).astype(jnp.float32)
    scene_obs = jnp.concatenate([jnp.stack([slider, drawer, 0.0, switch]), lamps, blocks.reshape(-1)])
    noise = jax.random.uniform(keys[4], (6,), minval=-1.0, maxval=1.0) * _START_NOISE
    robot_obs = jnp.asarray(initial_states.INITIAL_ROBOT_OBS, jnp.float32).at[:6].add(noise)
    return robot_obs, scene_obs


def possible(scene: Scene, state: bodies.State) -> Array:
    """bool[34] in the order of `plans.TASKS`: which tasks make sense now, for drawing what to demonstrate next.

    Says nothing about luck: an expert may still fail, say by pushing a block against another.
    """
    slider, drawer, _, _ = state.mechanisms
    empty, lit, led = state.held < 0, bodies.bulb(state) > 0, state.led > 0
    bare = ~jnp.any(state.support[:, None] == cases.BLOCK_SUPPORT + jnp.arange(3), axis=0)  # nothing stands on it
    open_drawer = drawer > 0.12
    reachable = {
        "table": cases.stands_on_table(state) & bare,
        "slider": cases.stands_on("shelf", state) & bare,
        "drawer": cases.stands_on("drawer", state) & bare & open_drawer & (state.block_position[:, 1] < -0.2),
    }
    travel = scene.joint_range
    now = {
        "move_slider_left": empty & (travel[SLIDER] - slider > 0.16),
        "move_slider_right": empty & (slider > 0.16),
        "open_drawer": empty & (travel[DRAWER] - drawer > 0.13),
        "close_drawer": empty & (drawer > 0.13),
        "place_in_slider": ~empty,
        "place_in_drawer": ~empty & open_drawer,
        "stack_block": ~empty & jnp.any(reachable["table"]),
        "unstack_block": empty & jnp.any(state.support >= cases.BLOCK_SUPPORT),
        "turn_on_lightbulb": empty & ~lit,
        "turn_off_lightbulb": empty & lit,
        "turn_on_led": empty & ~led,
        "turn_off_led": empty & led,
        "push_into_drawer": empty & open_drawer & jnp.any(reachable["table"]),
    }
    for i, color in enumerate(BLOCKS):
        for task in plans.TASKS:
            verb, *words = task.split("_")
            if words[:2] == [color, "block"]:
                place = words[2] if verb == "lift" else "table"
                now[task] = empty & reachable[place][i]
    return jnp.stack([now[task] for task in plans.TASKS])
