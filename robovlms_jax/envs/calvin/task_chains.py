"""CALVIN's 1000 evaluation chains: which tasks may follow each other, and from which symbolic scenes they start.

Written from the published rules (Mees et al. 2022, arXiv:2112.03227). `python -m robovlms_jax.envs.calvin.task_chains`
draws the chains anew and rewrites chains.json.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from robovlms_jax.envs.calvin.tasks import BLOCKS, TASKS, require_known

Condition = Mapping[str, int | str]
"""A symbolic scene: {"led": 1, "lightbulb": 0, "slider": "left", "drawer": "closed", "red_block": "table", ...}."""

VALUES: Mapping[str, tuple[int | str, ...]] = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    **{f"{color}_block": ("table", "slider_right", "slider_left") for color in BLOCKS},
    "grasped": (0,),
}
"""What each key of an initial condition may be; the order counts (`initial_states.condition_seed`)."""
_BLOCK_KEYS = tuple(f"{color}_block" for color in BLOCKS)

CHAIN_LENGTH = 5
CHAINS_SHA256 = "90191d9ac76baecb4f292ab766bbbf3ae65dbf43a83bbe5c376d99db10fd6446"
_CHAINS_FILE = pathlib.Path(__file__).with_name("chains.json")


@dataclasses.dataclass(frozen=True)
class Chain:
    """Five tasks asked one after the other, the scene left as the previous one left it."""

    index: int
    condition: Condition
    tasks: tuple[str, ...]


@functools.cache
def initial_conditions() -> tuple[Condition, ...]:
    """The 192 symbolic scenes chains start from: 1 or 2 blocks on the table, at most one in each half of the shelf."""
    scenes = (dict(zip(VALUES, values)) for values in itertools.product(*VALUES.values()))
    return tuple(scene for scene in scenes if _is_initial([scene[key] for key in _BLOCK_KEYS]))


def _is_initial(places: list) -> bool:
    return places.count("table") in (1, 2) and places.count("slider_right") < 2 and places.count("slider_left") < 2


@functools.cache
def official_chains() -> tuple[Chain, ...]:
    """The 1000 chains of CALVIN's evaluation, as published; read from chains.json and verified."""
    remedy = f"restore it from the repository or rewrite it with `python -m {__spec__.name if __spec__ else __name__}`"
    try:
        rows = json.loads(_CHAINS_FILE.read_text())
        pairs = [(initial_conditions()[row[0]], [list(TASKS)[i] for i in row[1:]]) for row in rows]
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{_CHAINS_FILE} is missing or not a list of chains ({error}); {remedy}.") from error
    found = chains_hash(pairs)
    if found != CHAINS_SHA256:
        raise ValueError(
            f"{_CHAINS_FILE} was edited: its {len(pairs)} chains hash to {found}, the published 1000 to "
            f"{CHAINS_SHA256}. Results would not be comparable; {remedy}."
        )
    return tuple(Chain(index, condition, tuple(names)) for index, (condition, names) in enumerate(pairs))


