"""Tries things out and learns on two devices, and on one with either's share of tables and trials; prints what is
alike. Run by test_learning.py in its own process."""

from __future__ import annotations

import jax
import numpy as np

from robovlms_jax.rl import starts
from robovlms_jax.rl import tables as playing
from tests.rl.test_learning import learner
from tests.rl.test_rollouts import SIZES, encode

HELD = (playing.NAMES.index("open_drawer"),)


def main() -> None:
    trials = starts.draw(("open_drawer", "turn_on_led"), ("A", "D"), 8, seed=0, spread=0.1)
    world = playing.make_world(trials, encode, SIZES["static"])
    how = {"patterns": ("^head/", "^rl/"), "held": HELD, "hold_weight": 1.0, "divergence_stop": 0.0}
    both, one = learner("lstm", sizes=(2, 1, 1), tables=4, **how), learner("lstm", **how)
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 2))[0]  # of the first iteration
    begun = jax.device_get(one.state.params)
    decisions, numbers = both.iterate(world, 0)
    made = jax.tree.map(lambda x: np.asarray(x).reshape(4, 4, *x.shape[1:]), decisions)  # [decision, table]
    alone = jax.jit(one._tried)
    for device in (0, 1):
        share = world.take(np.arange(4) + 4 * device, np.zeros(4))
        outcome, kept = jax.device_get(alone(begun, share, jax.random.fold_in(key, device)))
        columns = slice(2 * device, 2 * device + 2)
        task = np.asarray(share.tasks)[np.maximum(outcome.trial[:4], 0), outcome.position[:4]]
        print(np.array_equal(made.held[:, columns], np.isin(task, HELD)), np.unique(task).size)
        print(np.array_equal(made.mask[:, columns].sum(-1), outcome.steps[:4]))
        pairs = ((made.drawn.actions, kept.drawn.actions), (made.log_prob, kept.log_prob), (made.value, kept.value))
        print(all(np.allclose(a[:, columns], b[:4], atol=1e-5) for a, b in pairs))
    held_by = {len(x.sharding.device_set) for x in both.state.trainable.values()}
    print(len(decisions.mask), int(numbers["updates"]), held_by)
    again = learner("lstm", tables=4, **how)
    again._collect = lambda *arguments: (jax.device_put(jax.device_get(decisions)), {})
    again.iterate(world, 0)
    print(all(np.allclose(x, again.state.trainable[path], atol=1e-5) for path, x in both.state.trainable.items()))


if __name__ == "__main__":
    main()
