"""Episodes that are left out, why, and when they are too many."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from robovlms_jax.data.lerobot import meta, tables

_SHOWN = 3


class Faults:
    """Why episodes are left out: one reason each, the first that is found."""

    def __init__(self) -> None:
        self._reasons: dict[int, tuple[str, str]] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._reasons

    def add(self, number: int, what: str, detail: str) -> None:
        """what: the kind, shared by many. detail: of this episode."""
        self._reasons.setdefault(int(number), (what, detail))

    def add_rows(self, rows: tables.Rows, wrong: np.ndarray, what: str, detail: Callable[[int], str]) -> None:
        """For every episode with a row in bool[n] `wrong`; `detail` describes the first of them."""
        places = np.flatnonzero(wrong)
        numbers, first = np.unique(rows.episode[places], return_index=True)
        for number, place in zip(numbers.tolist(), places[first].tolist(), strict=True):
            self.add(number, what, detail(place))

    def settle(self, info: meta.Info, total: int, max_share: float, notes: meta.Notes) -> None:
        """Say what is left out. Raises ValueError where it is more than `max_share` of `total` episodes, or all."""
        if not self._reasons:
            return
        kinds: dict[str, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        for number, (what, detail) in sorted(self._reasons.items()):
            kinds[what][detail].append(number)
        listed = "\n  ".join(f"{sum(map(len, d.values()))} {what}: {_describe(d)}" for what, d in kinds.items())
        count = len(self._reasons)
        if count >= total or count > max_share * total:
            way = "no other episode is left."
            if count < total:
                share = min(math.ceil(count / total * 100) / 100, 0.99)
                way = f"or pass --data.max_left_out_share {share:.2f} to train on the others."
            raise ValueError(
                f"{info.root}: of {total} episodes {count} cannot be used, more than --data.max_left_out_share "
                f"{max_share:g} allows:\n  {listed}\nCopy what is missing, mend what disagrees; {way}"
            )
        notes.warn(f"{count} of {total} episodes are left out:\n  {listed}")


def _describe(details: Mapping[str, Sequence[int]]) -> str:
    """The first few details, each with the episodes that it is about."""
    parts = []
    for detail, numbers in list(details.items())[:_SHOWN]:
        shown = ", ".join(map(str, numbers[:_SHOWN]))
        more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
        parts.append(f"episode{'s' if len(numbers) > 1 else ''} {shown}{more}: {detail}")
    return "; ".join(parts) + (f"; and {len(details) - _SHOWN} more" if len(details) > _SHOWN else "")
