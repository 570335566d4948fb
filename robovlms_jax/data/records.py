"""Record files of TFDS without TensorFlow: TFRecord framing, and the wire format of `tf.train.Example`.

Only positions are computed here; images stay where they are. Formats:

- TFRecord: per record uint64 length, uint32 masked CRC32C of these 8 bytes, payload, uint32 masked CRC32C of the
  payload, all little endian.
- Example: message {1: Features {1: map<string, Feature>}}; a Feature is one of {1: BytesList, 2: FloatList, 3:
  Int64List}, each a repeated field 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO, NamedTuple

import google_crc32c
import numpy as np

_HEADER = 12
_SCAN = 1 << 22
"""Bytes searched at a time for the next intact record."""


class Record(NamedTuple):
    """An intact record: position of its payload in the file, and the payload."""

    offset: int
    payload: bytes


class Damage(NamedTuple):
    """Bytes that hold no intact record: where they begin, how many there are, and what is wrong with them."""

    offset: int
    length: int
    reason: str


def masked_crc(data: bytes | memoryview) -> int:
    """CRC32C as TFRecord files store it."""
    crc = google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """`payload` as a TFRecord."""
    header = struct.pack("<Q", len(payload))
    return b"".join((header, struct.pack("<I", masked_crc(header)), payload, struct.pack("<I", masked_crc(payload))))


def tfrecords(file: IO[bytes], size: int) -> Iterator[Record | Damage]:
    """All records of a TFRecord file in order, every CRC checked; what lies between intact records comes as Damage.

    After a damaged header the next one is searched for, so one flipped bit costs one record.

    Args:
      file: positioned at its start, seekable.
      size: its bytes.
    """
    position = 0
    while position < size:
        problem = ""
        header = file.read(_HEADER)
        if len(header) < _HEADER:
            problem = f"the file ends within a record's header ({len(header)} of {_HEADER} bytes)"
        else:
            length, crc = struct.unpack("<QI", header)
            if masked_crc(header[:8]) != crc:
                problem = "the CRC of a record's length is wrong"
            elif position + _HEADER + length + 4 > size:
                problem = f"the file ends within a record of {length} bytes"
        if not problem:
            payload = file.read(length)
            footer = file.read(4)
            if len(payload) == length and len(footer) == 4 and masked_crc(payload) == struct.unpack("<I", footer)[0]:
                yield Record(position + _HEADER, payload)
            else:
                yield Damage(position, _HEADER + length + 4, "the CRC of a record is wrong")
            position += _HEADER + length + 4
            continue
        following = _find_record(file, position + 1, size)
        yield Damage(position, following - position, problem)
        position = following
        file.seek(position)


def _find_record(file: IO[bytes], position: int, size: int) -> int:
    """Where the next intact record begins, at or after `position`; `size` when there is none."""
    while position + _HEADER + 4 <= size:
        file.seek(position)
        block = np.frombuffer(file.read(_SCAN + _HEADER - 1), np.uint8)
        count = len(block) - _HEADER + 1
        if count <= 0:
            break
        crc = np.full(count, 0xFFFFFFFF, np.uint32)
        for index in range(8):
            crc = _CRC_TABLE[(crc ^ block[index : index + count]) & 0xFF] ^ (crc >> 8)
        crc ^= np.uint32(0xFFFFFFFF)
        crc = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
        stored = np.zeros(count, np.uint32)
        for index in range(4):
            stored |= block[8 + index : 8 + index + count].astype(np.uint32) << (8 * index)
        for candidate in np.flatnonzero(crc == stored).tolist():
            length = int.from_bytes(block[candidate : candidate + 8].tobytes(), "little")
            begin = position + candidate
            if begin + _HEADER + length + 4 > size:
                continue
            file.seek(begin + _HEADER)
            payload = file.read(length)
            if masked_crc(payload) == int.from_bytes(file.read(4), "little"):
                return begin
        position += count
    return size


def _crc_table() -> np.ndarray:
    """uint32[256], CRC32C (Castagnoli, reflected polynomial 0x82F63B78) of each byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


_CRC_TABLE = _crc_table()


class WireError(ValueError):
    """Bytes that are no `tf.train.Example`."""


class Feature(NamedTuple):
    """Where one entry of an Example lies within its payload.

    kind: "bytes", "float" or "int64"; "" when the feature is empty and does not say.
    start, end: the BytesList, FloatList or Int64List without its own tag and length.
    """

    kind: str
    start: int
    end: int


_KINDS = {1: "bytes", 2: "float", 3: "int64"}


