"""Other words for the same instruction: those a dataset records, sentences from a file, and templates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from robovlms_jax import json_files
from robovlms_jax.data import base

TEMPLATES = (
    "please {instruction}",
    "{instruction}, please",
    "now {instruction}",
    "robot, {instruction}",
    "your task is to {instruction}",
)
"""Say the same thing whatever the instruction is."""


@dataclasses.dataclass(frozen=True)
class Variation:
    """How training varies instructions; evaluation always uses the recorded one.

    sentences: instruction -> others that mean the same.
    templates: each holds {instruction}.
    """

    sentences: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    templates: tuple[str, ...] = ()

    def of(self, episode: base.Episode) -> tuple[str, ...]:
        """The recorded instruction first, then everything it may be replaced by, each once."""
        said = (episode.instruction, *episode.rewordings, *self.sentences.get(episode.instruction, ()))
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
    """A file of paraphrases: JSON {"templates": ["..."], "sentences": {instruction: [others]}}, either part optional;
    "" is the built-in templates. Raises ValueError naming the file and what is wrong."""
    if not path:
        return Variation(templates=TEMPLATES)
    try:
        content = json_files.read(path)
        unknown = sorted(set(content) - {"templates", "sentences"})
        templates = tuple(content.get("templates", ()))
        sentences = {key: tuple(listed) for key, listed in content.get("sentences", {}).items()}
        wrong = [
            x for x in (*templates, *(s for listed in sentences.values() for s in listed)) if not isinstance(x, str)
        ]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'data.paraphrases: {path} is no JSON {{"templates": [...], "sentences": {{instruction: [...]}}}}: {error}'
        ) from error
    if unknown or wrong:
        raise ValueError(f"data.paraphrases: {path} has {unknown or wrong}; expected templates and sentences of text.")
    for template in templates:
        if "{instruction}" not in template:
            raise ValueError(f"data.paraphrases: the template {template!r} has no {{instruction}}.")
    return Variation(sentences, templates)
