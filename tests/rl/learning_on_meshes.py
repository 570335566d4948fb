"""Tries things out and learns with parameters that are split over two devices, and with whole ones; prints what is
alike. Run by test_learning.py in its own process."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from robovlms_jax.rl import learning, starts
from robovlms_jax.rl import tables as playing
from robovlms_jax.training import checkpoints
from tests.rl.test_learning import learner
from tests.rl.test_rollouts import SIZES, encode

HOW = {"patterns": ("lora_", "^head/", "^rl/"), "tables": 4, "divergence_stop": 0.0}


def main() -> None:
    trials = starts.draw(("open_drawer", "turn_on_led"), ("A", "D"), 8, seed=0, spread=0.1)
    world = playing.make_world(trials, encode, SIZES["static"])
    split = compare("fsdp", world, (2, 1, 1), (1, 2, 1))
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


def compare(name: str, world: playing.World, *sizes: tuple[int, int, int]) -> learning.Reinforcement:
    """An iteration with whole parameters and one with split ones; returns the latter."""
    whole, split = (learner("adapters", sizes=each, **HOW) for each in sizes)
    made, same = (own.iterate(world, 0)[0] for own in (whole, split))
    drawn = alike((made.drawn, made.log_prob, made.reference), (same.drawn, same.log_prob, same.reference))
    lies = [x.sharding for x in jax.tree.leaves((split.state.trainable, split.state.opt_state))]
    halved = sum(not place.is_fully_replicated for place in lies) > 10
    print(name, drawn, alike(whole.state.trainable, split.state.trainable), halved)
    return split


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
    main()
