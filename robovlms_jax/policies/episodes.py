"""Which slot of a policy holds an episode, and which thread may act in it."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from robovlms_jax.control import interface


@dataclasses.dataclass
class Episode:
    """What a slot was asked to do.

    ids, mask: int32[T], bool[T], the prompt.
    starter: the thread that began the episode. actor: the one that acts in it, None before the first step.
    """

    instruction: str
    ids: np.ndarray
    mask: np.ndarray
    starter: threading.Thread
    actor: threading.Thread | None = None


class Episodes:
    """The episodes of `size` slots. A slot without one refuses to act.

    An episode is acted in by one thread. It need not be the one that began it, but a thread that once began an episode
    in the slot expects that one, so it is refused when another thread has begun the next.
    """

    def __init__(self, size: int):
        self._episodes: list[Episode | None] = [None] * size
        self._starters: list[weakref.WeakSet[threading.Thread]] = [weakref.WeakSet() for _ in range(size)]

    def __len__(self) -> int:
        return len(self._episodes)

    def __iter__(self) -> Iterator[Episode | None]:
        """One per slot."""
        return iter(self._episodes)

    def check(self, slots: Sequence[int], others: Sequence[object], what: str) -> list[int]:
        """The slots' numbers, one for each of `others`. Raises ValueError that says what is wrong with which."""
        checked = interface.check_slots(slots, len(self))
        if len(checked) != len(others):
            raise ValueError(f"{len(checked)} slots were given with {len(others)} {what}; give one for each slot.")
        return checked

    def end(self, slots: Iterable[object]) -> None:
        """Slots hold no episode any more; what is no slot is passed over."""
        for slot in slots:
            if interface.is_slot(slot, len(self)):
                self._episodes[int(slot)] = None

    def begin(self, slot: int, instruction: str, ids: np.ndarray, mask: np.ndarray) -> None:
        """A new episode, of the calling thread."""
        thread = threading.current_thread()
        self._starters[slot].add(thread)
        self._episodes[slot] = Episode(instruction, ids, mask, thread)

    def prompts(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and mask bool of all slots' prompts, each padded to `shape`. A slot without an episode borrows one:
        its result is discarded, but a prompt without any real token makes NaN. Some slot must hold an episode."""
        known = [episode for episode in self._episodes if episode is not None]
        ids, mask = np.zeros((len(self), *shape), np.int32), np.zeros((len(self), *shape), bool)
        for slot, episode in enumerate(self._episodes):
            text = episode or known[0]
            ids[slot, : len(text.ids)], mask[slot, : len(text.mask)] = text.ids, text.mask
        return ids, mask

    def enter(self, slot: int) -> None:
        """The calling thread is about to act in a slot. Raises RuntimeError where there is nothing to act in, or where
        the episode is another thread's."""
        episode, thread = self._episodes[slot], threading.current_thread()
        if episode is None:
            raise RuntimeError(
                f"slot {slot} has no episode: act() before reset(instruction), or after a reset or a step that failed. "
                "The policy does not know what to do; reset the slot."
            )
        displaced = thread is not episode.starter and thread in self._starters[slot]
        if displaced or episode.actor not in (None, thread):
            owner = episode.starter if displaced else episode.actor
            raise RuntimeError(
                f"slot {slot}: thread {thread.name!r} acts in an episode of thread {owner.name!r} "
                f"({episode.instruction!r}); their histories would mix. Give each thread a slot or a policy of its "
                "own, or let one thread make all calls."
            )
        episode.actor = thread


def not_finite(actions: np.ndarray) -> str:
    """What an episode ends with."""
    return (
        f"the policy's actions are not finite: {actions.tolist()}. Either its parameters are not, or it decoded a word "
        "that is no action (set policy.head.constrained). The episode has ended; reset the slot."
    )
