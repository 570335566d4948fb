"""The report of a comparison: comparison.html (one page with everything in it), comparison.md and comparison.json."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robovlms_jax import atomic
from robovlms_jax.evaluation import comparison, conditions
from robovlms_jax.evaluation.comparison import Difference, Entry, Standing
from robovlms_jax.evaluation.paired import Selection
from robovlms_jax.evaluation.report import page, tables
from robovlms_jax.evaluation.rollout_metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HOW = (
    "All policies ran the same trials of a condition. In brackets: 95 % intervals (Wilson for rates, Tango's score "
    "interval for differences of rates, bootstrap over trials for means). p: McNemar's exact two-sided test on the "
    "trials that only one of the two solved; corrected: by Holm, for all tests of this page together. Told apart: "
    "corrected p below 0.05."
)
_ABLATIONS = (
    "Where nothing is said, or something else, a policy that listens cannot do what it is judged by. Success that "
    "stays there was never the sentence's: the scene alone gave the task away."
)


def write_report(
    directory: pathlib.Path,
    entries: Sequence[Entry],
    *,
    left_out: Mapping[str, str],
    pictures: Mapping[str, np.ndarray],
    notes: Sequence[str] = (),
) -> pathlib.Path:
    """Write the three files and their pictures; returns the page's path.

    Args:
      left_out: condition -> why it is not here. pictures: condition -> uint8[height, width, 3], what it looks like.
      notes: sentences for the report's head.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stands, differs = comparison.standings(entries), comparison.differences(entries)
    chosen = comparison.selection(entries)
    env = str(next(iter(entries[0].evaluations.values())).setup["env"])
    title = f"{' against '.join(entry.name for entry in entries)}, {env}"
    _draw(stands).savefig(directory / "conditions.png", dpi=tables.DPI, bbox_inches="tight")
    shown = [name for name in pictures if name in entries[0].evaluations]
    if shown:
        _draw_looks({name: pictures[name] for name in shown}).savefig(
            directory / "looks.png", dpi=tables.DPI, bbox_inches="tight"
        )
    sections = [
        f"# {title}",
        *notes,
        "## In short",
        _verdict(differs, stands),
        _HOW,
        *_condition_part(stands, left_out),
    ]
    sections += ["![what each condition looks like to the static camera](looks.png)"] if shown else []
    if differs:
        sections += ["## Policies against each other", _difference_table(differs), *_power_part(differs)]
    if chosen is not None:
        sections += _selection_part(chosen, entries)
    sections += ["## Per task, usual condition", _task_table(stands)]
    text = tables.join([section for section in sections if section])
    atomic.write_text(directory / "comparison.md", text)
    tables.write_json(directory / "comparison.json", _record(title, entries, stands, differs, chosen, left_out))
    path = directory / "comparison.html"
    atomic.write_text(path, page.document(title, page.from_markdown(text, directory)))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _verdict(differs: Sequence[Difference], stands: Sequence[Standing]) -> str:
    """One line for each test of the usual condition, and for each policy that does as well unasked."""
    lines = []
    for each in differs:
        if each.condition == conditions.USUAL:
            what = "solved" if each.at_least == 1 else f"all {each.at_least} in a row"
            better = each.first if each.rate.value > 0 else each.second
            verdict = (
                f"**{better} is better**"
                if each.told_apart
                else f"**not told apart**; these {each.trials} trials would have found a difference of "
                f"{_points(each.smallest)} or more"
                if each.smallest is not None
                else "**not told apart**"
            )
            lines.append(f"- {each.first} minus {each.second}, {what}: {_rate_difference(each.rate)}; {verdict}.")
    usual = {stand.policy: stand for stand in stands if stand.condition == conditions.USUAL}
    for policy, base in usual.items():
        unasked = [s for s in stands if s.policy == policy and conditions.CONDITIONS[s.condition].ablation]
        if unasked:
            worst = max(unasked, key=lambda stand: stand.summary.in_a_row[0].value)
            name = worst.condition
            lines.append(
                f"- {policy}: solved {tables.rate(base.summary.in_a_row[0])} as asked, "
                f"{tables.rate(worst.summary.in_a_row[0])} in the most successful ablation of language (`{name}`)."
            )
    return "\n".join(lines)


def _condition_part(stands: Sequence[Standing], left_out: Mapping[str, str]) -> list[str]:
    length = max(len(stand.summary.in_a_row) for stand in stands)
    head = ["condition", "policy", "trials", "solved"]
    head += [f"all {length} in a row", "Avg. Len."] if length > 1 else []
    body = []
    for stand in stands:
        s = stand.summary
        cells = [f"`{stand.condition}`", stand.policy, str(s.trials), tables.rate(s.in_a_row[0])]
        cells += [tables.rate(s.in_a_row[-1]), tables.estimate(s.average_length)] if length > 1 else []
        body.append([*cells, "" if stand.change is None else _signed(stand.change)])
    asked = dict.fromkeys(stand.condition for stand in stands)
    meanings = [f"- `{name}`: {conditions.CONDITIONS[name].about}." for name in asked]
    meanings += [f"- `{name}` is not here: {why}." for name, why in left_out.items()]
    return [
        "## Conditions",
        tables.markdown([*head, "change of tasks in a row"], body, text_columns=2),
        "\n".join(meanings),
        _ABLATIONS if any(conditions.CONDITIONS[name].ablation for name in asked) else "",
        "![success of each policy under each condition](conditions.png)",
    ]


