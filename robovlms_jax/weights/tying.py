"""Token table and head that a checkpoint stores twice: are they one matrix?"""

from __future__ import annotations

import itertools
import math

import numpy as np

from robovlms_jax.weights.rules import Rule, Rules, Tied, canonical
from robovlms_jax.weights.sources import Source

REMEDY = (
    "Fine-tuning has untied them: say tie_word_embeddings=false in config.json to keep both, or delete the head's "
    "tensor to use the table."
)
_BLOCK = 1 << 24  # numbers compared at a time


def difference(rules: Rules, source: Source) -> str | None:
    """How the head of a checkpoint differs from its token table, where `rules` say that the two are tied.

    None where they are equal number by number, or one of them is not stored, or has another shape (which
    `convert.plan` reports). Reads both, a block of rows at a time.
    """
    for row in rules:
        if not isinstance(row, Tied):
            continue
        rule = next(rule for rule in rules if isinstance(rule, Rule) and rule.target == row.table)
        heads = [name for name in source.shapes if row.match(canonical(rules, name))]
        tables = [name for name in source.shapes if rule.match(canonical(rules, name))[0]]
        for head, table in itertools.product(heads, tables):
            if source.shapes[head] != source.shapes[table]:
                continue
            largest, count = _largest_difference(source, head, table)
            if count:
                return (
                    f"config.json ties the head to the token table, but {head} and {table} are both stored and differ, "
                    f"by up to {largest:.3g} and in {count} of {math.prod(source.shapes[head])} numbers"
                )
    return None


def _largest_difference(source: Source, first: str, second: str) -> tuple[float, int]:
    """Largest difference between two tensors of one shape, and in how many numbers they differ."""
    rows, *rest = source.shapes[first]
    step, largest, count = max(1, _BLOCK // max(math.prod(rest), 1)), 0.0, 0
    for start in range(0, rows, step):
        index = (slice(start, min(start + step, rows)), *(slice(0, size) for size in rest))
        a, b = (source.read(name, index) for name in (first, second))
        if a.dtype == b.dtype and np.array_equal(a, b):
            continue
        apart = np.abs(a.astype(np.float32) - b.astype(np.float32))
        largest = max(largest, float(apart.max(initial=0.0)))
        count += int(np.count_nonzero(apart))
    return largest, count
