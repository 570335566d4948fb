"""Fonts for instructions that are not in Latin letters: one of the system's where there is one, else Latin letters.

Pillow is imported when a font is looked for.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

log = logging.getLogger(__name__)

_KOREAN = (
    *("NanumGothic.ttf", "NotoSansCJK-Regular.ttc", "NotoSansKR-Regular.otf", "NotoSansKR-Regular.ttf"),
    *("NotoSansCJKkr-Regular.otf", "UnDotum.ttf", "malgun.ttf", "AppleSDGothicNeo.ttc", "AppleGothic.ttf"),
)
"""Files of fonts with Hangul, as Linux, Windows and macOS bring them; Pillow looks in the system's folders."""

_FIRST_SYLLABLE, _LAST_SYLLABLE = 0xAC00, 0xD7A3
_LEADS = ("g", "kk", "n", "d", "tt", "r", "m", "b", "pp", "s", "ss", "", "j", "jj", "ch", "k", "t", "p", "h")
_VOWELS = (
    *("a", "ae", "ya", "yae", "eo", "e", "yeo", "ye", "o", "wa", "wae", "oe"),
    *("yo", "u", "wo", "we", "wi", "yu", "eu", "ui", "i"),
)
_TAILS = (
    *("", "k", "k", "k", "n", "n", "n", "t", "l", "k", "m", "l", "l", "l"),
    *("p", "l", "m", "p", "p", "t", "t", "ng", "t", "t", "k", "t", "p", "t"),
)


def with_font(text: str, size: int) -> tuple[str, FreeTypeFont]:
    """(text to draw, font to draw it with): as it is where a font has its letters, else Hangul in Latin letters."""
    from PIL import ImageFont

    if not korean_in(text):
        return text, ImageFont.load_default(size)
    path = korean_font()
    if path is None:
        return romanize(text), ImageFont.load_default(size)
    return text, ImageFont.truetype(path, size)


@functools.cache
def korean_font() -> str | None:
    """A file of the system with Hangul; None where there is none, which the log says once."""
    from PIL import ImageFont

    for name in _KOREAN:
        try:
            return ImageFont.truetype(name, 12).path
        except OSError:
            continue
    log.info("no font with Hangul is installed (such as NanumGothic); pictures spell Korean in Latin letters")
    return None


def romanize(text: str) -> str:
    """Hangul syllables in Latin letters, letter by letter (Revised Romanization of 2000, without its sound changes)."""
    return "".join(_syllable(letter) for letter in text)


def _syllable(letter: str) -> str:
    if not _FIRST_SYLLABLE <= ord(letter) <= _LAST_SYLLABLE:
        return letter
    lead, rest = divmod(ord(letter) - _FIRST_SYLLABLE, len(_VOWELS) * len(_TAILS))
    vowel, tail = divmod(rest, len(_TAILS))
    return _LEADS[lead] + _VOWELS[vowel] + _TAILS[tail]


def korean_in(text: str) -> bool:
    """Whether a text has Hangul syllables."""
    return any(_FIRST_SYLLABLE <= ord(letter) <= _LAST_SYLLABLE for letter in text)
