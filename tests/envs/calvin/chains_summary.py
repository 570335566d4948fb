"""What the chains of an evaluation come to, from how many tasks each solved."""

from __future__ import annotations

import numpy as np

from robovlms_jax.envs.calvin import task_chains
from robovlms_jax.evaluation import blind, paired, rollout_metrics

FIXTURES = (
    *("open_drawer", "close_drawer", "move_slider_left", "move_slider_right"),
    *("turn_on_lightbulb", "turn_off_lightbulb", "turn_on_led", "turn_off_led"),
)
GROUPS = {
    "drawer": ("open_drawer", "close_drawer"),
    "door": ("move_slider",),
    "led": ("turn_on_led", "turn_off_led"),
    "lightbulb": ("turn_on_lightbulb", "turn_off_lightbulb"),
    "lifts": ("lift",),
    "pushes": ("push",),
    "rotations": ("rotate",),
    "placing and stacking": ("place", "stack", "unstack"),
}
"""Kind of task -> how its tasks' names begin."""


def summary(digits, first: int = 0):
    """Of the official chains from number `first` on: intervals, and solved and asked by kind and by task."""
    scores = [int(digit) for digit in digits]
    chains = task_chains.official_chains()[first : first + len(scores)]
    asked: dict[str, list[bool]] = {}
    for chain, done in zip(chains, scores, strict=True):
        for k, task in enumerate(chain.tasks[: done + 1]):
            asked.setdefault(task, []).append(k < done)

    def counts(chosen):
        outcomes = [outcome for task, found in asked.items() if chosen(task) for outcome in found]
        return [sum(outcomes), len(outcomes)]

    begun = {kind: [0, 0] for kind in ("fixture", "block")}
    for chain, done in zip(chains, scores, strict=True):
        own = begun["fixture" if chain.tasks[0] in FIXTURES else "block"]
        own[0], own[1] = own[0] + (done > 0), own[1] + 1
    means = rollout_metrics.bootstrap_means(np.arange(6), np.bincount(scores, minlength=6), 0)
    return {
        "chains": len(scores),
        "solved_in_each": "".join(map(str, scores)),
        "average_length": _rounded(np.mean(scores), *rollout_metrics.percentiles(means)),
        "in_a_row_percent": [round(100 * sum(x >= k for x in scores) / len(scores), 1) for k in range(1, 6)],
        "fixtures": _share(*counts(lambda task: task in FIXTURES)),
        "blocks": _share(*counts(lambda task: task not in FIXTURES)),
        "first_fixture": begun["fixture"],
        "first_block": begun["block"],
        "groups": {name: counts(lambda task, own=own: task.startswith(own)) for name, own in GROUPS.items()},
        "tasks_solved_of_asked": {task: [sum(found), len(found)] for task, found in sorted(asked.items())},
    }


def pair(digits, others):
    """Two policies on the same chains: how many first tasks one does alone, McNemar's exact p, more tasks in a row."""
    one, other = ([int(x) for x in each] for each in (digits, others))
    found = blind.paired([(a > 0, b > 0) for a, b in zip(one, other, strict=True)])
    more = paired.mean_difference(one, other)
    return {
        "this_only": found.first,
        "other_only": found.second,
        "p": float(f"{found.p:.3g}"),
        "more_tasks_in_a_row": _rounded(more.value, more.low, more.high),
    }


def _share(count, of):
    rate = rollout_metrics.Rate(count, of)
    low, high = rate.interval
    return {
        "count": count,
        "of": of,
        "percent": round(100 * count / of, 1) if of else 0,
        "wilson_95_percent": [round(100 * low, 1), round(100 * high, 1)],
    }


def _rounded(*values):
    return [round(float(value), 3) for value in values]


def told(values, after=""):
    """A number with its interval, as pages say it."""
    return "{:.2f} ({:.2f} to {:.2f}{})".format(*values, after)


def cells(row):
    """Rows of a page's table, but for the policies' names -> what they say of one policy."""

    def groups(*names):
        return ", ".join("{} of {}".format(*row["groups"][name]) for name in names)

    def kind(name):
        low, high = row[name]["wilson_95_percent"]
        return "{count} of {of}, {percent:.1f} % ({low:.1f} to {high:.1f})".format(**row[name], low=low, high=high)

    return {
        "**tasks in a row**": told(row["average_length"]),
        "at least 1 to 5, %": ", ".join(f"{x:.1f}" for x in row["in_a_row_percent"]),
        "first task a fixture, a block": "{} of {}, {} of {}".format(*row["first_fixture"], *row["first_block"]),
        "fixtures, solved of asked": kind("fixtures"),
        "blocks, solved of asked": kind("blocks"),
        "drawer, sliding door, LED, lightbulb": groups("drawer", "door", "led", "lightbulb"),
        "lifts, pushes, rotations, placing and stacking": groups(
            "lifts", "pushes", "rotations", "placing and stacking"
        ),
    }


def table(rows):
    """Lines of a page's table, without its head."""
    columns = [cells(row) for row in rows]
    return [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
