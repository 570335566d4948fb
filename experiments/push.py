"""Share a policy on the Hugging Face hub, with a card that says what was measured.

    python -m experiments.push --checkpoint runs/mine --repository me/my-policy --licence apache-2.0 --show   # the card
    python -m experiments.push --checkpoint runs/mine --repository me/my-policy --licence apache-2.0

Log in once with `hf auth login`. Then anybody whom the repository lets in opens it: load_policy("hf://me/my-policy").
"""

from __future__ import annotations

import dataclasses
import sys

from robovlms_jax import cli, ending
from robovlms_jax.runs import logs, model_card, sharing


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """What to share, and under which name."""

    checkpoint: str
    """Run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME."""
    repository: str
    """OWNER/NAME on the hub; made where there is none. The checkpoint that it held is replaced (the hub keeps its
    history)."""
    licence: str
    """Of the parameters, as the hub names it: apache-2.0, mit, cc-by-4.0, gemma, other."""
    data: str = ""
    """Further sentences for the card's section on data: where it is from, who recorded it."""
    limits: str = ""
    """Further sentences for the card's section on limits."""
    private: bool = True
    """Whether a repository that is made now is private."""
    show: bool = False
    """Print the card, and upload nothing."""


def main() -> None:
    """Errors of the user end the process with a message and status 1."""
    logs.to_stderr()
    config = cli.read(PushConfig, description=__doc__)
    words = model_card.Words(config.licence, config.data, config.limits)
    try:
        if config.show:
            ending.show(sharing.prepare(config.checkpoint, config.repository, words)[1])
        else:
            ending.show(sharing.push(config.checkpoint, config.repository, words, private=config.private))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
