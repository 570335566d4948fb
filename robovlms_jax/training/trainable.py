"""What trains: parameters are split by path before differentiation, so frozen ones have no gradient and no optimizer
state."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TypeVar

Leaf = TypeVar("Leaf")


def split(params: dict[str, Leaf], patterns: Sequence[str]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Flat "/"-joined parameters -> (trainable, frozen): trainable is what any pattern is found in.

    Raises:
      ValueError: naming every pattern that matches no parameter, with the nearest paths.
    """
    idle = [pattern for pattern in patterns if not any(re.search(pattern, path) for path in params)]
    if idle:
        hints = [
            f"{pattern!r} (near: {difflib.get_close_matches(pattern, params, n=3, cutoff=0.3)})" for pattern in idle
        ]
        raise ValueError(
            f"train.trainable has patterns that match no parameter: {', '.join(hints)}. "
            f"Paths begin with {sorted({path.split('/')[0] for path in params})}, for example {next(iter(params))}."
        )
    chosen = {path for path in params if any(re.search(pattern, path) for pattern in patterns)}
    return {path: x for path, x in params.items() if path in chosen}, {
        path: x for path, x in params.items() if path not in chosen
    }
