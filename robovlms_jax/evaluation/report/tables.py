"""What every report is made of: Markdown tables, numbers as text, JSON, and the look of its pictures.

matplotlib is imported when a picture is drawn, and drawn to files only, so no display or backend is involved.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robovlms_jax import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from robovlms_jax.evaluation.rollout_metrics import Estimate, Rate

COLORS = BLUE, RED, YELLOW, GREEN, GRAY, PURPLE = "#00798c", "#d1495b", "#edae49", "#66a182", "#8d99ae", "#5f4b8b"
BLACK = "#2b2b2b"
DPI = 130


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A Markdown table. The first `text_columns` columns are aligned to the left, all others, numbers, to the right."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, rule, *rows)
    )


def upright(table: str) -> str:
    """A Markdown table of one row from above to below: nine columns beside each other fit no phone."""
    head, _, body = (re.split(r"(?<!\\) \| ", line[2:-2]) for line in table.splitlines())
    rows = [f"| {what} | {value} |" for what, value in zip(head, body, strict=True)]
    return "\n".join(["| what | value |", "| --- | --- |", *rows])


def join(sections: Sequence[str]) -> str:
    """Paragraphs, headings and tables as one Markdown text."""
    return "\n\n".join(sections) + "\n"


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits; "n/a" for NaN."""
    return "n/a" if math.isnan(value) else f"{value:.{digits}g}"


def decimals(value: float, digits: int = 1) -> str:
    """`digits` digits behind the point; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def percent(share: float) -> str:
    return "n/a" if math.isnan(share) else f"{100 * share:.1f} %"


def rate(value: Rate) -> str:
    """In percent, with its interval."""
    low, high = value.interval
    return f"{100 * value.value:.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def estimate(value: Estimate, digits: int = 2) -> str:
    """With its interval."""
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def rate_record(rate: Rate) -> dict[str, Any]:
    """For `write_json`."""
    return {**dataclasses.asdict(rate), "value": rate.value, "interval": rate.interval}


def write_json(path: pathlib.Path, record: Any) -> None:
    """Write JSON; arrays become lists, numbers that are not finite null."""
    atomic.write_text(path, json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(width: float, height: float, **options: Any) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no backend to choose

    return Figure(figsize=(width, height), **options)


def tidy(axes: Axes) -> None:
    """A light grid, and no lines above and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
