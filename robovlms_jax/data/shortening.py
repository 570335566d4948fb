"""Sentences without some of their words, none of which another task's sentence could be shortened to."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from robovlms_jax.data import mirror

_FEWEST, _DRAWS = 0.4, 5
"""The smallest share of a sentence's words that is kept on average, and how often words are drawn for each wording."""
_WORD = re.compile(r"\w+")


def words(text: str) -> tuple[str, ...]:
    """Of a sentence in small letters, without signs: by them sentences are the same or not."""
    return tuple(_WORD.findall(unicodedata.normalize("NFC", text).lower()))


def shorten(
    meanings: Mapping[str, Iterable[str]],
    count: int,
    never: Iterable[str] = (),
    others: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Of each sentence up to `count` others, which lack some of its words, drawn at random and always alike.

    None has fewer than two words, and none could be left of a sentence of another meaning, so that "turn on the light"
    stands for neither of two lights: which words are needed to tell tasks apart need not be said. A sentence with left
    for right is another meaning, too.

    Args:
      meanings: task -> its sentences.
      never: sentences that none becomes.
      others: task -> sentences that it may be asked in, too; they are told apart and not shortened.
    """
    others = others or {}
    known = _Known({task: {*meanings.get(task, ()), *others.get(task, ())} for task in {**meanings, **others}})
    refused = {words(text) for text in never}
    found: dict[str, tuple[str, ...]] = {}
    for meaning, sentences in meanings.items():
        for sentence in sentences:
            if sentence in found:  # of two tasks: it tells nothing apart, nor do its parts
                continue
            judged: set[tuple[str, ...]] = {words(sentence)}
            texts: list[str] = []
            for text in _drawn(sentence, count * _DRAWS):
                if len(texts) == count:
                    break
                if (left := words(text)) in judged:
                    continue
                judged.add(left)
                if len(left) > 1 and left not in refused and known.are_only(left, meaning):
                    texts.append(text)
            found[sentence] = tuple(texts)
    return found


class _Known:
    """All sentences, and of each word, as bits of a number, in which of them it is."""

    def __init__(self, meanings: Mapping[str, Iterable[str]]):
        owners: dict[tuple[str, ...], set[str]] = {}
        for meaning, sentences in meanings.items():
            for sentence in sentences:
                owners.setdefault(words(sentence), set()).add(meaning)
        images = {words(mirror.words(text)) for sentences in meanings.values() for text in sentences}
        for image in images - set(owners):
            owners[image] = set()  # nobody's
        self._sentences = list(owners)
        self._having: dict[str, int] = {}
        self._own: dict[str, int] = dict.fromkeys(meanings, 0)
        for number, (sentence, those) in enumerate(owners.items()):
            for word in sentence:
                self._having[word] = self._having.get(word, 0) | 1 << number
            if len(those) == 1:
                self._own[next(iter(those))] |= 1 << number

    def are_only(self, left: Sequence[str], meaning: str) -> bool:
        """Whether no sentence but those of the meaning alone can be shortened to these words."""
        others = ~self._own[meaning]
        for word in left:
            others &= self._having[word]
        while others:
            lowest = others & -others
            if _within(left, self._sentences[lowest.bit_length() - 1]):
                return False
            others ^= lowest
        return True


def _drawn(sentence: str, count: int) -> Iterator[str]:
    """The sentence without some of its words, `count` times; the share that is kept is drawn, too."""
    rng, parts = random.Random(sentence), sentence.split()
    for _ in range(count):
        share = rng.uniform(_FEWEST, 1.0)
        if len(kept := [part for part in parts if rng.random() < share]) < len(parts):
            yield " ".join(kept)


def _within(left: Sequence[str], longer: Sequence[str]) -> bool:
    """Whether leaving words out of `longer` can leave `left`."""
    rest = iter(longer)
    return all(word in rest for word in left)
