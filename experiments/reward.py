"""Learn a reward from answers to "which of two clips is better".

    python -m experiments.reward --labels runs/labels --out runs/reward                       # a person's answers
    python -m experiments.reward --labels runs/labels --out runs/simulated --simulated 2000   # a simulated person's

The output is a directory: an ensemble of rewards. experiments.label --reward asks about what its members disagree on,
and experiments.reinforce --preset preferences --reward improves a policy by it.
"""

from __future__ import annotations

import logging
import sys

from robovlms_jax import cli, ending
from robovlms_jax.runs import logs, rewarding

log = logging.getLogger(__name__)


def main() -> None:
    logs.to_stderr()
    config = cli.read(rewarding.RewardRunConfig, description=__doc__)
    try:
        out, _ = rewarding.learn(config)
    except KeyboardInterrupt:
        ending.stop_at_once(ending.ANEW)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    log.info("the reward: %s", out)


if __name__ == "__main__":
    main()
