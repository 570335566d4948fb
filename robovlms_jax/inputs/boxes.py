"""Boxes in text, as every family of backbones writes them.

Data hold a box in Qwen-VL's notation, `<ref>the red block</ref><box>(103,250),(310,487)</box>`: two corners x, y in
thousandths of the picture's width and height, the upper left one first; `<ref>` may be left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Literal

Style = Literal["fractions", "kosmos-2", "paligemma", "qwen-vl"]

_BOX = re.compile(r"(?:<ref>(?P<ref>.*?)</ref>)?<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>")
KOSMOS_BINS = 32
PALIGEMMA_BINS = 1024


def written(text: str, style: Style) -> str:
    """`text` with its boxes in a family's own words.

    Raises ValueError: a box whose corners lie outside of the picture or are exchanged, or that is not closed.
    """
    out = _BOX.sub(lambda match: _one(match, style), text)
    if style != "qwen-vl" and ("<box>" in out or "</box>" in out):
        raise ValueError(f"{text!r} has a box that cannot be read; expected <box>(x1,y1),(x2,y2)</box>, 0 to 1000.")
    return out


def _one(match: re.Match[str], style: Style) -> str:
    thousandths = [int(number) for number in match.groups()[1:]]
    left, top, right, bottom = thousandths
    if max(thousandths) > 1000 or left >= right or top >= bottom:
        raise ValueError(
            f"box {match[0]!r}: expected the upper left, then the lower right corner, in thousandths of the picture "
            "(0 to 1000)."
        )
    if style == "qwen-vl":
        return match[0]
    return _WRITERS[style](match["ref"], tuple(number / 1000 for number in thousandths))


def _kosmos(name: str | None, box: tuple[float, ...]) -> str:
    """Two cells of a grid of 32 x 32, counted row by row (Peng et al. 2023, arXiv:2306.14824)."""
    left, top, right, bottom = (x * KOSMOS_BINS for x in box)
    first = math.floor(top) * KOSMOS_BINS + math.floor(left)
    last = (math.ceil(bottom) - 1) * KOSMOS_BINS + math.ceil(right) - 1
    phrase = "" if name is None else f"<phrase>{name}</phrase>"
    return f"{phrase}<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"


def _paligemma(name: str | None, box: tuple[float, ...]) -> str:
    """Top, left, bottom and right in 1024 bins, then the name (Beyer et al. 2024, arXiv:2407.07726)."""
    left, top, right, bottom = (min(math.floor(x * PALIGEMMA_BINS), PALIGEMMA_BINS - 1) for x in box)
    places = "".join(f"<loc{place:04d}>" for place in (top, left, bottom, right))
    return places if name is None else f"{places} {name}"


def _fractions(name: str | None, box: tuple[float, ...]) -> str:
    """LLaVA's way: four numbers between 0 and 1, as ordinary text."""
    numbers = "[" + ", ".join(f"{x:.3f}" for x in box) + "]"
    return numbers if name is None else f"{name} {numbers}"


_WRITERS: dict[str, Callable[[str | None, tuple[float, ...]], str]] = {
    "kosmos-2": _kosmos,
    "paligemma": _paligemma,
    "fractions": _fractions,
}
