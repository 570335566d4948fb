"""What a run of reinforcement says at its end: the same trials before and after."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax import atomic
from robovlms_jax.evaluation import blind, rollout_metrics
from robovlms_jax.evaluation.rollout import TrialResult


def compared(before: Sequence[bool], after: Sequence[TrialResult]) -> dict[str, Any]:
    """What the same trials of single tasks say about two policies, as JSON values. per_task and per_table: name ->
    successes before, after, and trials."""
    now = [result.success == (True,) for result in after]
    parts: dict[str, dict[str, list[tuple[bool, bool]]]] = {"per_task": {}, "per_table": {}}
    for result, pair in zip(after, zip(before, now, strict=True), strict=True):
        parts["per_task"].setdefault(result.tasks[0], []).append(pair)
        parts["per_table"].setdefault(str(result.labels["scene"]), []).append(pair)
    counted = {
        kind: {name: [*np.sum(pairs, axis=0).tolist(), len(pairs)] for name, pairs in sorted(each.items())}
        for kind, each in parts.items()
    }
    rates = {name: rollout_metrics.Rate(sum(x), len(x)) for name, x in (("before", before), ("after", now))}
    paired = blind.paired(list(zip(before, now, strict=True)))
    return {name: dataclasses.asdict(x) for name, x in {**rates, "paired": paired}.items()} | counted


def _row(name: str, found: Mapping[str, Any]) -> str:
    """Of the report's table."""
    cells = []
    for when in ("before", "after"):
        rate = rollout_metrics.Rate(**found[when])
        cells.append(f"{rate.value:.1%} ({rate.interval[0]:.1%} to {rate.interval[1]:.1%})")
    pair, count = found["paired"], found["before"]["attempts"]
    return f"| {name} | {count} | {cells[0]} | {cells[1]} | {pair['second']} / {pair['first']} | {pair['p']:.2g} |"


def report(
    checkpoint: str,
    settings: Mapping[str, Any],
    output: pathlib.Path,
    before: Mapping[str, list[bool]],
    after: Mapping[str, list[TrialResult]],
    trained: int,
) -> pathlib.Path:
    """report.md and results.json of a run in `output`.

    Args:
      settings: the run's, JSON values.
      before, after: name of a measurement -> successes, results of the same trials.
      trained: number of parameters that learned.
    """
    results = {name: compared(before[name], found) for name, found in after.items()}
    curve = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    record = {"settings": settings, "results": results, "curve": curve}
    atomic.write_text(output / "results.json", json.dumps(record, indent=2) + "\n")
    last = curve[-1]
    text = [
        f"# PlayTable: {settings['update']['method']} from {checkpoint}",
        "",
        f"{last['step']} iterations, {last['env_steps']} control steps, {last['seconds']:.0f} s of learning; trained: "
        f"{trained:,} parameters ({', '.join(settings['trainable'])}). "
        f"Divergence from the first policy at the end: {last['from_reference']:.3g}.",
        "",
        *((f"Rewards: {settings['reward']}, learned from preferences.", "") if settings["reward"] else ()),
        "Success with 95 % Wilson intervals, without chance in the actions; the same trials before and after. Gained "
        "and lost: trials that only one of both did, with the p of an exact two-sided McNemar test.",
        "",
        "| measured | trials | before | after | gained / lost | p |",
        "|---|---|---|---|---|---|",
        *(_row(name, found) for name, found in results.items()),
        "",
        "Success while learning, with chance in the actions (metrics.jsonl has all of it):",
        "",
        "| iteration | control steps | seconds | success | divergence |",
        "|---|---|---|---|---|",
        *(
            f"| {x['step']} | {x['env_steps']} | {x['seconds']:.0f} | {x['success']:.1%} | {x['from_reference']:.3g} |"
            for x in curve[:: max(len(curve) // 20, 1)]
        ),
    ]
    path = output / "report.md"
    atomic.write_text(path, "\n".join(text) + "\n")
    return path
