"""Pages as they are sent: one file each, with the script that all of them share put in."""

from __future__ import annotations

import pathlib

_SHARED = pathlib.Path(__file__).with_name("line.js")
MARK = '<script src="line.js"></script>'
"""Where a page has the shared script, before its own."""


def read(path: pathlib.Path) -> str:
    """HTML of a page with the shared script (line.js) in place of its MARK. Raises ValueError where that is not there
    exactly once."""
    text = path.read_text(encoding="utf-8")
    if text.count(MARK) != 1:
        raise ValueError(f"{path} has {text.count(MARK)} times {MARK}; expected once, before the page's own script.")
    return text.replace(MARK, f"<script>\n{_SHARED.read_text(encoding='utf-8')}</script>")
