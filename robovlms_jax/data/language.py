"""Other words for the same instruction: those a dataset records, sentences from a file, templates, and fewer words."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from robovlms_jax import json_files
from robovlms_jax.data import base, config

TEMPLATES = (
    "please {instruction}",
    "{instruction}, please",
    "now {instruction}",
    "robot, {instruction}",
    "your task is to {instruction}",
)
"""Say the same thing whatever the instruction is."""
PARAPHRASES = "paraphrases.json"
"""What recorders write beside their splits, for `data.paraphrases`."""
_FEWEST, _DRAWS = 0.4, 5
"""The smallest share of a sentence's words that is kept on average, and how often words are drawn for each wording."""


@dataclasses.dataclass(frozen=True)
class Variation:
    """How training varies instructions; evaluation always uses the recorded one.

    sentences: instruction -> others that mean the same.
    templates: each holds {instruction}.
    shortened: sentence -> what is left of it without some of its words.
    never: sentences that nothing is shortened to.
    """

    sentences: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    templates: tuple[str, ...] = ()
    shortened: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    never: tuple[str, ...] = ()

    def whole(self, episode: base.Episode) -> tuple[str, ...]:
        """The recorded instruction first, then the sentences that mean the same."""
        said = (episode.instruction, *episode.rewordings, *self.sentences.get(episode.instruction, ()))
        return tuple(dict.fromkeys(said))

    def of(self, episode: base.Episode) -> tuple[str, ...]:
        """The recorded instruction first, then everything it may be replaced by, each once."""
        said = self.whole(episode)
        said = (*said, *(text for sentence in said for text in self.shortened.get(sentence, ())))
        filled = (t.replace("{instruction}", sentence) for sentence in said for t in self.templates)
        return tuple(dict.fromkeys((*said, *filled)))


def numbered(episodes: Iterable[base.Episode], variation: Variation | None) -> tuple[list[str], list[np.ndarray]]:
    """All sentences, each once, and of each episode which of them it may be told, the recorded one first."""
    rows: dict[str, int] = {}
    known: dict[tuple[str, ...], np.ndarray] = {}  # episodes with the same sentences share an array
    per_episode = []
    for episode in episodes:
        said = (episode.instruction,) if variation is None else variation.of(episode)
        if said not in known:
            known[said] = np.array([rows.setdefault(sentence, len(rows)) for sentence in said])
        per_episode.append(known[said])
    return list(rows), per_episode


def every(episodes: Iterable[base.Episode], variation: Variation | None) -> list[str]:
    """All sentences that training may use, each once."""
    if variation is None:
        return list(dict.fromkeys(episode.instruction for episode in episodes))
    return list(dict.fromkeys(sentence for episode in episodes for sentence in variation.of(episode)))


def read(path: str) -> Variation:
    """A file of paraphrases: JSON {"templates": ["..."], "sentences": {instruction: [others]}, "never": ["..."]}, each
    part optional; "" is the built-in templates. Raises ValueError naming the file and what is wrong."""
    if not path:
        return Variation(templates=TEMPLATES)
    try:
        content = json_files.read(path)
        unknown = sorted(set(content) - {"templates", "sentences", "never"})
        templates, never = (tuple(content.get(part, ())) for part in ("templates", "never"))
        sentences = {key: tuple(listed) for key, listed in content.get("sentences", {}).items()}
        texts = (*templates, *never, *(s for listed in sentences.values() for s in listed))
        wrong = [x for x in texts if not isinstance(x, str)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'data.paraphrases: {path} is no JSON {{"templates": [...], "sentences": {{instruction: [...]}}}}: {error}'
        ) from error
    if unknown or wrong:
        raise ValueError(f"data.paraphrases: {path} has {unknown or wrong}; expected templates and sentences of text.")
    for template in templates:
        if "{instruction}" not in template:
            raise ValueError(f"data.paraphrases: the template {template!r} has no {{instruction}}.")
    return Variation(sentences, templates, never=never)


def of_data(data: config.DataConfig, episodes: Sequence[base.Episode], asked: Iterable[str] = ()) -> Variation | None:
    """How a run varies its instructions; None: it does not.

    Args:
      episodes: all that it learns from.
      asked: sentences of validation, which no sentence is shortened to.
    Raises ValueError: the file of paraphrases is wrong.
    """
    if not data.vary_language:
        return None
    variation = read(data.paraphrases)
    if not data.shorter_sentences:
        return variation
    meanings: dict[str, set[str]] = {}
    for episode in episodes:
        meanings.setdefault(episode.task or episode.instruction, set()).update(variation.whole(episode))
    never = (*variation.never, *asked)
    return dataclasses.replace(variation, shortened=shorten(meanings, data.shorter_sentences, never))


def shorten(meanings: Mapping[str, Iterable[str]], count: int, never: Iterable[str] = ()) -> dict[str, tuple[str, ...]]:
    """Of each sentence up to `count` others, which lack some of its words, drawn at random and always alike.

    None could be cut out of a sentence of another meaning, so that "turn on the light" stands for neither of two
    lights: which words are needed to tell tasks apart need not be said.

    Args:
      meanings: task -> its sentences.
      never: sentences that none becomes.
    """
    everywhere: dict[str, list[tuple[str, list[str]]]] = {}
    for meaning, sentences in meanings.items():
        for sentence in sentences:
            for word in set(words := _words(sentence)):
                everywhere.setdefault(word, []).append((meaning, words))
    refused = {tuple(_words(text)) for text in never}

    def clear(words: list[str], meaning: str) -> bool:
        rarest = min((everywhere[word] for word in words), key=len)
        return not any(other != meaning and _within(words, longer) for other, longer in rarest)

    found: dict[str, tuple[str, ...]] = {}
    for meaning, sentences in meanings.items():
        for sentence in sentences:
            texts: dict[tuple[str, ...], str] = {}
            for text in _drawn(sentence, count * _DRAWS):
                words = _words(text)
                if len(texts) < count and words and tuple(words) not in refused and clear(words, meaning):
                    texts.setdefault(tuple(words), text)
            found[sentence] = tuple(dict.fromkeys((*found.get(sentence, ()), *texts.values())))
    return found


def _drawn(sentence: str, count: int) -> Iterable[str]:
    """The sentence without some of its words, `count` times; the share that is kept is drawn, too."""
    rng, parts = random.Random(sentence), sentence.split()
    for _ in range(count):
        share = rng.uniform(_FEWEST, 1.0)
        if len(kept := [part for part in parts if rng.random() < share]) < len(parts):
            yield " ".join(kept)


def _words(sentence: str) -> list[str]:
    """In small letters, without the signs around them."""
    words = (part.strip(".,;:!?\"'()").lower() for part in sentence.split())
    return [word for word in words if word]


def _within(words: Sequence[str], longer: Sequence[str]) -> bool:
    """Whether leaving words out of `longer` can leave `words`."""
    rest = iter(longer)
    return all(word in rest for word in words)
