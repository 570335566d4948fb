"""Improve a PlayTable policy by trying (PPO, GRPO) in the embedded simulator, on the device, or by answers (DPO).

    python -m experiments.reinforce --checkpoint runs/playtable_fixtures
    python -m experiments.reinforce --preset fixtures --checkpoint runs/playtable_fixtures
    python -m experiments.reinforce --preset grpo --checkpoint runs/playtable_fixtures --out runs/grpo
    python -m experiments.reinforce --preset preferences --checkpoint runs/playtable_fixtures --reward runs/reward
    python -m experiments.reinforce --preset dpo --checkpoint runs/playtable_fixtures --labels runs/labels

The output is a run directory like any other: experiments.evaluate and experiments.serve take it. report.md there says
how often the policy succeeds before and after on the same trials: as trained, on an unseen table, in unseen words, from
unseen starts. A stopped run goes on with --resume.
"""

from __future__ import annotations

import dataclasses
import logging
import sys

from experiments import scripted_presets
from robovlms_jax import cli, ending
from robovlms_jax.parallel import cpu
from robovlms_jax.playtable import scene
from robovlms_jax.rl import starts
from robovlms_jax.rl.config import UNSEEN, ReinforceConfig, UpdateConfig
from robovlms_jax.runs import logs, reinforcing
from robovlms_jax.training import checkpoints, guards

log = logging.getLogger(__name__)

BASE = ReinforceConfig()
# What the embedded default has learned by imitation, improved on many tables at once: six of its tasks are trained, and
# the drawer's two, which are not, are held where they are.
HELD = ("open_drawer", "close_drawer")
FIXTURES = dataclasses.replace(
    BASE,
    out="runs/reinforce_fixtures",
    tasks=tuple(name for name in scripted_presets.FIXTURE_TASKS if name not in HELD),
    others=HELD,
    random_scenes=509,
    unseen_random_scenes=200,
    pool=1024,
    tables=64,
    decisions=64,
    iterations=32,
    behaviour=dataclasses.replace(BASE.behaviour, spread=(0.15,)),
    update=dataclasses.replace(BASE.update, epochs=4, hold_weight=1.0),
    optimizer=dataclasses.replace(BASE.optimizer, learning_rate=1.5e-4),
)
# A policy of the preset of that name, in all tasks that a table at rest allows (a block in the hand needs a task
# before), for one GPU: 65,536 decisions an iteration, 1.9 GiB alive at most while they are made, as traced.
FULL = dataclasses.replace(
    FIXTURES,
    out="runs/reinforce_full",
    tasks=starts.possible(),
    others=(),
    scenes=("A", "B", "C", "D"),
    random_scenes=1020,
    unseen_scene=scene.random_tables(UNSEEN, 1)[0],
    pool=8192,
    tables=1024,
    iterations=200,
    update=dataclasses.replace(FIXTURES.update, minibatches=16, hold_weight=0.0),
)
PRESETS = {
    "ppo": BASE,
    "fixtures": FIXTURES,
    "playtable_full": FULL,
    "grpo": dataclasses.replace(
        BASE,
        out="runs/reinforce_grpo",
        update=UpdateConfig(method="grpo"),
        trainable=("^head/", "^rl/behaviour/"),
        optimizer=dataclasses.replace(BASE.optimizer, rates={}),  # of values, which groups do not have
    ),
    "dpo": dataclasses.replace(
        BASE,
        out="runs/reinforce_dpo",
        update=UpdateConfig(method="dpo", minibatches=16),
        pool=64,
        iterations=10,
        trainable=("^head/",),
        optimizer=dataclasses.replace(BASE.optimizer, rates={}),
    ),
    "preferences": dataclasses.replace(
        BASE,
        out="runs/reinforce_preferences",
        reward="runs/reward",
        update=dataclasses.replace(BASE.update, divergence_weight=0.05),
    ),
}


def main() -> None:
    logs.to_stderr()
    cpu.keep_freed_memory()
    _, config = cli.parse(PRESETS, "ppo", description=__doc__)
    if config.devices > 1:
        cpu.device_per_core()
    try:
        log.info("report: %s", reinforcing.run(config))
    except KeyboardInterrupt:
        ending.stop_at_once(reinforcing.words(config.out))
    except (ValueError, OSError, guards.DivergedError, checkpoints.UnwrittenError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
