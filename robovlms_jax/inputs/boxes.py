"""Boxes in text, as every family of backbones writes them.

Data hold a box in Qwen-VL's notation, `<ref>the red block</ref><box>(103,250),(310,487)</box>`: two corners x, y in
thousandths of the picture's width and height, the upper left one first. `<ref>` may be left out, may have several boxes
behind it, one after the other, or none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

Style = Literal["fractions", "kosmos-2", "paligemma", "qwen-vl"]

_CORNERS = re.compile(r"<box>\(([0-9]+),([0-9]+)\),\(([0-9]+),([0-9]+)\)</box>")
_BOX, _REF = r"<box>\([0-9]+,[0-9]+\),\([0-9]+,[0-9]+\)</box>", r"<ref>((?:(?!</?ref>).)*)</ref>"
_GROUP = re.compile(rf"(?:{_REF}\s*)?({_BOX}(?:\s*{_BOX})*)|{_REF}")
_TAGS = ("<box>", "</box>", "<ref>", "</ref>")
Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of the picture's width and height."""
KOSMOS_BINS = 32
PALIGEMMA_BINS = 1024


def written(text: str, style: Style) -> str:
    """`text` with its boxes in a family's own words.

    Raises ValueError: a box whose corners lie outside of the picture or are exchanged, or a box or phrase that cannot
    be read, such as one that is not closed.
    """
    rest = _GROUP.sub(" ", text)
    if any(tag in rest for tag in _TAGS):
        raise ValueError(
            f"{text!r} has a box that cannot be read; expected <box>(x1,y1),(x2,y2)</box>, whole numbers from 0 to "
            "1000, and <ref>phrase</ref> before it where it has a name."
        )
    return _GROUP.sub(lambda match: _WRITERS[style](*_read(match)), text)


def _read(match: re.Match[str]) -> tuple[str | None, list[Box]]:
    """A phrase, None where there is none, and its boxes, which may be none where there is a phrase."""
    named, boxes, alone = match.groups()
    found: list[Box] = []
    for corners in _CORNERS.finditer(boxes or ""):
        left, top, right, bottom = (int(number) for number in corners.groups())
        if max(right, bottom) > 1000 or left >= right or top >= bottom:
            raise ValueError(
                f"box {corners[0]!r}: expected the upper left, then the lower right corner, in thousandths of the "
                "picture (0 to 1000)."
            )
        found.append((left / 1000, top / 1000, right / 1000, bottom / 1000))
    return named if alone is None else alone, found


def _kosmos(name: str | None, boxes: Sequence[Box]) -> str:
    """Two cells of a grid of 32 x 32, counted row by row (Peng et al. 2023, arXiv:2306.14824). Several boxes of a
    phrase are one object, as the published processor writes them."""
    cells = []
    for box in boxes:
        left, top, right, bottom = (x * KOSMOS_BINS for x in box)
        first = math.floor(top) * KOSMOS_BINS + math.floor(left)
        last = (math.ceil(bottom) - 1) * KOSMOS_BINS + math.ceil(right) - 1
        cells.append(f"<patch_index_{first:04d}><patch_index_{last:04d}>")
    phrase = "" if name is None else f"<phrase>{name}</phrase>"
    return phrase + (f"<object>{'</delimiter_of_multi_objects/>'.join(cells)}</object>" if cells else "")


def _paligemma(name: str | None, boxes: Sequence[Box]) -> str:
    """Top, left, bottom and right in 1024 bins, then the name, for each box (Beyer et al. 2024, arXiv:2407.07726)."""
    written = []
    for left, top, right, bottom in boxes:
        bins = (min(math.floor(x * PALIGEMMA_BINS), PALIGEMMA_BINS - 1) for x in (top, left, bottom, right))
        places = "".join(f"<loc{place:04d}>" for place in bins)
        written.append(places if name is None else f"{places} {name}")
    return " ; ".join(written) if written else name or ""


def _fractions(name: str | None, boxes: Sequence[Box]) -> str:
    """LLaVA's way: four numbers between 0 and 1, as ordinary text."""
    written = ["[" + ", ".join(f"{x:.3f}" for x in box) + "]" for box in boxes]
    return " ".join([*([] if name is None else [name]), *([", ".join(written)] if written else [])])


def _qwen(name: str | None, boxes: Sequence[Box]) -> str:
    """As data hold them."""
    written = "".join("<box>({},{}),({},{})</box>".format(*(round(1000 * x) for x in box)) for box in boxes)
    return written if name is None else f"<ref>{name}</ref>{written}"


_WRITERS: dict[Style, Callable[[str | None, Sequence[Box]], str]] = {
    "kosmos-2": _kosmos,
    "paligemma": _paligemma,
    "fractions": _fractions,
    "qwen-vl": _qwen,
}
