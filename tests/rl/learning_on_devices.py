"""Tries things out and learns on two devices, and on one with either's share of tables and trials; prints what is
alike. Run by test_learning.py in its own process."""

from __future__ import annotations

import jax
import numpy as np

from robovlms_jax.rl import starts
from robovlms_jax.rl import tables as playing
from tests.rl.test_learning import learner
from tests.rl.test_rollouts import SIZES, encode


def main() -> None:
    trials = starts.draw(("open_drawer", "turn_on_led"), ("A", "D"), 8, seed=0, spread=0.1)
    world, key = playing.make_world(trials, encode, SIZES["static"]), jax.random.key(7)
    both = learner("lstm", patterns=("^head/", "^rl/"), devices=2, tables=4, divergence_stop=0.0)
    outcome, kept = jax.device_get(jax.jit(both._tried)(both.state.params, world, key))
    one = learner("lstm", patterns=("^head/", "^rl/"), divergence_stop=0.0)
    alone = jax.jit(one._tried)
    for device in (0, 1):
        rows = np.arange(4) + 4 * device
        share = world.take(rows, np.zeros(4))
        own, own_kept = jax.device_get(alone(one.state.params, share, jax.random.fold_in(key, device)))
        played = np.where(own.trial >= 0, own.trial + 4 * device, -1)
        columns = slice(2 * device, 2 * device + 2)
        print(np.array_equal(outcome.trial[:, columns], played), np.array_equal(outcome.steps[:, columns], own.steps))
        pairs = zip(jax.tree.leaves(kept), jax.tree.leaves(own_kept), strict=True)
        print(all(np.allclose(a[:, columns], b, atol=1e-5) for a, b in pairs))
    decisions, numbers = both.iterate(world, 0)
    print(
        len(decisions.mask),
        int(numbers["updates"]),
        {len(x.sharding.device_set) for x in both.state.trainable.values()},
    )
    again = learner("lstm", patterns=("^head/", "^rl/"), tables=4, divergence_stop=0.0)
    again._collect = lambda *arguments: (jax.device_put(jax.device_get(decisions)), {})
    again.iterate(world, 0)
    print(all(np.allclose(x, again.state.trainable[path], atol=1e-5) for path, x in both.state.trainable.items()))


if __name__ == "__main__":
    main()
