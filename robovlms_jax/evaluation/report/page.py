"""Self-contained HTML: one file that opens from disk, pictures inside it, light and dark, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import mimetypes
import pathlib
import re

import numpy as np

from robovlms_jax import atomic

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1d2430; --soft: #667085; --line: #e3e7ee;
  --blue: #00798c; --band: #00798c22; --problem: #c8324a; --look: #b7791f; --fine: #3f8f63; }
@media (prefers-color-scheme: dark) { :root { --back: #12161c; --card: #1b212b; --text: #e6eaf0; --soft: #98a2b3;
  --line: #2d3542; --blue: #3fb6c8; --band: #3fb6c82e; --problem: #ff6b81; --look: #f0b955; --fine: #74c69d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 20px 0 6px; }
p { margin: 6px 0; } .soft { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  margin-top: 16px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; min-width: 50%; font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--soft); font-weight: 500; font-size: 13px; }
td { text-align: right; border-top: 1px solid var(--line); } th, td { padding: 5px 16px 5px 0; white-space: nowrap; }
th:first-child, td:first-child, th.left, td.left { text-align: left; }
.prose th, .prose td { white-space: normal; overflow-wrap: normal; vertical-align: baseline; }
.prose .whole { white-space: nowrap; }
.prose td:last-child, .prose th:last-child { padding-right: 0; }
.prose img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.prose code { font-size: 13px; overflow-wrap: anywhere; } .prose pre { overflow-x: auto; font-size: 13px; }
@media (max-width: 600px) { section { padding: 14px 12px; } .prose table { min-width: 100%; font-size: 13px; }
  .prose th, .prose td { padding-right: 10px; } .prose th { font-size: 12px; } }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: 0; }
"""

_SHORT = re.compile(r"(?<=[\s>])((?=\S{3,16}(?:[\s<]))[^\s<>]*\w-\w[^\s<>]*)(?=[\s<])")
"""Short words of tables with a hyphen, (80-99) or playtable-D, after which browsers would break the line."""


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole page. body: HTML. style, script: added to the page's own."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body><main>{body}</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def from_markdown(text: str, directory: pathlib.Path) -> str:
    """A report's Markdown as HTML, a card for each of its sections. Pictures are read from `directory` and put in; of
    other files, films among them, the link stays."""
    import markdown

    made = markdown.markdown(text, extensions=["tables", "fenced_code"])
    made = re.sub(r'(<img[^>]*? src=")([^":]+)(")', lambda match: _inlined(match, directory), made)
    made = re.sub(r"<t[hd][^>]*>.*?</t[hd]>", lambda cell: _SHORT.sub(r'<span class="whole">\1</span>', cell[0]), made)
    made = made.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    head, *parts = re.split(r"(?=<h2)", made)
    return f'<header class="prose">{head}</header>' + "".join(
        f'<section class="prose">{part}</section>' for part in parts
    )


def put_section(directory: pathlib.Path, section: str) -> pathlib.Path:
    """Put what was found after a run's report had been written before the other sections of its report.md and
    report.html; a section of the same heading goes.

    section: Markdown from its own heading, "## ...", on; its links and pictures are relative to `directory`.
    Returns the page's path.
    """
    heading = section.partition("\n")[0]
    text, made = directory / "report.md", directory / "report.html"
    head, *parts = re.split(r"(?m)^(?=## )", text.read_text())
    kept = [part for part in parts if part.partition("\n")[0] != heading]
    atomic.write_text(text, f"{head}{section.rstrip()}\n\n{''.join(kept)}")
    new = from_markdown(section, directory).partition("</header>")[2]
    old = new.partition("</h2>")[0]
    before, *sections = re.split(r"(?=<section)", made.read_text())
    atomic.write_text(made, before + new + "".join(part for part in sections if not part.startswith(old)))
    return made


def _inlined(match: re.Match[str], directory: pathlib.Path) -> str:
    path = directory / html.unescape(match[2])
    if not path.is_file():
        return match[0]
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"{match[1]}data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}{match[3]}"


def data_uri(image: np.ndarray, widest: int) -> str:
    """A JPEG of at most `widest` pixels in width; small pictures are enlarged, up to three times, so that they can be
    seen.

    image: uint8[height, width, 3].
    """
    from PIL import Image

    picture = Image.fromarray(image)
    scale = min(widest / picture.width, 3.0)
    size = (round(picture.width * scale), max(round(picture.height * scale), 1))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
