"""Token table, head and other copies that a checkpoint stores twice: are they one matrix?"""

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

    Raises ValueError for another copy of the table that differs, such as an encoder's: the model has no place for two.
    """
    untied = None
    for row in rules:
        if not isinstance(row, Tied):
            continue
        copies = [name for name in source.shapes if row.match(canonical(rules, name))]
        for copy, table in itertools.product(copies, _stored(rules, row.table, source)):
            if source.shapes[copy] != source.shapes[table]:
                continue
            largest, count = _largest_difference(source, copy, table)
            if not count:
                continue
            how = (
                f"{copy} and {table} are both stored and differ, by up to {largest:.3g} and in {count} of "
                f"{math.prod(source.shapes[copy])} numbers"
            )
            if not row.head:
                raise ValueError(
                    f"{source.name}: {how}; encoder and decoder of this model read one token table. Delete "
                    f"{copy} to use {table} for both."
                )
            untied = untied or f"config.json ties the head to the token table, but {how}"
    return untied


def _stored(rules: Rules, table: str, source: Source) -> list[str]:
    """The tensor of a token table, or where it is not there the first of those that are stored in its place."""
    rule = next(rule for rule in rules if isinstance(rule, Rule) and rule.target == table)
    found = [name for name in source.shapes if rule.match(canonical(rules, name))[0]]
    copies = [row for row in rules if isinstance(row, Tied) and row.table == table]
    return found or [name for row in copies for name in source.shapes if row.match(canonical(rules, name))][:1]


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