def _difference_table(differs: Sequence[Difference]) -> str:
    head = ["condition", "first", "second", "solved means", "first only", "second only", "both", "neither"]
    head += ["first minus second", "p", "corrected p", "", "tasks in a row, first minus second"]
    body = []
    for each in differs:
        c = each.counts
        body.append(
            [
                *(f"`{each.condition}`", each.first, each.second, f"at least {each.at_least}"),
                *map(str, (c.first, c.second, c.both, c.neither)),
                *(_rate_difference(each.rate), f"{c.p:.3g}", f"{each.corrected:.3g}"),
                *("told apart" if each.told_apart else "not told apart", _signed(each.length)),
            ]
        )
    return tables.markdown(head, body, text_columns=4)


def _power_part(differs: Sequence[Difference]) -> list[str]:
    head = ["condition", "first", "second", "solved means", "trials", "solved by one only", "smallest that 80 % find"]
    head += ["trials for the difference found"]
    body = [
        [
            *(f"`{each.condition}`", each.first, each.second, f"at least {each.at_least}", str(each.trials)),
            *(tables.percent(each.discordant), _points(each.smallest)),
            "no difference found" if not each.rate.value else str(each.needed or "more than 20 000"),
        ]
        for each in differs
    ]
    share = max(each.discordant for each in differs)
    price = ", ".join(f"{_points(claim)}: {needed or 'more than 20 000'}" for claim, needed in comparison.price(share))
    return [
        "## How many trials a claim needs",
        tables.markdown(head, body, text_columns=4),
        f"Trials that find a difference with a probability of 80 % (exact power of McNemar's exact test at 5 %, not "
        f"corrected), where {tables.percent(share)} of trials are solved by one policy only, the largest share above: "
        f"{price}. Two policies that succeed in other trials, as from two seeds, have a larger share and need more.",
    ]


def _selection_part(chosen: Selection, entries: Sequence[Entry]) -> list[str]:
    picked = ", ".join(f"{entry.name} {tables.percent(share)}" for entry, share in zip(entries, chosen.picked))
    return [
        "## If the best of these is chosen by this page",
        f"The best under `{conditions.USUAL}` is **{entries[chosen.chosen].name}** with {chosen.naive:.3f} tasks in a "
        "row. That number is flattered, because it was chosen for being high.",
        f"Chosen on one random half of the trials ({entries[chosen.chosen_on_half].name}), the other half says "
        f"**{tables.estimate(chosen.half, 3)}**: this can be reported.",
        f"Over 2000 random halves, the chosen one has {chosen.honest:.3f} where it was not chosen, and "
        f"{chosen.optimism:+.3f} more where it was: the bias of choosing by half of the trials. By all of them it is "
        f"smaller, about 0.7 times as large. Chosen: {picked}.",
    ]


def _task_table(stands: Sequence[Standing]) -> str:
    usual = [stand for stand in stands if stand.condition == conditions.USUAL] or list(stands[:1])
    names = sorted({name for stand in usual for name in stand.summary.per_task})
    body = [
        [f"`{name}`", *(tables.rate(s.summary.per_task[name]) if name in s.summary.per_task else "" for s in usual)]
        for name in names
    ]
    return tables.markdown(["task", *(stand.policy for stand in usual)], body)


def _record(
    title: str,
    entries: Sequence[Entry],
    stands: Sequence[Standing],
    differs: Sequence[Difference],
    chosen: Selection | None,
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "title": title,
        "policies": {entry.name: {name: dict(e.setup) for name, e in entry.evaluations.items()} for entry in entries},
        "conditions": [
            {
                **{"policy": stand.policy, "condition": stand.condition, "trials": stand.summary.trials},
                "in_a_row": [tables.rate_record(rate) for rate in stand.summary.in_a_row],
                "average_length": dataclasses.asdict(stand.summary.average_length),
                "per_task": {name: tables.rate_record(rate) for name, rate in stand.summary.per_task.items()},
                "change": None if stand.change is None else dataclasses.asdict(stand.change),
            }
            for stand in stands
        ],
        "differences": [
            dataclasses.asdict(each) | {"trials": each.trials, "told_apart": each.told_apart} for each in differs
        ],
        "selection": None if chosen is None else dataclasses.asdict(chosen),
        "left_out": dict(left_out),
    }


def _rate_difference(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} points ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def _points(share: float | None) -> str:
    return "none that there can be" if share is None else f"{100 * share:.1f} points"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _draw(stands: Sequence[Standing]) -> Figure:
    """Share of trials whose first task was solved, by condition, a colour for each policy."""
    names = list(dict.fromkeys(stand.condition for stand in stands))[::-1]
    policies = list(dict.fromkeys(stand.policy for stand in stands))
    figure = tables.figure(7, 1.0 + 0.34 * len(names))
    axes = figure.subplots()
    for index, policy in enumerate(policies):
        own = {stand.condition: stand.summary.in_a_row[0] for stand in stands if stand.policy == policy}
        values = np.array([own[name].value for name in names])
        ends = np.array([own[name].interval for name in names]).T
        heights = np.arange(len(names)) - 0.5 * ((index + 1) / (len(policies) + 1) - 0.5)
        color = tables.COLORS[index % len(tables.COLORS)]
        axes.errorbar(
            values, heights, xerr=np.abs(ends - values), fmt="o", color=color, capsize=2, markersize=4, label=policy
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.7, len(names) - 0.3), xlabel="share of trials whose first task was solved")
    tables.tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_looks(pictures: Mapping[str, np.ndarray]) -> Figure:
    figure = tables.figure(7, 2.3 * -(-len(pictures) // 3))
    panels = np.ravel(figure.subplots(-(-len(pictures) // 3), 3, squeeze=False))
    for panel in panels:
        panel.axis("off")
    for panel, (name, image) in zip(panels, pictures.items()):
        panel.imshow(image)
        panel.set_title(name, fontsize=9)
    return figure