def chains_hash(pairs: Iterable[tuple[Condition, Sequence[str]]]) -> str:
    """SHA-256 of the compact JSON (sorted keys) of [[condition, tasks], ...]."""
    lists = [[dict(condition), list(names)] for condition, names in pairs]
    text = json.dumps(lists, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def generate_chains() -> list[tuple[Condition, list[str]]]:
    """Draw the 1000 chains anew, in the published order. Rejection sampling: about a minute."""
    quota, extra = divmod(1000, len(initial_conditions()))
    pairs = [
        (condition, names)
        for index, condition in enumerate(initial_conditions())
        for names in draw_chains(index, quota + (index < extra))
    ]
    np.random.RandomState(0).shuffle(pairs)
    return pairs


def draw_chains(condition_index: int, count: int) -> list[list[str]]:
    """The first `count` valid chains from one initial condition; that condition's number is the seed."""
    names = np.array(list(TASKS))
    generator = np.random.RandomState(condition_index)
    chains: list[list[str]] = []
    while len(chains) < count:
        draw = generator.choice(names, size=CHAIN_LENGTH, replace=False).tolist()
        if is_valid_chain(initial_conditions()[condition_index], draw):
            chains.append(draw)
    return chains


def is_valid_chain(condition: Condition, names: Sequence[str]) -> bool:
    """Is every task, in order, possible in exactly one way, and is no category asked for twice?"""
    if len({TASKS[name].category for name in names}) < len(names):
        return False
    for name in names:
        outcomes = successors(condition, name)
        if len(outcomes) != 1:
            return False
        condition = outcomes[0]
    return True


def successors(condition: Condition, task: str) -> list[Condition]:
    """The symbolic scenes that doing `task` can lead to; empty when the task is impossible in `condition`.

    Raises ValueError for a task that there is not."""
    require_known(task)
    needs_grasp = task in ("place_in_slider", "place_in_drawer", "stack_block")
    if condition["grasped"] != int(needs_grasp):
        return []
    places = {key: condition[key] for key in _BLOCK_KEYS}
    slider, drawer = condition["slider"], condition["drawer"]
    held = [key for key, place in places.items() if place == "grasped"]
    words = task.split("_")
    changes: list[dict[str, int | str]] = []
    if words[0] in ("rotate", "push") and task != "push_into_drawer":
        changes = [{}] if places[f"{words[1]}_block"] == "table" else []
    elif task == "push_into_drawer":
        on_table = [key for key, place in places.items() if place == "table"]
        others_shelved = all(place in ("table", "slider_left", "slider_right") for place in places.values())
        if drawer == "open" and len(on_table) == 1 and others_shelved:
            changes = [{on_table[0]: "drawer"}]
    elif words[:2] == ["move", "slider"]:
        changes = [{"slider": words[2]}] if slider != words[2] else []
    elif words[1] == "drawer":
        wanted = {"open": "open", "close": "closed"}[words[0]]
        changes = [{"drawer": wanted}] if drawer != wanted else []
    elif words[0] == "lift":
        key, place = f"{words[1]}_block", words[3]
        reachable = {
            "table": places[key] == "table",
            # the door hides the half it stands in front of
            "slider": (places[key], slider) in (("slider_left", "right"), ("slider_right", "left")),
            "drawer": places[key] == "drawer" and drawer == "open",
        }[place]
        changes = [{key: "grasped", "grasped": 1}] if reachable else []
    elif task == "place_in_slider":
        # the published rule names the half the door is at, although the block physically ends in the open one
        changes = [{key: f"slider_{slider}", "grasped": 0} for key in held]
    elif task == "place_in_drawer":
        changes = [{key: "drawer", "grasped": 0} for key in held if drawer == "open"]
    elif task == "stack_block":
        below = [key for key, place in places.items() if place == "table"]
        changes = [{top: "stacked_top", bottom: "stacked_bottom", "grasped": 0} for top in held for bottom in below]
    elif task == "unstack_block":
        tops = [key for key, place in places.items() if place == "stacked_top"]
        bottoms = [key for key, place in places.items() if place == "stacked_bottom"]
        changes = [{top: "table", bottom: "table"} for top in tops for bottom in bottoms]
    else:
        _, verb, light = words
        lit = int(verb == "on")
        changes = [{light: lit}] if condition[light] != lit else []
    return [{**condition, **change} for change in changes]


def check_condition(condition: Condition) -> None:
    """Raises ValueError for what is not one of `initial_conditions`."""
    if set(condition) != set(VALUES):
        raise ValueError(f"initial condition has keys {sorted(condition)}, expected {sorted(VALUES)}.")
    for key, allowed in VALUES.items():
        value = condition[key]
        # `True == 1`, but it prints differently and so would seed another state
        if value not in allowed or type(value) is not type(allowed[0]):
            raise ValueError(f"initial condition has {key}={value!r}, expected one of {allowed}.")
    if not _is_initial([condition[key] for key in _BLOCK_KEYS]):
        places = {key: condition[key] for key in _BLOCK_KEYS}
        raise ValueError(f"initial condition has {places}; expected 1 or 2 on the table, at most 1 per shelf half.")


def _write_chains() -> None:
    rows = [
        [initial_conditions().index(condition), *(list(TASKS).index(name) for name in names)]
        for condition, names in generate_chains()
    ]
    _CHAINS_FILE.write_text("[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n")


if __name__ == "__main__":
    _write_chains()
