"""Record scripted demonstrations in the real CALVIN simulator, in CALVIN's on-disk layout, ready to train on.

    python -m experiments.record_calvin --calvin_root calvin --out data/calvin_scripted --episodes 2000

The experts are PlayTable's; where handles, button and lever are, how far they go and how large the blocks are is read
from the scene's own files. An episode is a chain of tasks, each done in the state the one before it left; every task
that CALVIN's checker calls done is an annotated segment, and only these are rendered. A recording that was stopped
(killed, full disk) goes on when the same command is given again. With --checkpoint a trained policy acts first, and
experts finish what it does not (DAgger). docs/calvin.md says what the simulator needs.
"""

from __future__ import annotations

import logging
import sys

from robovlms_jax import cli, ending
from robovlms_jax.envs import vector
from robovlms_jax.playtable.real import recording
from robovlms_jax.runs import logs


def main() -> None:
    logs.to_stderr()
    config = cli.read(recording.RealRecordConfig, description=__doc__)
    try:
        if config.checkpoint:
            from robovlms_jax.runs import correcting  # a second of imports

            counts = correcting.record_real(config)
        else:
            counts = recording.record(config)
    except KeyboardInterrupt:
        ending.stop_at_once("chains that were recorded are kept, and the same command goes on with the others.")
    except (ValueError, OSError, RuntimeError, ImportError, vector.EnvError) as error:
        sys.exit(f"error: {error}")
    logging.info(
        "recorded %(recorded)d of %(attempted)d demonstrations of both splits, %(frames)d frames, in %(out)s",
        counts | {"out": config.out},
    )


if __name__ == "__main__":
    main()
