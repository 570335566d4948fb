"""What somebody typed, read against the sentences that a policy was trained on. Standard library only.

A policy has only heard its own sentences, and does anything at all when it is told something else. So it is told one of
them or nothing: one that was typed word for word, or the only one that can be meant. Where several can be meant people
are asked, where nothing is near nothing is told, and what forbids, asks or describes is never taken for an order. What
asks for a stop is a stop, in doubt too.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from robovlms_jax.demo import tones

MAX_LENGTH = 200
"""Characters of a sentence; a longer one is cut."""

LEAST_SIMILARITY = 0.5
"""Below it, nothing that is known is meant: tests/demo/test_sentences.py counts both kinds of mistake."""
_LEAST_TO_ASK = 0.3
"""Below it, not even a question whether it is meant helps, where a thing of the table is named."""
_TIE = 0.1
"""Similarities that differ by less do not say which of two is meant."""
_MOST_CHOICES = 4

_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "a an the to of for with so that which and then it its is are be been should would could can will "
        "shall i we you me my your want wish like need please now just all get make let until go goes do does "
        "robot arm this use from at by both every sure",
    )
)
"""Words that say nothing about which task is meant."""

_SAME = {
    "bulb": "bulb",
    "lightbulb": "bulb",
    "lamp": "bulb",
    "led": "green",
    "shut": "close",
    "cupboard": "cabinet",
    "slider": "door",
}
_FORMS = {
    "closed": "close",
    "opened": "open",
    "opens": "open",
    "lights": "light",
    "lamps": "lamp",
    "leds": "led",
    "blocks": "block",
    "sliding": "slide",
}
_THINGS = frozenset(
    re.findall(r"\w+", "door drawer cabinet shelf light bulb lever button block tower red blue pink green yellow")
)
"""What a task is done to. One that is named has to be the task's; unless one is named, nothing is sure."""
_OPPOSITES = tuple(
    frozenset(pair.split())
    for pair in ("on off", "left right", "open close", "in out", "up down", "clockwise counterclockwise")
)
_SPELLING = 0.75
"""Least `difflib` ratio at which a word is taken for a known one that is misspelt."""

Kind = Literal["known", "meant", "unclear", "unknown", "stop", "refused", "empty"]
"""known: word for word. meant: only one can be. unclear: people have to choose. unknown: nothing is near. stop: the
robot is to stand still. refused: no order, see `Reading.why`."""


