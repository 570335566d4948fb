"""Improve a PlayTable policy by trying: PPO or GRPO in the embedded simulator, on the device.

    python -m experiments.reinforce --checkpoint runs/playtable_fixtures
    python -m experiments.reinforce --preset grpo --checkpoint runs/playtable_fixtures --out runs/grpo
    python -m experiments.reinforce --preset preferences --checkpoint runs/playtable_fixtures --reward runs/reward

The output is a run directory like any other: experiments.evaluate and experiments.serve take it. report.md there says
how often the policy succeeds before and after on the same trials: as trained, on an unseen table, in unseen words, from
unseen starts. A stopped run goes on with --resume.
"""

from __future__ import annotations

import dataclasses
import logging
import sys

from robovlms_jax import cli
from robovlms_jax.parallel import cpu
from robovlms_jax.rl.config import UpdateConfig
from robovlms_jax.runs import logs, reinforcing
from robovlms_jax.training import stopping

log = logging.getLogger(__name__)

BASE = reinforcing.ReinforceConfig()
PRESETS = {
    "ppo": BASE,
    "grpo": dataclasses.replace(
        BASE, out="runs/reinforce_grpo", update=UpdateConfig(method="grpo"), trainable=("^head/", "^rl/behaviour/")
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
    try:
        log.info("report: %s", reinforcing.run(config))
    except KeyboardInterrupt:
        log.warning("stopped; the same command with --resume goes on from the last saved iteration.")
        sys.exit(stopping.STATUS)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
