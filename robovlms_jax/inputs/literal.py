"""Special tokens that are written out in somebody's text, such as </s> in an answer: they are read as text.

Tokenizers cut such strings out wherever they stand. Of a template that is meant; in an instruction or an answer it
would end a sentence, begin another turn or stand for a picture, and falsify which tokens are learned.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FREE = range(0xE000, 0xF900)  # characters that Unicode leaves to us
_SAID: set[str] = set()
"""Tokens that the log has named."""
_NEVER = re.compile(r"(?!)")


@functools.lru_cache(maxsize=64)
def pattern(tokenizer: PreTrainedTokenizerBase, template: str = "", words: str = "") -> re.Pattern[str]:
    """What is found in a text where a special token is written out: those of the tokenizer, and further ones that the
    template has.

    words: regular expression of tokens that a text may have, because its family writes with them (places in pictures).
    """
    added = [
        token
        for token in tokenizer.added_tokens_decoder.values()
        if (token.special or token.content in template) and not token.content.isspace()
        if not (words and re.fullmatch(words, token.content))
    ]
    # Those that a tokenizer normalises first are found in capitals, too.
    texts = [f"(?i:{re.escape(token.content)})" if token.normalized else re.escape(token.content) for token in added]
    return re.compile("|".join(sorted(texts, key=len, reverse=True))) if texts else _NEVER


def free(text: str, count: int) -> list[str]:
    """Characters that no text has, to mark places with."""
    return [character for character in map(chr, _FREE) if character not in text][:count]


def quoted(found: re.Pattern[str], text: str, quote: str) -> str:
    """The text with `quote` on either side of every special token that is written out in it."""
    return found.sub(lambda match: quote + match[0] + quote, text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text in which no special token counts, and of each where it begins and ends in the text."""
    options = {"add_special_tokens": False, "return_offsets_mapping": tokenizer.is_fast}
    found = tokenizer(text, split_special_tokens=True, **options)
    ids, offsets = found["input_ids"], found.get("offset_mapping", [(0, len(text))] * len(found["input_ids"]))
    if set(ids) & set(tokenizer.added_tokens_decoder) and len(text) > 1:  # of a kind that is cut out all the same
        parts = [tokenizer(part, **options) for part in (text[0], text[1:])]
        ids = [token for part in parts for token in part["input_ids"]]
        offsets = [(0, len(text))] * len(ids)
    return ids, offsets


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, *, special_tokens: bool = True
) -> list[int]:
    """Tokens of a template with an instruction, of which special tokens of the template count and of the instruction
    do not. What is read as text is logged once.

    special_tokens: the tokenizer adds its own around the prompt.
    """
    found = pattern(tokenizer, template)
    whole = template.replace("{instruction}", instruction)
    if not found.search(instruction):
        return tokenizer(whole, add_special_tokens=special_tokens)["input_ids"]
    tell(found.findall(instruction), repr(instruction))
    (quote,) = free(whole, 1)
    parts = template.replace("{instruction}", quoted(found, instruction, quote)).split(quote)
    ids = []
    for place, part in enumerate(parts):  # every second one stood between quotes
        if part:
            ids += encode(tokenizer, part)[0] if place % 2 else tokenizer(part, add_special_tokens=False)["input_ids"]
    if not special_tokens:
        return ids
    bare, around = (tokenizer(whole, add_special_tokens=added)["input_ids"] for added in (False, True))
    extra = len(around) - len(bare)
    before = next(n for n in range(extra + 1) if around[n : n + len(bare)] == bare)
    return [*around[:before], *ids, *around[before + len(bare) :]]


def tell(tokens: Iterable[str], where: str) -> None:
    """Log once what is read as text."""
    new = [token for token in dict.fromkeys(tokens) if token not in _SAID]
    if new:
        _SAID.update(new)
        logger.warning("%s: %s, special tokens of the tokenizer, are written out; they are read as text", where, new)
