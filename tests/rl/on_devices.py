"""Plays the same trials on one device and on two; prints what differs. Run by test_rollouts.py in its own process."""

from __future__ import annotations

import jax
import numpy as np

from robovlms_jax.control.execution import Execution
from robovlms_jax.evaluation import rollout
from robovlms_jax.rl import rollouts
from tests import toy
from tests.rl.test_rollouts import SIZES, encode, trials


def main() -> None:
    model = toy.make_model(history="policy_head", window=2, chunk=3)
    params = toy.random_params(model, toy.make_batch(np.random.default_rng(0), window=2, windows=1, chunk=3))
    how = Execution("receding", horizon=2), rollout.SuccessCriterion(max_steps=6)
    asked, found = trials(("open_drawer", "turn_on_led"), 5), []
    for count in (1, 2):
        player = rollouts.Player(model, encode, 4, SIZES, *how, jax.devices()[:count])
        results = list(player.results(params, asked))
        print(player.shards, len(results), player._run._cache_size())
        found.append(sorted(results, key=lambda result: result.index))
    print(found[0] == found[1])
    print(rollouts.Player(model, encode, 3, SIZES, *how).shards)  # three tables do not divide


if __name__ == "__main__":
    main()
