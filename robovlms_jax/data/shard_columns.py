"""What the index of a shard keeps of its records: arrays by name, as `shard_index` describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import google_crc32c
import numpy as np

from robovlms_jax.data import features, frame_index, records

INLINE_SIZE = 64
"""Numbers per step up to which a field is copied as it is."""
TABLE_SIZE = 4096
"""Numbers per step up to which a vector is kept as a table of its distinct values."""
SEPARATOR = b"\x1e"
"""Between the strings of one step where a text field has several (ASCII's record separator)."""


class Columns:
    """What an index collects, record by record; a record that fails leaves nothing behind."""

    def __init__(self, fields: Mapping[str, features.Field]):
        self._fields = {path: field for path, field in fields.items() if is_kept(field)}
        self._parts: dict[str, list[np.ndarray]] = {"num_steps": [], "offset": [], "length": []}
        self._texts: dict[str, dict[bytes, int]] = {}
        self._tables: dict[str, dict[bytes, int]] = {}
        for path, field in self._fields.items():
            if field.kind == "image":
                self._parts |= {f"{path}:offset": [], f"{path}:length": [], f"{path}:checksum": []}
            elif field.kind == "text":
                self._texts[path] = {}
                self._parts[f"{path}:row"] = []
            elif field.size > INLINE_SIZE:
                self._tables[path] = {}
                self._parts[f"{path}:row"] = []
            else:
                self._parts[path] = []

    def add(self, item: records.Record) -> None:
        """Take a record in. Raises WireError or FieldError."""
        payload = item.payload
        found = records.features_of(payload)
        num_steps = features.count_steps(payload, found)
        new: dict[str, np.ndarray] = {
            "num_steps": np.array([num_steps], np.int32),
            "offset": np.array([item.offset], np.int64),
            "length": np.array([len(payload)], np.int64),
        }
        problems = []
        for field in self._fields.values():
            try:
                new |= self._values(item, found, field, num_steps if field.per_step else 1)
            except features.FieldError as error:
                problems.append(str(error))
        if problems:
            raise features.FieldError("; ".join(problems))
        for name, values in new.items():
            self._parts[name].append(values)

    def _values(
        self, item: records.Record, found: Mapping[str, records.Feature], field: features.Field, count: int
    ) -> dict[str, np.ndarray]:
        """What one field adds, by name. Raises WireError or FieldError."""
        path, payload = field.path, item.payload
        if field.kind == "image":
            features.strings(payload, found, field, count)
            starts, lengths = records.spans_of(payload, found[path])
            spans = zip(starts, lengths, strict=True)
            checksums = [google_crc32c.value(payload[start : start + length]) for start, length in spans]
            return {
                f"{path}:offset": item.offset + np.array(starts, np.int64),
                f"{path}:length": np.array(lengths, np.int32),
                f"{path}:checksum": np.array(checksums, np.uint32),
            }
        if field.kind == "text":
            return {f"{path}:row": _rows(self._texts[path], _texts(payload, found, field, count))}
        values = features.numbers(payload, found, field, count)
        if path in self._tables:
            return {f"{path}:row": _rows(self._tables[path], [row.tobytes() for row in values])}
        return {path: values}

    def finish(self) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """(arrays by name, distinct texts by path)."""
        empty: dict[str, np.ndarray] = {"num_steps": np.zeros(0, np.int32)}
        for name in self._parts:
            path, _, part = name.rpartition(":")
            field = self._fields.get(name)
            if field is not None and field.is_numeric:
                empty[name] = np.zeros((0, *field.shape), field.dtype)
            else:
                kinds = {"checksum": np.uint32, "row": np.int32, "length": np.int32 if path else np.int64}
                empty.setdefault(name, np.zeros(0, kinds.get(part, np.int64)))
        arrays = {name: np.concatenate(parts) if parts else empty[name] for name, parts in self._parts.items()}
        for path, table in self._tables.items():
            field = self._fields[path]
            arrays[f"{path}:table"] = np.frombuffer(b"".join(table), field.dtype).reshape(-1, *field.shape)
        # Latin-1 keeps any bytes; what is no UTF-8 is the reader's concern.
        return arrays, {path: [text.decode("latin1") for text in table] for path, table in self._texts.items()}


def is_kept(field: features.Field) -> bool:
    """Whether the index holds a field: depth images and what varies in size stay in the records."""
    if field.kind in ("image", "text"):
        return True
    if not field.is_numeric:
        return False
    return 0 <= field.size <= (TABLE_SIZE if len(field.shape) == 1 else INLINE_SIZE)


def _texts(payload: bytes, found: Mapping[str, records.Feature], field: features.Field, count: int) -> list[bytes]:
    """One byte string per step, several joined by `SEPARATOR`; encoded pictures are not copied."""
    if not field.shape:
        texts = features.strings(payload, found, field, count)
    else:
        texts = [SEPARATOR.join(row) for row in features.string_lists(payload, found, field, count)]
    return [b"" if frame_index.is_encoded_image(text) else text for text in texts]


def _rows(table: dict[bytes, int], values: Sequence[bytes]) -> np.ndarray:
    return np.array([table.setdefault(value, len(table)) for value in values], np.int32)
