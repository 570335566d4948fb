"""What is changed about an evaluation's trials to see whether a policy can do what its numbers say.

A condition changes one thing, the same for every policy: where blocks start, what is said, or how the table looks.
Trial i of a condition belongs to trial i of the usual one: same tasks, and the same start where starts are not changed.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from robovlms_jax import schema
from robovlms_jax.envs import looks
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.evaluation import chains
from robovlms_jax.evaluation.rollout import Trial

USUAL = "usual"
LOOKS_PER_KIND = 8
"""Different looks of a condition; trials take turns."""

NOTHING_SAID = "(nothing said)"
"""Stands for the empty sentence in trials and results; `silenced` makes it one."""


class Condition(NamedTuple):
    """about: one line for the report. ablation: a policy that listens does worse here, and should."""

    about: str
    ablation: bool = False


CONDITIONS: Mapping[str, Condition] = {
    USUAL: Condition("initial states and sentences as `evaluate` asks them"),
    "starts": Condition("blocks anew: anywhere in training's range and turned any way, instead of CALVIN's two spots"),
    "unseen": Condition("wordings that training data never use"),
    "empty": Condition("nothing is said", ablation=True),
    "shuffled": Condition("trials exchange their sentences, none keeps one of its own task", ablation=True),
    "other_task": Condition("the sentence of another task that is possible then", ablation=True),
    "distractors": Condition("three boxes on the table that nobody asks for; drawn only, nothing meets them"),
    "camera": Condition("static camera moved by up to 25 cm along each axis, and its view by up to 3 cm"),
    "lighting": Condition("light from elsewhere, darker or brighter, warmer or colder"),
    "texture": Condition("table and cabinet in other colours"),
}


def offered(env: str) -> dict[str, str]:
    """Condition -> "" where a simulator, "playtable" or "calvin", has it, else why it does not."""
    missing = {} if env == "playtable" else looks.WHY_NOT
    return {name: missing.get(name, "") for name in CONDITIONS}


@dataclasses.dataclass(frozen=True)
class Questions:
    """The unchanged evaluation: what conditions are made from.

    button_x_m: of the scene, for things that stand clear of it. sentences: see `chains.chain_trials`.
    """

    chains: Sequence[task_chains.Chain]
    scene: str
    button_x_m: float
    sentences: Mapping[str, str] | None = None

    def trials(self, condition: str, seed: int = 0) -> list[Trial]:
        """Trials of a condition, in the order and with the numbers of the chains.

        Raises ValueError: an unknown condition, or one that these tasks do not allow.
        """
        if condition not in CONDITIONS:
            hint = schema.nearest(condition, CONDITIONS)
            raise ValueError(f"unknown condition {condition!r}{hint} Known: {', '.join(CONDITIONS)}.")
        held_out = condition == "unseen"
        made = chains.chain_trials(
            self.chains, scene=self.scene, held_out=held_out, sentences=None if held_out else self.sentences
        )
        change = _CHANGES.get(condition)
        made = change(self, made, seed) if change else made
        return [dataclasses.replace(trial, labels={**trial.labels, "condition": condition}) for trial in made]

    def looks(self, kind: str) -> list[looks.Look]:
        """Those that trials of the condition take turns with."""
        blocks = initial_states.SCENES[self.scene].table_x_m
        return [looks.draw(kind, number, blocks, self.button_x_m) for number in range(LOOKS_PER_KIND)]


def silenced(encode: Callable[[str], tuple[np.ndarray, np.ndarray]]) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """A policy's `encode_text` that hears an empty sentence where `NOTHING_SAID` stands."""
    return lambda text: encode("" if text == NOTHING_SAID else text)


def _starts(asked: Questions, trials: list[Trial], seed: int) -> list[Trial]:
    found = []
    for trial, chain in zip(trials, asked.chains, strict=True):
        rng = np.random.default_rng([seed, chain.index])
        robot_obs, scene_obs = initial_states.resampled(chain.condition, asked.scene, rng)
        start = {"robot_obs": robot_obs, "scene_obs": scene_obs}
        found.append(dataclasses.replace(trial, start=start, labels={**trial.labels, "starts_seed": seed}))
    return found


def _empty(asked: Questions, trials: list[Trial], seed: int) -> list[Trial]:
    return [_saying(trial, [NOTHING_SAID] * len(trial.tasks), "nothing") for trial in trials]


def _shuffled(asked: Questions, trials: list[Trial], seed: int) -> list[Trial]:
    """Sorted by task, in random order within one, and passed on by as many places as the most frequent task has: then
    nobody is handed a sentence of their own task, and every sentence is used once."""
    places = [(trial, position) for trial in range(len(trials)) for position in range(len(trials[trial].tasks))]
    names = [trials[trial].tasks[position] for trial, position in places]
    most = max(names.count(name) for name in set(names))
    if 2 * most > len(places):
        name = max(set(names), key=names.count)
        raise ValueError(
            f"condition shuffled: {most} of {len(places)} sentences are of {name}, so that some trial would keep one "
            "of its own task. Ask more different tasks, or leave the condition out."
        )
    rng = np.random.default_rng(seed)
    noise = rng.uniform(size=len(places))
    order = sorted(range(len(places)), key=lambda place: (names[place], noise[place]))
    said = [list(trial.instructions) for trial in trials]
    for rank, place in enumerate(order):
        source, position = places[order[(rank + most) % len(order)]]
        trial, own = places[place]
        said[trial][own] = trials[source].instructions[position]
    return [_saying(trial, sentences, "another trial's") for trial, sentences in zip(trials, said, strict=True)]


def _other_task(asked: Questions, trials: list[Trial], seed: int) -> list[Trial]:
    known = sorted({name for chain in asked.chains for name in chain.tasks})
    if len(known) < 2:
        raise ValueError(f"condition other_task: only {known[0]} is asked; ask more tasks, or leave the condition out.")
    found, spoken = [], collections.Counter()
    for trial, chain in zip(trials, asked.chains, strict=True):
        rng, condition, said = np.random.default_rng([seed, chain.index]), chain.condition, []
        for name in chain.tasks:
            others = [other for other in known if other != name]
            possible = [other for other in others if len(task_chains.successors(condition, other)) == 1] or others
            other = possible[rng.integers(len(possible))]
            sentence = (
                tasks.instruction(other, variant=spoken[other]) if asked.sentences is None else asked.sentences[other]
            )
            spoken[other] += 1
            said.append(sentence)
            condition = task_chains.successors(condition, name)[0]
        found.append(_saying(trial, said, "another task's"))
    return found


def _saying(trial: Trial, sentences: Sequence[str], phrasing: str) -> Trial:
    labels = {**trial.labels, "phrasing": phrasing}
    return dataclasses.replace(trial, instructions=tuple(sentences), labels=labels)


def _looking(kind: str) -> Callable[[Questions, list[Trial], int], list[Trial]]:
    def change(asked: Questions, trials: list[Trial], seed: int) -> list[Trial]:
        known = asked.looks(kind)
        return [
            dataclasses.replace(
                trial,
                start={**trial.start, "look": known[trial.index % len(known)]},
                labels={**trial.labels, "look": trial.index % len(known)},
            )
            for trial in trials
        ]

    return change


_CHANGES: Mapping[str, Callable[[Questions, list[Trial], int], list[Trial]]] = {
    "starts": _starts,
    "empty": _empty,
    "shuffled": _shuffled,
    "other_task": _other_task,
    **{kind: _looking(kind) for kind in looks.KINDS},
}
