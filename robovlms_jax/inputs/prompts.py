"""Instructions as token ids. Training and serving build the same prompt, here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def format_prompt(template: str, instruction: str) -> str:
    """The stripped instruction inside a backbone's template, say "<grounding>An image of a robot {instruction}".

    Raises ValueError when the template has no {instruction}.
    """
    if "{instruction}" not in template:
        raise ValueError(f"prompt template {template!r} has no {{instruction}}; the policy would never see what to do.")
    return template.replace("{instruction}", instruction.strip())


def encode(
    tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, length: int, *, special_tokens: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """One prompt, padded on the right.

    Args:
      special_tokens: the tokenizer adds its own around the prompt. Those that the template names are there either way.
    Returns:
      text_ids: int32[length]; padding holds the pad id, or 0 where the tokenizer has none.
      text_mask: bool[length], True = real token.
    Raises:
      ValueError: the prompt has more than `length` tokens. Nothing is cut off: half a sentence can mean the opposite.
    """
    prompt = format_prompt(template, instruction)
    ids = tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"]
    if len(ids) > length:
        raise ValueError(
            f"the prompt {prompt!r} has {len(ids)} tokens but data.text_length is {length}; "
            "shorten the instruction, or train with a larger data.text_length."
        )
    mask = np.arange(length) < len(ids)
    padded = np.full(length, tokenizer.pad_token_id or 0, np.int32)
    padded[: len(ids)] = ids
    return padded, mask


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
    multiple: int = 8,
    *,
    special_tokens: bool = True,
) -> int:
    """Tokens of the longest prompt, rounded up to a multiple: the `length` that fits all `instructions`.

    Raises ValueError when there are no instructions.
    """
    prompts = sorted({format_prompt(template, instruction) for instruction in instructions})
    if not prompts:
        raise ValueError("no instructions to measure: no annotated segment (see data.root, data.episode_list).")
    tokens = max(len(ids) for ids in tokenizer(prompts, add_special_tokens=special_tokens)["input_ids"])
    return -(-tokens // multiple) * multiple
