"""TFRecord framing and the wire format, against TFDS' own parser and hand-made bytes."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.data import features, records, rlds_writer, storage
from tests.data import toy_rlds


def read(data: bytes) -> list[records.Record | records.Damage]:
    return list(records.tfrecords(io.BytesIO(data), len(data)))


PAYLOADS = [b"first", b"", b"x" * 300, b"last one"]
FILE = b"".join(map(records.frame, PAYLOADS))
STARTS = np.cumsum([0, *(len(records.frame(payload)) for payload in PAYLOADS)]).tolist()


def test_masked_crc_is_the_published_one():
    # CRC32C of 32 zero bytes is 0x8a9136aa (RFC 3720, B.4); the mask is TFRecord's.
    crc = 0x8A9136AA
    assert records.masked_crc(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_records_come_back_with_their_places():
    assert [record.payload for record in read(FILE)] == PAYLOADS
    assert all(FILE[r.offset : r.offset + len(r.payload)] == r.payload for r in read(FILE))


@pytest.mark.parametrize("position", [3, 9, STARTS[2] + 2, STARTS[2] + 40, STARTS[3] - 1])
def test_one_flipped_bit_costs_one_record(position):
    damaged = bytearray(FILE)
    damaged[position] ^= 0x10
    found = read(bytes(damaged))
    lost = 0 if position < STARTS[1] else 2
    assert [r.payload for r in found if isinstance(r, records.Record)] == [
        p for i, p in enumerate(PAYLOADS) if i != lost
    ]
    (damage,) = [item for item in found if isinstance(item, records.Damage)]
    assert (damage.offset, damage.offset + damage.length) == (STARTS[lost], STARTS[lost + 1])
    assert "CRC" in damage.reason


def test_a_truncated_file_keeps_what_is_whole():
    for cut in (STARTS[3] + 4, STARTS[3] + 15):
        found = read(FILE[:cut])
        assert [r.payload for r in found[:-1]] == PAYLOADS[:3]
        assert found[-1].offset == STARTS[3] and "ends within" in found[-1].reason


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.lists(st.floats(width=32, allow_nan=False), max_size=9)
)
def test_numbers_survive_the_wire(ints, floats):
    fields = (
        features.Field("a", "tensor", "int64", (len(ints),)),
        features.Field("b", "tensor", "float32", (len(floats),)),
    )
    payload = rlds_writer.encode_example(fields, {"a": np.array([ints], np.int64), "b": np.array([floats], np.float32)})
    found = records.features_of(payload)
    np.testing.assert_array_equal(records.ints_of(payload, found["a"]), np.array(ints, np.int64))
    np.testing.assert_array_equal(records.floats_of(payload, found["b"]), np.array(floats, np.float32))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_examples_raise_and_nothing_else(data):
    """Whatever the bytes, parsing ends with values or one of two errors: no hang, no other exception."""
    payload = bytearray(rlds_writer.encode_example(toy_rlds.FIELDS, toy_rlds.episode(0, 3)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(payload[: data.draw(st.integers(1, len(payload)))])
    fields = {field.path: field for field in toy_rlds.FIELDS}
    found = {}
    with contextlib.suppress(records.WireError, features.FieldError, ValueError, OSError, SyntaxError):
        found = features.decode(payload, fields)
    assert set(found) <= set(fields)


def flatten(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, name))
        elif "/".join((*path, name)) == "steps":
            steps = [dict(flatten(step)) for step in value]
            for key in steps[0]:
                values = [np.asarray(step[key]) for step in steps]
                ragged = len({x.shape for x in values}) > 1
                yield f"steps/{key}", [tuple(x) for x in values] if ragged else np.stack(values)
        else:
            yield "/".join((*path, name)), np.asarray(value)


def assert_equal_to_tfds(directory, splits=("train",)):
    """Every field of every record, decoded by us and by TFDS' NumPy parser."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_parser

    info = tfds.builder_from_directory(directory).info
    parser = example_parser.ExampleParserNp(info.features.get_serialized_info())
    fields = features.read((directory / "features.json").read_text(), "features.json")
    count = 0
    for split in splits:
        for path in info.splits[split].filepaths:
            with storage.Directory(str(path)).open() as file:
                size = storage.Directory(str(path)).stamp()["size"]
                for record in records.tfrecords(file, size):
                    expected = dict(flatten(info.features.decode_example_np(parser.parse_example(record.payload))))
                    found = features.decode(record.payload, fields)
                    assert found.keys() == expected.keys()
                    for name, value in expected.items():
                        if isinstance(value, list):
                            assert found[name] == value, (record.offset, name)
                            continue
                        assert np.array_equal(found[name], value), (record.offset, name)
                        # TFDS leaves an episode's int32 as the int64 it was stored as; the kind must agree.
                        if value.dtype.kind not in "OS":
                            assert np.asarray(found[name]).dtype.kind == value.dtype.kind, name
                    count += 1
    return count


def test_every_field_of_the_bridge_sample_is_what_tfds_reads(shared_data):
    assert assert_equal_to_tfds(shared_data / "bridge_dataset" / "1.0.0", ("train", "val")) == 50


def test_every_kind_of_field_is_what_tfds_reads(tmp_path):
    # TFDS opens what our writer wrote: features.json, dataset_info.json and shards are its own format.
    assert assert_equal_to_tfds(toy_rlds.write(tmp_path, shard_bytes=1)) == 6


def test_tfds_opens_array_records_of_ours_as_a_data_source(tmp_path):
    # What the extra `tfds` is for: other projects read what convert_data writes, at random and without TensorFlow.
    import tensorflow_datasets as tfds

    written = [toy_rlds.episode(seed, 3 + seed) for seed in range(2)]
    directory = toy_rlds.write(tmp_path, written, file_format="array_record")
    source = tfds.builder_from_directory(directory).as_data_source("train")
    assert len(source) == 2
    for values, found in zip(written, (source[index] for index in range(2)), strict=True):
        actions = np.stack([step["action"] for step in found["steps"]])
        np.testing.assert_array_equal(actions, values["steps/action"])
        assert found["steps"][0]["observation"]["image"].shape == (32, 32, 3)
