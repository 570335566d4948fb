"""Tries things out and learns with parameters that are split over two devices, and with whole ones; prints what is
alike. Run by test_meshes.py in its own process. Its argument: fsdp, tensor or answers.

A drifting hand stands for the mechanics, whose program takes minutes to compile; with those of the tables,
learning_on_devices.py plays.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.rl import direct, learning, segments, starts
from robovlms_jax.rl import tables as playing
from robovlms_jax.training import checkpoints
from tests.labeling.made_up import rollouts
from tests.rl import test_direct
from tests.rl.test_learning import learner
from tests.rl.test_rollouts import SIZES, encode

HOW = {"patterns": ("lora_", "^head/", "^rl/"), "tables": 4, "divergence_stop": 0.0}
Learner = learning.Reinforcement | direct.DirectPreferences


def drift(scenes: Any, states: bodies.State, actions: jax.Array) -> bodies.State:
    """As `physics.step_tables`: where the actions say, in a loop that on each device ends when its own tables are done.
    Nobody may wait in there for another device."""

    def further(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return at[0] + 1, at[1] + 0.004 * actions[:, :3]

    wanted = (1000 * jnp.abs(states.position).max()).astype(jnp.int32) % 7
    _, position = jax.lax.while_loop(lambda at: at[0] <= wanted, further, (jnp.int32(0), states.position))
    return dataclasses.replace(states, position=position)


def by_fsdp() -> None:
    """Two copies against two halves, both with two tables for each device; the halves go on elsewhere."""
    split = compare((2, 1, 1), (1, 2, 1))
    begun = learner("adapters", **HOW)
    print("bytes", held(split.state.frozen) < 0.6 * held(begun.state.frozen))
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoints.Checkpointer(pathlib.Path(folder), keep=1, serving={"config": {}, "assets": {}})
        saver.save(split.state, {})
        saver.wait()
        elsewhere, _ = saver.restore(begun.state)
        saver.close()
    both = [(state.trainable, state.opt_state) for state in (split.state, elsewhere)]
    print("restored", alike(*both, 0.0), not alike(begun.reference, elsewhere.trainable, 0.0))


def by_tensor() -> None:
    """One device against two that split products: they play the same four tables with the same draws."""
    split = compare((1, 1, 1), (1, 1, 2))
    print("bytes", held(split.state.frozen) < 0.8 * held(learner("adapters", **HOW).state.frozen))


def compare(*sizes: tuple[int, int, int]) -> learning.Reinforcement:
    """An iteration with whole parameters and one with split ones; returns the latter."""
    trials = starts.draw(("open_drawer", "turn_on_led"), ("A", "D"), 8, seed=0, spread=0.1)
    world = playing.make_world(trials, encode, SIZES["static"])
    whole, split = (learner("adapters", sizes=each, **HOW) for each in sizes)
    made, same = (own.iterate(world, 0)[0] for own in (whole, split))
    drawn = alike((made.drawn, made.log_prob, made.reference), (same.drawn, same.log_prob, same.reference))
    print("iteration", drawn, alike(whole.state.trainable, split.state.trainable), halved(split) > 4)
    return split


def by_answers() -> None:
    """Pairs of made-up rollouts: one device, and two that split parameters, either way."""
    drawn = np.random.default_rng(0).normal(0, 0.1, (8, 3, 7)).astype(np.float32)
    drawn[..., 6] = 1.0
    found = rollouts((4, 3, 4, 4), ("open_drawer",) * 4)
    found = dataclasses.replace(found, decided=segments.Decided(2, {"actions": drawn}))
    pieces = direct.Pieces(np.array([[0, 1], [2, 3]]), np.zeros((2, 2), int), np.full((2, 2), 3), np.array([1.0, 0.0]))
    whole = None
    for sizes in ((1, 1, 1), (1, 2, 1), (1, 1, 2)):
        own = test_direct.learner("adapters", ("lora_", "^head/"), sizes=sizes)
        known = own.known(found, encode, playing.Play(tuple(SIZES.items()), 2, 4), 4)
        compared = direct.Comparisons(pieces, known, found.decisions(2), 2, 15, np.array([False, False]))
        losses = [own.iterate(compared, number)[1]["loss"] for number in (0, 1)]
        answers = own.answers(compared, np.arange(2), 2)
        one = known.log_prob, losses, answers, own.state.trainable
        whole = one if whole is None else whole
        print(sizes, alike(whole, one), losses[1] < losses[0], halved(own) > 4)


def halved(own: Learner) -> int:
    """Arrays of what is trained and of the optimizer's that do not lie whole on every device."""
    lies = [x.sharding for x in jax.tree.leaves((own.state.trainable, own.state.opt_state))]
    return sum(not place.is_fully_replicated for place in lies)


def alike(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    """Whether all leaves are."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, atol=tolerance, rtol=tolerance) for x, y in pairs)


def held(tree: Any) -> int:
    """Bytes of arrays on the first device."""
    first = jax.devices()[0]
    shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


if __name__ == "__main__":
    playing.physics.step_tables = drift
    {"fsdp": by_fsdp, "tensor": by_tensor, "answers": by_answers}[sys.argv[1]]()
