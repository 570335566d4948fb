"""Instructions as token ids. Training and serving build the same prompt, here and nowhere else."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from robovlms_jax.inputs import literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BARE = "{instruction}"
"""Template of who reads the instruction and nothing else."""

_SAID: set[str] = set()
"""Unknown letters that the log has named."""
MOST_SAID = 100
"""Clients of a server could send others for ever; what is unknown beside these is read all the same, and not named."""


def format_prompt(template: str, instruction: str) -> str:
    """The stripped instruction inside a backbone's template, say "<grounding>An image of a robot {instruction}".

    In Unicode's composed form (NFC): decomposed Hangul or accents, as macOS' file names have them, look the same and
    would be other tokens.

    Raises ValueError when the template has no {instruction}.
    """
    if "{instruction}" not in template:
        raise ValueError(f"prompt template {template!r} has no {{instruction}}; the policy would never see what to do.")
    return template.replace("{instruction}", unicodedata.normalize("NFC", instruction.strip()))


def ids_of(
    tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, special_tokens: bool = True
) -> list[int]:
    """Tokens of a prompt, as many as it has; arguments as of `encode`."""
    words = format_prompt(BARE, instruction)
    format_prompt(template, words)  # refuses a template without a place for it
    return literal.prompt_ids(tokenizer, template, words, special_tokens=special_tokens)


def encode(
    tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, length: int, *, special_tokens: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """One prompt, padded on the right.

    Args:
      special_tokens: the tokenizer adds its own around the prompt. Those that the template names are there either way,
        and those that the instruction writes out are text (inputs/literal.py).
    Returns:
      text_ids: int32[length]; padding holds the pad id, or 0 where the tokenizer has none.
      text_mask: bool[length], True = real token.
    Raises:
      ValueError: the prompt has more than `length` tokens (nothing is cut off: half a sentence can mean the opposite),
        or the tokenizer does not know the instruction's letters (`require_known`).
    """
    prompt, ids = format_prompt(template, instruction), ids_of(tokenizer, template, instruction, special_tokens)
    require_known(tokenizer, instruction, ids)
    if len(ids) > length:
        raise ValueError(
            f"the prompt {prompt!r} has {len(ids)} tokens but data.text_length is {length}; "
            "shorten the instruction, or train with a larger data.text_length."
        )
    mask = np.arange(length) < len(ids)
    padded = np.full(length, tokenizer.pad_token_id or 0, np.int32)
    padded[: len(ids)] = ids
    return padded, mask


def require_known(tokenizer: PreTrainedTokenizerBase, instruction: str, ids: Sequence[int]) -> None:
    """Refuse an instruction in a script that the tokenizer does not know: its words would all be the same unknown
    token, and two instructions one. Odd letters in a known script are named once in the log.

    Args:
      ids: of the prompt that holds the instruction.
    Raises:
      ValueError: more than a quarter of the instruction's letters are unknown; names some and the way out.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in ids:
        return
    letters = [letter for letter in unicodedata.normalize("NFC", instruction) if letter.isalpha()]
    known = {x: unknown not in tokenizer(x, add_special_tokens=False)["input_ids"] for x in set(letters)}
    lost = [letter for letter in letters if not known[letter]]
    named = " ".join(dict.fromkeys(lost)) or "(signs)"
    if len(lost) > len(letters) / 4:
        raise ValueError(
            f"the tokenizer does not know {len(lost)} of the {len(letters)} letters of the instruction "
            f"{instruction!r}, such as {named[:40]}: other instructions would be the same tokens. Take a backbone that "
            "reads this script (for Korean: PaliGemma, Qwen, or any whose tokenizer falls back to bytes), or translate "
            "the instruction."
        )
    named = named[:200]
    if named not in _SAID and len(_SAID) < MOST_SAID:
        _SAID.add(named)
        logger.warning("the tokenizer does not know %s of %r; the rest is read", named, instruction)


MAX_TOKENS = 256
"""Tokens of the longest prompt that is served, unless training had longer ones. Robots' instructions have below 64."""


def served_length(tokens: int, length: int, prompt: str) -> int:
    """Slots for a prompt of `tokens` tokens that is served beside others: `length`, doubled until it fits.

    So all prompts of the usual length share one compiled program, and longer ones a few.

    Raises:
      ValueError: there are more than MAX_TOKENS and more than `length`, the longest prompt in training.
    """
    limit = max(MAX_TOKENS, length)
    if tokens > limit:
        raise ValueError(
            f"the prompt {prompt[:60]!r}... has {tokens} tokens; at most {limit} are served. Training's longest "
            f"has {length}; shorten the instruction."
        )
    slots = max(length, 8)
    while slots < tokens:
        slots *= 2
    return min(slots, limit)


def longest(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    instructions: Iterable[str],
    multiple: int = 4,
    *,
    special_tokens: bool = True,
) -> int:
    """Tokens of the longest prompt, rounded up to a multiple: the `length` that fits all `instructions`.

    Raises ValueError when there are no instructions.
    """
    texts = {format_prompt(BARE, instruction) for instruction in instructions}
    if not texts:
        raise ValueError("no instructions to measure: no annotated segment (see data.root, data.episode_list).")
    odd = {text for text in texts if literal.pattern(tokenizer, template).search(text)}
    found = [ids_of(tokenizer, template, text, special_tokens) for text in odd]
    if plain := sorted(format_prompt(template, text) for text in texts - odd):
        found += tokenizer(plain, add_special_tokens=special_tokens)["input_ids"]
    tokens = max(map(len, found))
    return -(-tokens // multiple) * multiple
