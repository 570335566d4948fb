"""What a search found: settings from best to worst, with intervals over seeds, and which differences are noise."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from robovlms_jax import atomic
from robovlms_jax.evaluation.report import tables
from robovlms_jax.search import queue, space
from robovlms_jax.search.config import SearchConfig


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A setting, the objective of each of its seeds, and how it compares with the best one.

    half_width: of the 95 % interval of the mean over seeds (Student's t), NaN with one seed. difference, noise: of the
    best setting's mean to this one's, paired by seed where both have the same seeds (Welch's otherwise), and whether
    its 95 % interval holds 0; None where it cannot be told. failed: seeds that ended without a value. p: of the same
    test, of this difference alone; NaN where it cannot be told.
    """

    setting: space.Setting
    values: tuple[float, ...]
    half_width: float
    difference: float
    noise: bool | None
    failed: int = 0
    p: float = math.nan

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


def rank(trials: Sequence[queue.Trial], direction: str) -> list[Ranked]:
    """Settings whose trials are done, the best first; those of which a seed failed come after all that have none: the
    seeds that are left were not drawn at random."""
    grouped: dict[tuple, dict[int, float]] = {}
    for trial in trials:
        if trial.status == "done" and math.isfinite(trial.value):
            grouped.setdefault(tuple(trial.setting.items()), {})[trial.seed] = trial.value
    sign = 1 if direction == "minimize" else -1
    ended = [x for x in trials if x.status == "failed" or (x.status == "done" and not math.isfinite(x.value))]
    # A failed step of a sequence names more than the setting that it belongs to.
    failed = {
        setting: len({trial.seed for trial in ended if set(setting) <= set(trial.setting.items())} - set(seeds))
        for setting, seeds in grouped.items()
    }
    ordered = sorted(
        grouped.items(), key=lambda item: (failed[item[0]] > 0, sign * float(np.mean(list(item[1].values()))))
    )
    out = []
    for setting, seeds in ordered:
        best, values = ordered[0][1], tuple(seeds.values())
        difference, noise, p = _compared(best, seeds)
        out.append(Ranked(dict(setting), values, half_width_of(values), difference, noise, failed[setting], p))
    return out


