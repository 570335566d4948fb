"""What PlayTable's experts are tried on: CALVIN's chains, and single tasks from random starts that allow them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import starts
from robovlms_jax.envs.calvin import initial_states, task_chains
from robovlms_jax.playtable import env
from robovlms_jax.playtable.experts import plans
from robovlms_jax.playtable.mechanics import bodies, contacts, physics, pushing
from robovlms_jax.playtable.scene import (
    BLOCKS,
    BUTTON,
    DRAWER,
    DRAWER_FLOOR_M,
    SCENES,
    SLIDER,
    SWITCH,
    Scene,
    stack_scenes,
)

_CANDIDATES = 32  # random starts to choose from
_LIFTS = tuple(plans.TASKS.index(f"lift_{color}_block_table") for color in BLOCKS)
_IN_HAND = ("place_in_slider", "place_in_drawer", "stack_block")


class Trial(NamedTuple):
    """Task numbers to do in a row in scene number `scene`, from robot_obs float[15] and scene_obs float[24]."""

    scene: int
    tasks: tuple[int, ...]
    robot_obs: np.ndarray
    scene_obs: np.ndarray


def chain_trials(chains: Sequence[task_chains.Chain], scene: str) -> list[Trial]:
    return [
        Trial(
            SCENES.index(scene),
            tuple(map(plans.TASKS.index, chain.tasks)),
            *initial_states.initial_state(chain.condition, scene),
        )
        for chain in chains
    ]


def random_trials(names: Sequence[str], scenes: Sequence[str], count: int, seed: int) -> list[Trial]:
    """`count` trials of each task, from states in which it is possible."""
    wanted = [(scenes[i % len(scenes)], name) for name in names for i in range(count)]
    which = np.array([SCENES.index(scene) for scene, _ in wanted])
    numbers = np.array([plans.TASKS.index(name) for _, name in wanted])
    keys = jax.random.split(jax.random.key(seed), len(wanted))
    robot, table, lead, found = map(np.asarray, _draw_all(stack_scenes(SCENES), which, numbers, keys))
    missing = sorted({wanted[i] for i in np.flatnonzero(~found)})
    if missing:
        raise RuntimeError(f"no start found in which these are possible: {missing}; try another seed.")
    leads = [(int(first),) if first >= 0 else () for first in lead]
    return [Trial(*row) for row in zip(which, ((*a, int(b)) for a, b in zip(leads, numbers)), robot, table)]


@jax.jit
def _draw_all(scenes: Scene, which: jax.Array, numbers: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
    def one(args):
        i, number, key = args
        return _draw(env.pick(scenes, i), number, key)

    return jax.lax.map(one, (which, numbers, keys))


def _draw(scene: Scene, number: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
    """A start in which task `number` is possible: robot_obs, scene_obs, the lift to begin with (-1 none), and whether
    one was found."""
    first, *keys = jax.random.split(key, 1 + _CANDIDATES)
    robot, _ = starts.sample(scene, first)
    tables, lead, fits = jax.vmap(lambda key: _candidate(scene, number, robot, key))(jnp.stack(keys))
    best = jnp.argmax(fits)
    return robot, tables[best], lead[best], fits[best]


def _candidate(scene: Scene, number: jax.Array, robot: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
    """A random table, set up for the task as far as `starts.sample` leaves it to chance."""
    keys = jax.random.split(key, 4)
    _, table = starts.sample(scene, keys[0])
    ends = jnp.asarray(_MECHANISMS)[number]  # of slider, drawer, button and switch
    table = table.at[:4].set(jnp.where(jnp.isnan(ends), table[:4], ends * scene.joint_range))
    led = jnp.asarray(_LED)[number]
    table = table.at[5].set(jnp.where(jnp.isnan(led), table[5], led))

    blocks = table[6:].reshape(3, 6)[scene.block_slot]  # red, blue, pink
    # inside an open drawer, clear of the table's edge
    low, high = jnp.array([-0.1, -0.34]), jnp.array([0.1, -0.25])
    x, y = jax.random.uniform(keys[1], (2,), minval=low, maxval=high)
    spot = jnp.stack([x + scene.anchors.drawer_handle[0], y])
    in_drawer = jnp.asarray(_LIFTED_FROM_DRAWER)[number][:, None]
    there = jnp.concatenate([spot, jnp.array([DRAWER_FLOOR_M + 0.02]), blocks[0, 3:]])
    blocks = jnp.where(in_drawer, there, blocks)
    lower, upper = jax.random.permutation(keys[2], 3)[:2]
    stacked = number == plans.TASKS.index("unstack_block")
    on_top = blocks[lower].at[2].add(0.04).at[5].set(blocks[upper, 5])
    blocks = blocks.at[upper].set(jnp.where(stacked, on_top, blocks[upper]))
    table = table.at[6:].set(blocks[jnp.argsort(scene.block_slot)].reshape(-1))

    state = physics.reset(scene, robot, table)
    possible = starts.possible(scene, state)
    color = jax.random.randint(keys[3], (), 0, len(BLOCKS))
    lead = jnp.where(jnp.asarray(_FROM_HAND)[number], jnp.asarray(_LIFTS)[color], -1)
    others = jnp.arange(3) != color
    on_table = jnp.any(possible[jnp.asarray(_LIFTS)] & others)
    can = jnp.where(number == plans.TASKS.index("stack_block"), on_table, True)
    fits = jnp.where(lead >= 0, possible[lead] & can, possible[number] & _has_room(scene, state, number))
    fits &= ~stacked | (blocks[lower, 1] < 0)  # on the table: nobody stacks in the shelf
    return table, lead, fits & (pushing.touching(scene, state).depth.max() < contacts.TOLERANCE_M)


def _has_room(scene: Scene, state: bodies.State, number: jax.Array) -> jax.Array:
    """Is the way of a push free, and does it stay on the table? Other tasks: True."""
    way = jnp.asarray(_PUSHED)[number]  # [3], +1 right
    free = True
    for share in np.linspace(0.25, 1.0, 4):
        moved = dataclasses.replace(state, block_position=state.block_position.at[:, 0].add(share * 0.13 * way))
        free &= pushing.touching(scene, moved).depth[-3:].max() < contacts.TOLERANCE_M
        free &= jnp.all((way == 0) | (jnp.abs(moved.block_position[:, 0]) < 0.40))
    return free


def _setup() -> tuple[np.ndarray, ...]:
    """Per task number: where mechanisms [4] and LED are to begin (0 or 1 of their range; NaN leaves them), whether it
    begins with a block in the hand, the block lifted from the drawer bool[3], the block pushed int[3] (+1 right)."""
    count = len(plans.TASKS)
    mechanisms, led = np.full((count, 4), np.nan, np.float32), np.full(count, np.nan, np.float32)
    drawer, pushed = np.zeros((count, 3), bool), np.zeros((count, 3), np.int32)
    for name, (joint, end) in {
        "move_slider_left": (SLIDER, 0),
        "move_slider_right": (SLIDER, 1),
        "open_drawer": (DRAWER, 0),
        "close_drawer": (DRAWER, 1),
        "place_in_drawer": (DRAWER, 1),
        "push_into_drawer": (DRAWER, 1),
        "turn_on_lightbulb": (SWITCH, 0),
        "turn_off_lightbulb": (SWITCH, 1),
    }.items():
        mechanisms[plans.TASKS.index(name), joint] = end
    mechanisms[:, BUTTON] = 0
    for i, name in enumerate(plans.TASKS):
        verb, *words = name.split("_")
        if name.endswith("_led"):
            led[i] = words[0] == "off"
        elif words[0] in BLOCKS and words[-1] == "drawer":
            drawer[i, BLOCKS.index(words[0])], mechanisms[i, DRAWER] = True, 1
        elif verb == "push" and words[0] in BLOCKS:
            pushed[i, BLOCKS.index(words[0])] = 1 if words[-1] == "right" else -1
    return mechanisms, led, np.isin(plans.TASKS, _IN_HAND), drawer, pushed


_MECHANISMS, _LED, _FROM_HAND, _LIFTED_FROM_DRAWER, _PUSHED = _setup()
