"""Fetch a shared policy from the Hugging Face hub into a directory, which is then a run directory like others.

    python -m experiments.pull --name me/my-policy --out runs/my_policy

Programs that take --checkpoint also take hf://me/my-policy itself; it then lies in Hugging Face's cache.
"""

from __future__ import annotations

import dataclasses
import sys

from robovlms_jax import cli, ending
from robovlms_jax.runs import logs, sharing


@dataclasses.dataclass(frozen=True)
class PullConfig:
    """What to fetch, and where to."""

    name: str
    """OWNER/NAME on the hub, or OWNER/NAME@REVISION: a branch, tag or commit."""
    out: str
    """Directory to write; new or empty."""


def main() -> None:
    """Errors of the user end the process with a message and status 1."""
    logs.to_stderr()
    config = cli.read(PullConfig, description=__doc__)
    try:
        run = sharing.pull(config.name, config.out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    ending.show(f"{run}: robovlms serve --checkpoint {run}, or load_policy({str(run)!r})")


if __name__ == "__main__":
    main()
