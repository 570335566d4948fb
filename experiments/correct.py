"""Corrections of a policy on PlayTable (DAgger): a scripted expert takes over where the policy has got to.

    python -m experiments.correct --checkpoint runs/playtable_fixtures --out data/corrections
    python -m experiments.calvin_abcd --init_from runs/playtable_fixtures --out runs/corrected \\
        --data.further.roots corrections data/corrections --train.sources robot 0.5 corrections 0.5

What is recorded has the layout of demonstrations; training draws from both. A recording that was stopped goes on when
the same command is given again.
"""

from __future__ import annotations

import logging
import sys

from robovlms_jax import cli, ending
from robovlms_jax.runs import correcting, logs

log = logging.getLogger(__name__)


def main() -> None:
    logs.to_stderr()
    config = cli.read(correcting.CorrectionConfig, description=__doc__)
    try:
        counts = correcting.record(config)
    except KeyboardInterrupt:
        ending.stop_at_once("takeovers that were recorded are kept, and the same command goes on with the others.")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    log.info(
        "recorded %(recorded)d of %(attempted)d takeovers, %(frames)d frames, in %(out)s", counts | {"out": config.out}
    )


if __name__ == "__main__":
    main()