@dataclasses.dataclass(frozen=True)
class Match:
    """task, sentence: known ones. similarity: in [0, 1], the share of what was typed, in words weighted by how rare
    they are, that this task is asked for with."""

    task: str
    sentence: str
    similarity: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """matches: what can be meant, the nearest first; more than one only if it is unclear. why: of what is refused."""

    kind: Kind
    matches: tuple[Match, ...] = ()
    why: str = ""

    @property
    def understood(self) -> bool:
        return self.kind in ("known", "meant")


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
        every = [(task, text) for task, texts in self.known.items() for text in texts]
        self._meanings = {text: _meaning(_words(text)) for _, text in every}
        self._word_for_word = {tuple(_words(text)): (task, text) for task, text in every}
        meanings = {task: [self._meanings[text] for text in texts] for task, texts in self.known.items()}
        self._counts = {
            task: collections.Counter(word for words in texts for word in words) for task, texts in meanings.items()
        }
        self._always = {task: _THINGS.intersection(*map(set, texts)) for task, texts in meanings.items()}
        tasks_of = collections.Counter(word for counts in self._counts.values() for word in counts)
        count = len(self.known)
        self._rarity = {word: math.log(1 + count / known_to) for word, known_to in tasks_of.items()}
        self._unknown = math.log(1 + count)
        self._verbs = {_words(text)[0] for texts in self.known.values() for text in texts}

    def read(self, typed: str) -> Reading:
        """What is to be done about it."""
        typed = clean(typed)
        if not typed:
            return Reading("empty")
        words = _words(typed)
        if tuple(words) in self._word_for_word:
            return Reading("known", (Match(*self._word_for_word[tuple(words)], 1.0),))
        if tones.asks_to_stop(typed, words, _FILLERS, known=self._rarity):
            return Reading("stop")
        verb = self._spelt(next((word for word in words if word in self._verbs or word not in _FILLERS), ""))
        why = tones.no_order(words, begins_with_verb=verb in self._verbs, question=typed.endswith(("?", "\uff1f")))
        if why:
            return Reading("refused", why=why)
        return self._meant(_meaning(self._spelt(word) for word in words))

    def _meant(self, told: Sequence[str]) -> Reading:
        things = _THINGS.intersection(told)
        if not things <= self._rarity.keys():
            return Reading("unknown")
        at_once = [task for task in self.known if things <= self._counts[task].keys()]
        named = at_once or [task for task in self.known if things & self._counts[task].keys()]
        fit = [task for task in named if not self._contradicts(told, task)] or named
        matches = sorted((self._match(told, task) for task in fit), key=self._order(told))
        least = _LEAST_TO_ASK if things else LEAST_SIMILARITY
        if at_once:  # else two tasks are asked for, or one beside what is none: whoever wants the first says so
            least = max(least, matches[0].similarity - _TIE)
        near = [match for match in matches if match.similarity >= least]
        if not near:
            return Reading("unknown")
        whole = [match for match in near if self._always[match.task] <= things]
        near = whole or near
        if len(near) == 1 and things and at_once and near[0].similarity >= LEAST_SIMILARITY:
            return Reading("meant", (near[0],))
        plain = (dataclasses.replace(match, sentence=self.known[match.task][0]) for match in near[:_MOST_CHOICES])
        return Reading("unclear", tuple(plain))

    def _order(self, told: Sequence[str]) -> Callable[[Match], tuple[float, float]]:
        return lambda match: (-match.similarity, -self._cosine(told, self._counts[match.task]))

    def _match(self, told: Sequence[str], task: str) -> Match:
        sentence = max(self.known[task], key=lambda text: _overlap(told, self._meanings[text]))
        return Match(task, sentence, self._share(told, task))

    def _contradicts(self, told: Sequence[str], task: str) -> bool:
        """Is the opposite of what was said the task? Somebody who says both says neither."""
        said = [pair & set(told) for pair in _OPPOSITES]
        task_says = [pair & self._counts[task].keys() for pair in _OPPOSITES]
        return any(len(a) == 1 and len(b) == 1 and a != b for a, b in zip(said, task_says, strict=True))

    def _spelt(self, word: str) -> str:
        """The known word that a misspelt one, or one with an ending, stands for."""
        word = _FORMS.get(word, word)
        if word in self._rarity or word in _FILLERS or word in _SAME:
            return word
        longer = [known for known in self._rarity if len(known) >= 4 and word.startswith(known)]
        # "bright" and "flight" only end like known words; they are no slips of the keyboard.
        alike = [known for known in self._rarity if not word.endswith(known)]
        near = difflib.get_close_matches(word, [*alike, *_FILLERS], n=1, cutoff=_SPELLING)
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
    """Of one spelling: "don't" is one word."""
    return re.findall(r"\w+", re.sub(r"(?<=\w)['\u2019`\u00b4](?=\w)", "", text.lower()))


def _meaning(words: Iterable[str]) -> list[str]:
    """Without fillers, and with one word for one thing."""
    forms = [_FORMS.get(word, word) for word in words]
    lamp = "light" if {"green", "led"} & set(forms) else "bulb"  # a lamp is the bulb, unless it is a green one
    return [lamp if word == "lamp" else _SAME.get(word, word) for word in forms if word not in _FILLERS]


def _overlap(told: Sequence[str], text: Sequence[str]) -> float:
    return len(set(told) & set(text)) / len({*told, *text})