def features_of(payload: bytes) -> dict[str, Feature]:
    """Key -> place of every entry of an Example. Raises WireError."""
    found: dict[str, Feature] = {}
    for number, start, end in _messages(payload, 0, len(payload)):
        if number != 1:
            continue
        for inner, first, last in _messages(payload, start, end):
            if inner != 1:
                continue
            key, feature = "", Feature("", last, last)
            for part, begin, stop in _messages(payload, first, last):
                if part == 1:
                    try:
                        key = payload[begin:stop].decode()
                    except UnicodeDecodeError as error:
                        raise WireError(f"a key at byte {begin} is no text") from error
                elif part == 2:
                    for kind, a, b in _messages(payload, begin, stop):
                        if kind in _KINDS:
                            feature = Feature(_KINDS[kind], a, b)
            found[key] = feature
    return found


def spans_of(payload: bytes, feature: Feature) -> tuple[list[int], list[int]]:
    """(starts, lengths) within the payload of the entries of a BytesList. Raises WireError."""
    _require(feature, "bytes")
    starts, lengths = [], []
    for number, start, end in _messages(payload, feature.start, feature.end):
        if number == 1:
            starts.append(start)
            lengths.append(end - start)
    return starts, lengths


def strings_of(payload: bytes, feature: Feature) -> list[bytes]:
    """The entries of a BytesList. Raises WireError."""
    starts, lengths = spans_of(payload, feature)
    return [payload[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def floats_of(payload: bytes, feature: Feature) -> np.ndarray:
    """float32[n], the values of a FloatList. Raises WireError."""
    _require(feature, "float")
    parts = []
    position = feature.start
    while position < feature.end:
        tag, position = _varint(payload, position, feature.end)
        if tag == 0x0A:  # packed
            length, position = _varint(payload, position, feature.end)
        elif tag == 0x0D:  # one value
            length = 4
        else:
            raise WireError(f"tag {tag} in a FloatList at byte {position}")
        if length % 4 or position + length > feature.end:
            raise WireError(f"a FloatList at byte {position} has a part of {length} bytes")
        parts.append(np.frombuffer(payload, "<f4", length // 4, position))
        position += length
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])


def ints_of(payload: bytes, feature: Feature) -> np.ndarray:
    """int64[n], the values of an Int64List. Raises WireError."""
    _require(feature, "int64")
    parts = []
    position = feature.start
    while position < feature.end:
        tag, position = _varint(payload, position, feature.end)
        if tag == 0x0A:
            length, position = _varint(payload, position, feature.end)
            if position + length > feature.end:
                raise WireError(f"an Int64List at byte {position} has a part of {length} bytes")
            parts.append(_varints(np.frombuffer(payload, np.uint8, length, position)))
            position += length
        elif tag == 0x08:
            value, position = _varint(payload, position, feature.end)
            parts.append(np.array([value], np.uint64).view(np.int64))
        else:
            raise WireError(f"tag {tag} in an Int64List at byte {position}")
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])


def _require(feature: Feature, kind: str) -> None:
    if feature.kind not in (kind, ""):  # an empty feature names no kind
        raise WireError(f"holds {feature.kind} values, expected {kind}")


def _varints(data: np.ndarray) -> np.ndarray:
    """int64[n] of uint8 bytes that are packed varints."""
    last = data < 0x80
    if last.all():
        return data.astype(np.int64)
    ends = np.flatnonzero(last)
    if not len(ends) or ends[-1] != len(data) - 1:
        raise WireError("an Int64List ends within a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise WireError("an Int64List has a number of more than 64 bits")
    values = np.zeros(len(ends), np.uint64)
    for index in range(int(lengths.max())):
        more = lengths > index
        values[more] |= (data[starts[more] + index] & np.uint8(0x7F)).astype(np.uint64) << np.uint64(7 * index)
    return values.view(np.int64)


def _messages(payload: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of the length-delimited fields of a message; others are passed over."""
    while position < end:
        tag, position = _varint(payload, position, end)
        wire = tag & 7
        if wire == 2:
            length, position = _varint(payload, position, end)
            if position + length > end:
                raise WireError(f"a field at byte {position} has {length} bytes, {end - position} are left")
            yield tag >> 3, position, position + length
            position += length
        elif wire == 0:
            _, position = _varint(payload, position, end)
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        else:
            raise WireError(f"wire type {wire} at byte {position}")
    if position > end:
        raise WireError(f"a message ends at byte {position}, expected {end}")


def _varint(payload: bytes, position: int, end: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = shift = 0
    while position < end:
        byte = payload[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
        shift += 7
        if shift > 63:
            break
    raise WireError(f"a number at byte {position} does not end")
