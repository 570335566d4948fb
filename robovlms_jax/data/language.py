"""Other words for the same instruction: those a dataset records, sentences from a file, templates, and fewer words."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax import atomic, json_files
from robovlms_jax.data import base, config, mirror, shortening

logger = logging.getLogger(__name__)

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


@dataclasses.dataclass(frozen=True)
class Variation:
    """How training varies instructions; evaluation always uses the recorded one.

    sentences: instruction -> others that mean the same.
    templates: each holds {instruction}.
    shortened: sentence -> what is left of it without some of its words.
    never: sentences that nobody is told, unless they were recorded.
    tasks: task -> sentences that it is asked in, of tasks that data may lack, too.
    """

    sentences: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    templates: tuple[str, ...] = ()
    shortened: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    never: tuple[str, ...] = ()
    tasks: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def whole(self, episode: base.Episode) -> tuple[str, ...]:
        """The recorded instruction first, then the sentences that mean the same."""
        said = (episode.instruction, *episode.rewordings, *self.sentences.get(episode.instruction, ()))
        return tuple(dict.fromkeys(said))

    @functools.cached_property
    def _refused(self) -> set[tuple[str, ...]]:
        return {shortening.words(text) for text in self.never}

    def of(self, episode: base.Episode) -> tuple[str, ...]:
        """The recorded instruction first, then everything it may be replaced by, each once."""
        said = self.whole(episode)
        said = (*said, *(text for sentence in said for text in self.shortened.get(sentence, ())))
        filled = (t.replace("{instruction}", sentence) for sentence in said for t in self.templates)
        first, *others = dict.fromkeys((*said, *filled))
        return (first, *(text for text in others if not self.never or shortening.words(text) not in self._refused))


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
    """A file of paraphrases: JSON {"templates": ["..."], "sentences": {instruction: [others]}, "never": ["..."],
    "tasks": {task: [its sentences]}}, each part optional; "" is the built-in templates. Raises ValueError naming the
    file and what is wrong."""
    if not path:
        return Variation(templates=TEMPLATES)
    try:
        content = json_files.read(path)
    except FileNotFoundError:
        raise ValueError(
            f"data.paraphrases: {path} is not there. Recorders write {PARAPHRASES} beside their splits; to a recording "
            "that lacks it, being an earlier version's, the same command adds it."
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"data.paraphrases: {error}") from error
    where = f"data.paraphrases: {path}"
    expected = '{"templates": [...], "sentences": {instruction: [...]}, "never": [...], "tasks": {task: [...]}}'
    parts = {"templates", "sentences", "never", "tasks"}
    if not isinstance(content, dict) or (unknown := sorted(set(content) - parts)):
        found = f"has {unknown}" if isinstance(content, dict) else f"is a {type(content).__name__}"
        raise ValueError(f"{where} {found}; expected {expected}.")
    mappings = {part: content.get(part, {}) for part in ("sentences", "tasks")}
    for part, mapping in mappings.items():
        if not isinstance(mapping, dict):
            raise ValueError(f"{where}: {part} is a {type(mapping).__name__}; expected {expected}.")
    lists = {f"{part}[{key!r}]": listed for part, mapping in mappings.items() for key, listed in mapping.items()}
    for name, listed in (lists | {part: content.get(part, []) for part in ("templates", "never")}).items():
        if not isinstance(listed, list) or not all(isinstance(text, str) and text.strip() for text in listed):
            raise ValueError(f"{where}: {name} is {listed!r:.80}; expected a list of sentences, none of them empty.")
    templates = tuple(content.get("templates", ()))
    for template in templates:
        if "{instruction}" not in template:
            raise ValueError(f"{where}: the template {template!r} has no {{instruction}}.")
    by_sentence, by_task = ({key: tuple(x) for key, x in mappings[part].items()} for part in ("sentences", "tasks"))
    return Variation(by_sentence, templates, never=tuple(content.get("never", ())), tasks=by_task)


def join(roots: Iterable[pathlib.Path], out: pathlib.Path) -> None:
    """Write what the recordings at `roots` say in other words as one file in `out`, if one of them has it. Raises
    ValueError: a file is wrong."""
    known = [read(str(root / PARAPHRASES)) for root in roots if (root / PARAPHRASES).exists()]
    if not known:
        return
    mappings: dict[str, dict[str, list[str]]] = {"sentences": {}, "tasks": {}}
    for part, mapping in mappings.items():
        for variation in known:
            for key, others in getattr(variation, part).items():
                mapping[key] = list(dict.fromkeys([*mapping.get(key, ()), *others]))
    lists = {
        part: list(dict.fromkeys(text for variation in known for text in getattr(variation, part)))
        for part in ("templates", "never")
    }
    atomic.write_json(out / PARAPHRASES, lists | mappings)


def of_data(data: config.DataConfig, datasets: Sequence[base.Dataset], asked: Iterable[str] = ()) -> Variation | None:
    """How a run varies its instructions; None: it does not.

    Args:
      datasets: all that it learns from.
      asked: sentences of validation, which no sentence is shortened to.
    Raises ValueError: the file of paraphrases is wrong.
    """
    if not data.vary_language:
        return None
    variation = read(data.paraphrases)
    if not data.shorter_sentences:
        return variation
    never = [*variation.never, *asked]
    if data.augment.mirror:
        never += [mirror.words(text) for text in never]
    variation = dataclasses.replace(variation, never=tuple(dict.fromkeys(never)))
    meanings = _meanings(datasets, variation)
    shortened = shortening.shorten(meanings, data.shorter_sentences, never, variation.tasks)
    logger.info(
        "data.shorter_sentences: %d wordings with fewer words, of %d sentences (%d of these have none that is clear)",
        *(sum(map(len, shortened.values())), len(shortened), sum(not texts for texts in shortened.values())),
    )
    return dataclasses.replace(variation, shortened=shortened)


def _meanings(datasets: Sequence[base.Dataset], variation: Variation) -> dict[str, set[str]]:
    """Task -> its sentences. Where a dataset names no tasks, each instruction is one of its own, unless another dataset
    or the file of paraphrases says of what task it is."""
    found: dict[str, set[str]] = {}
    task_of: dict[tuple[str, ...], str] = {}
    for task, sentences in variation.tasks.items():
        for said in map(shortening.words, sentences):
            task_of[said] = "" if task_of.get(said, task) != task else task  # of two tasks: it says neither
    for dataset in sorted(datasets, key=lambda dataset: not dataset.names_tasks):
        for episode in dataset.episodes:
            task = episode.task if dataset.names_tasks else ""
            said = shortening.words(episode.instruction)
            task = task or task_of.get(said) or episode.instruction
            task_of.setdefault(said, task)
            found.setdefault(task, set()).update(variation.whole(episode))
    return found


def content(sentences: Sequence[str], variation: Variation | None) -> Any:
    """What of a run's sentences has to be the same for it to be resumed: how many, and which where words were left out,
    since which these are depends on all others."""
    if variation is None or not variation.shortened:
        return len(sentences)
    return f"{len(sentences)}, {hashlib.sha256(repr(list(sentences)).encode()).hexdigest()[:16]}"
