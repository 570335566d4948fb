"""Which of the sentences that a policy was trained on is nearest to what somebody typed. Standard library only.

A policy has only heard its own sentences, and does anything at all when it is told something else. So what is typed
is answered with the nearest known sentence, and that one is what the policy is told; where nothing is near, nothing is.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

MAX_LENGTH = 200
"""Characters of a sentence; a longer one is cut."""

LEAST_SIMILARITY = 0.5
"""Below it, nothing that is known is meant: tests/demo/test_sentences.py counts both kinds of mistake."""

_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "a an the to of for with so that which and then it its is are be been should would could can will "
        "shall i we you me my your want wish like need please now just all get make let until go goes do does "
        "robot arm this use from at by ",
    )
)
"""Words that say nothing about which task is meant."""

_SAME = {"bulb": "bulb", "lightbulb": "bulb", "lamp": "light", "led": "green", "shut": "close", "cupboard": "cabinet"}
_FORMS = {
    "closed": "close",
    "opened": "open",
    "opens": "open",
    "lights": "light",
    "blocks": "block",
    "sliding": "slide",
}
_SPELLING = 0.75
"""Least `difflib` ratio at which a word is taken for a known one that is misspelt."""


@dataclasses.dataclass(frozen=True)
class Match:
    """task, sentence: the nearest known ones. similarity: in [0, 1], the share of what was typed, in words weighted by
    how rare they are, that this task is asked for with; 1 = word for word."""

    task: str
    sentence: str
    similarity: float

    @property
    def understood(self) -> bool:
        return self.similarity >= LEAST_SIMILARITY


def clean(text: object) -> str:
    """What was typed, on one line, without characters that print nothing, at most MAX_LENGTH long; "" for no text."""
    if not isinstance(text, str):
        return ""
    spaced = (" " if character.isspace() else character for character in text)
    kept = "".join(x for x in spaced if unicodedata.category(x)[0] != "C")
    return " ".join(kept.split())[:MAX_LENGTH].strip()


class Sentences:
    """The sentences that a policy knows: task -> its phrasings, the plainest first."""

    def __init__(self, known: Mapping[str, Sequence[str]]):
        self.known = {task: tuple(texts) for task, texts in known.items() if texts}
        if not self.known:
            raise ValueError("no task has a sentence; expected at least one.")
        self._counts = {
            task: collections.Counter(word for text in texts for word in _meaning(_words(text)))
            for task, texts in self.known.items()
        }
        tasks_of = collections.Counter(word for counts in self._counts.values() for word in counts)
        count = len(self.known)
        self._rarity = {word: math.log(1 + count / known_to) for word, known_to in tasks_of.items()}
        self._unknown = math.log(1 + count)

    def nearest(self, typed: str) -> Match:
        """The known sentence nearest to what was typed."""
        words = _words(clean(typed))
        for task, texts in self.known.items():
            for text in texts:
                if words == _words(text):
                    return Match(task, text, 1.0)
        told = _meaning(self._spelt(word) for word in words)
        task = max(self.known, key=lambda name: self._cosine(told, self._counts[name]))
        sentence = max(self.known[task], key=lambda text: _overlap(told, _meaning(_words(text))))
        return Match(task, sentence, min(self._share(told, task), 0.99))

    def _spelt(self, word: str) -> str:
        """The known word that a misspelt one, or one with an ending, stands for."""
        word = _FORMS.get(word, word)
        if word in self._rarity or word in _FILLERS or word in _SAME:
            return word
        longer = [known for known in self._rarity if len(known) >= 4 and word.startswith(known)]
        near = difflib.get_close_matches(word, [*self._rarity, *_FILLERS], n=1, cutoff=_SPELLING)
        return max(longer, key=len) if longer else near[0] if near else word

    def _cosine(self, told: Iterable[str], counts: Mapping[str, int]) -> float:
        length = math.sqrt(sum((count * self._rarity[word]) ** 2 for word, count in counts.items()))
        return sum(counts.get(word, 0) * self._rarity.get(word, 0.0) ** 2 for word in set(told)) / length

    def _share(self, told: Iterable[str], task: str) -> float:
        weights = {word: self._rarity.get(word, self._unknown) for word in told}
        total = sum(weights.values())
        meant = sum(weight for word, weight in weights.items() if word in self._counts[task])
        return round(meant / total, 2) if total else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _meaning(words: Iterable[str]) -> list[str]:
    """Without fillers, and with one word for one thing."""
    forms = (_FORMS.get(word, word) for word in words)
    return [_SAME.get(word, word) for word in forms if word not in _FILLERS]


def _overlap(told: Sequence[str], text: Sequence[str]) -> float:
    return len(set(told) & set(text)) / len({*told, *text})
