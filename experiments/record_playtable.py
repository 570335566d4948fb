"""Record scripted demonstrations on PlayTable in CALVIN's on-disk layout, ready to train on.

    python -m experiments.record_playtable --episodes 2000 --out data/playtable

An episode is a chain of tasks, each done in the state the one before it left, as a person would play; every task that
the checker calls done is an annotated segment. Training scenes and validation scene differ, and so do their phrasings.
A recording that was stopped (killed, full disk) goes on when the same command is given again.
"""

from __future__ import annotations

import logging
import sys

from robovlms_jax import cli, ending
from robovlms_jax.playtable import recording
from robovlms_jax.runs import logs


def main() -> None:
    logs.to_stderr()
    config = cli.read(recording.RecordConfig, description=__doc__)
    try:
        counts = recording.record(config)
    except KeyboardInterrupt:
        ending.stop_at_once("chains that were recorded are kept, and the same command goes on with the others.")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    logging.info(
        "recorded %(recorded)d of %(attempted)d demonstrations of both splits, %(frames)d frames, in %(out)s",
        counts | {"out": config.out},
    )


if __name__ == "__main__":
    main()
