"""What was said at every step, out of one or several fields, and where one task ends and another begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from robovlms_jax.data import features, sentences, shard_columns, shard_index


class Table:
    """Distinct tuples of wordings, numbered in the order of their first use."""

    def __init__(self):
        self.entries: list[tuple[str, ...]] = []
        self._numbers: dict[tuple[str, ...], int] = {}

    def number(self, wordings: tuple[str, ...]) -> int:
        if wordings not in self._numbers:
            self._numbers[wordings] = len(self.entries)
            self.entries.append(wordings)
        return self._numbers[wordings]


def per_step(
    index: shard_index.ShardIndex, fields: Mapping[str, features.Field], names: Sequence[str], table: Table
) -> np.ndarray:
    """int32[steps], entries of `table`, which grows: the filled wordings of all `names`, in their order."""
    total = int(index.num_steps.sum())
    read = [_read(index, fields, name) for name in names if name]
    if not read or not total:
        return np.full(total, table.number(()), np.int32)
    rows, places = np.unique(np.stack([rows for rows, _ in read], axis=1), axis=0, return_inverse=True)
    numbers = [
        table.number(
            tuple(dict.fromkeys(text for row, (_, cells) in zip(combined, read, strict=True) for text in cells[row]))
        )
        for combined in rows.tolist()
    ]
    return np.array(numbers, np.int32)[places.reshape(-1)]


def spans(said: np.ndarray, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """(first steps int64[E], entries of `table` int32[E]) of the tasks that `said` int32[L > 0] names in turn.

    A task goes on while the sentence of one step is among the wordings of the other: fields in which only some
    wordings change or fall silent do not cut an episode.
    """
    starts, current = [0], table.entries[said[0]]
    found = []
    for step in (np.flatnonzero(said[1:] != said[:-1]) + 1).tolist():
        following = table.entries[said[step]]
        if current and following and (following[0] in current or current[0] in following):
            current = tuple(dict.fromkeys(current + following))
            continue
        found.append(table.number(current))
        starts.append(step)
        current = following
    found.append(table.number(current))
    return np.array(starts, np.int64), np.array(found, np.int32)


def _read(
    index: shard_index.ShardIndex, fields: Mapping[str, features.Field], name: str
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """(row int[steps], wordings of each row) of one field."""
    path = features.locate(fields, name)
    field = fields[path]
    if field.kind == "text":
        rows, texts = index.texts(path)
        cells = [sentences.wordings(text.split(shard_columns.SEPARATOR) if field.shape else text) for text in texts]
    else:
        codes = index.arrays.get(f"{path}:table")
        if codes is None:
            codes, rows = np.unique(index.numbers(path), axis=0, return_inverse=True)
        else:
            rows = index.arrays[f"{path}:row"]
        ends = [int(np.argmax(np.append(row, 0) == 0)) for row in codes]
        cells = [
            sentences.wordings("".join(chr(code) for code in row[:end].tolist()))
            for row, end in zip(codes, ends, strict=True)
        ]
    rows = rows.reshape(-1)
    return (rows if field.per_step else np.repeat(rows, index.num_steps)), cells