def half_width_of(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t; NaN for one value."""
    if len(values) < 2:
        return math.nan
    from scipy import stats  # takes most of a second to import

    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def interval(values: Sequence[float], digits: int) -> str:
    """Mean and half of its interval of 95 %; the mean alone of one value, nothing of none."""
    if not values:
        return ""
    half = half_width_of(values)
    return f"{float(np.mean(values)):,.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def _compared(best: dict[int, float], other: dict[int, float]) -> tuple[float, bool | None, float]:
    difference = float(np.mean(list(other.values())) - np.mean(list(best.values())))
    if best is other or min(len(best), len(other)) < 2:
        return difference, None, math.nan
    from scipy import stats

    if set(best) == set(other):
        apart = np.array([other[seed] - best[seed] for seed in best])
        if not np.any(apart - apart[0]):  # no spread: the test divides by it
            return difference, not apart[0], 0.0 if apart[0] else 1.0
        test = stats.ttest_1samp(apart, 0)
    else:
        test = stats.ttest_ind(list(other.values()), list(best.values()), equal_var=False)
    low, high = test.confidence_interval()
    return difference, bool(low <= 0 <= high), float(test.pvalue)


def beyond_chance(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Those whose difference from the best is no chance although so many are compared (Holm's correction): the best was
    chosen for its values, so that of equal settings more than one in twenty looks different by itself."""
    known = sorted((x for x in ranked if x.noise is not None), key=lambda x: x.p)
    found = []
    for place, x in enumerate(known):
        if not x.p * (len(known) - place) < 0.05:
            break
        found.append(x)
    return found


def write(config: SearchConfig) -> pathlib.Path:
    """report.md, report.json and search.png in the search's directory; returns the first."""
    out = pathlib.Path(config.out)
    trials = queue.read(out)
    better = "lower" if config.direction == "minimize" else "higher"
    sections = [f"# Search: {config.experiment}, {config.start}", f"`{config.objective}`, {better} is better."]
    sections += ranking(out, trials, config.objective, config.direction)
    path = out / "report.md"
    atomic.write_text(path, tables.join(sections))
    return path


def ranking(out: pathlib.Path, trials: Sequence[queue.Trial], objective: str, direction: str) -> list[str]:
    """Paragraphs of a report: how trials ended, settings from best to worst, which differences are noise, and what
    failed. Writes report.json and search.png to `out`."""
    ranked = rank(trials, direction)
    names = list(dict.fromkeys(name for trial in trials for name in trial.setting))
    sections = []
    ended = [trial.status for trial in trials]
    counts = [f"{ended.count(status)} {status}" for status in ("done", "open", "failed", "pruned")]
    sections.append(f"Trials: {', '.join(counts)}.")
    if ranked:
        sections += [_table(ranked, names), _verdict(ranked)]
        _draw(ranked, names, objective).savefig(out / "search.png", dpi=tables.DPI)
        sections.append("![the objective by setting, a dot per run](search.png)")
    failed = [[str(trial.number), _text(trial.setting), trial.reason] for trial in trials if trial.status == "failed"]
    if failed:
        sections += ["## Failed", tables.markdown(["trial", "setting", "reason"], failed, text_columns=3)]
    record = {"settings": [dataclasses.asdict(x) for x in ranked], "trials": [dataclasses.asdict(x) for x in trials]}
    tables.write_json(out / "report.json", record)
    return sections


def _table(ranked: Sequence[Ranked], names: Sequence[str]) -> str:
    rows, sure = [], beyond_chance(ranked)
    for x in ranked:
        spread = "" if math.isnan(x.half_width) else f" ± {tables.significant(x.half_width)}"
        real = "real" if any(x is one for one in sure) else "real by itself"
        verdict = "best" if x is ranked[0] else {None: "one run: unknown", True: "noise", False: real}[x.noise]
        numbers = (f"{tables.significant(x.mean)}{spread}", tables.significant(x.difference))
        runs = str(len(x.values)) + (f", {x.failed} failed" if x.failed else "")
        rows.append([*(x.setting.get(name, "") for name in names), runs, *numbers, verdict])
    head = [*names, "runs", "mean (95 %)", "from the best", "difference"]
    return tables.markdown(head, rows, text_columns=len(names))


def _verdict(ranked: Sequence[Ranked]) -> str:
    best, others = ranked[0], ranked[1:]
    said = []
    if not others:
        return "Only one setting has a result: there is nothing to compare it with."
    if len(best.values) < 2:
        whose = "Every setting" if all(len(x.values) < 2 for x in others) else "The best setting"
        said.append(
            f"{whose} was run once, so nothing here tells a better setting from a luckier run: repeat the first few "
            "with `--seeds 3` or more."
        )
    else:
        known = [x for x in others if x.noise is not None]
        equal = [x for x in known if x.noise]
        if equal:
            said.append(
                f"{len(equal)} of the {len(others)} others cannot be told from the best by these runs: the 95 % "
                "interval of the difference over seeds holds 0."
            )
        elif known:
            which = "every other" if len(known) == len(others) else f"{len(known)} of the {len(others)} others"
            said.append(f"The best setting differs from {which} by more than runs of one setting differ (95 %).")
        alone = sum(not x.noise for x in known) - len(beyond_chance(known))
        if alone:
            said.append(
                f"{alone} of {len(known)} differences, called real by itself, may be chance, for several were looked "
                "at and the best was chosen afterwards: of three seeds each, a quarter of all searches among five "
                "equal settings has one, and half of those among ten. Holm's correction for all of them leaves what "
                "is called real."
            )
        if len(known) < len(others):
            said.append(f"{len(others) - len(known)} of the others were run once, which tells nothing of them yet.")
    broken = [x for x in ranked if x.failed]
    if broken:
        said.append(f"{len(broken)} with a run that failed stand last, whatever their other runs say.")
    return " ".join(said)


def _text(setting: space.Setting) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def _draw(ranked: Sequence[Ranked], names: Sequence[str], objective: str):
    shown = ranked[:30]
    figure = tables.figure(8, 1.2 + 0.32 * len(shown), layout="constrained")
    axes = figure.subplots()
    for place, x in enumerate(shown):
        axes.plot(x.values, [place] * len(x.values), "o", color=tables.BLUE, alpha=0.5)
        axes.errorbar(x.mean, place, xerr=None if math.isnan(x.half_width) else x.half_width, fmt="|", color="black")
    short = {name: name.rpartition(".")[2] for name in names}
    axes.set_yticks(range(len(shown)), [", ".join(f"{short[n]} {v}" for n, v in x.setting.items()) for x in shown])
    axes.invert_yaxis()
    axes.set_xlabel(objective)
    tables.tidy(axes)
    return figure
