"""openpi's and vla-eval's arrays, and everything that is none."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from robovlms_jax.deploy import codec

msgpack = pytest.importorskip("msgpack")

BOUNDS = codec.Bounds()
TYPES = st.sampled_from(["<f4", ">f8", "|u1", "<i2", "<i8", "|b1", "<f2", "<U5", "|S3"])
ARRAY = TYPES.flatmap(lambda t: arrays.arrays(t, arrays.array_shapes(min_dims=0, min_side=0, max_side=4)))


def test_openpis_test_vector():
    packed = codec.pack({"a": np.array([1, 2], "<i2")})
    assert packed.hex() == (
        "81a16184c40b5f5f6e6461727261795f5fc3c40464617461c40401000200c4056474797065a33c6932c40573686170659102"
    )


@given(ARRAY, st.booleans())
def test_arrays_come_back_as_they_were_and_can_be_written_to(array, text_keys):
    back = codec.unpack(codec.pack({"x": [array]}, text_keys=text_keys), BOUNDS)["x"][0]
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == np.ascontiguousarray(array).tobytes()
    assert back.flags.writeable


def test_numbers_and_text_come_back():
    value = {"a": np.float32(0.5), "b": np.int8(-3), "c": None, "d": [True, 1.5, "왼쪽", b"x"], "e": np.bool_(True)}
    back = codec.unpack(codec.pack(value), BOUNDS)
    assert back == value and back["a"].dtype == np.float32


@pytest.mark.parametrize("value", [np.zeros(2, complex), np.array([{}]), np.zeros(2, [("a", "i4")])])
def test_arrays_of_objects_are_not_packed(value):
    with pytest.raises(ValueError, match="cannot be sent"):
        codec.pack(value)


def test_what_is_no_numpy_array_is_named():
    with pytest.raises(TypeError, match="a set cannot be sent"):
        codec.pack({"x": {1, 2}})


def entry(**changes):
    whole = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({"x": whole | {name.encode(): value for name, value in changes.items()}})


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (entry(shape=[3]), "needs 12 bytes and has 8"),
        (entry(shape=[-1, -2]), "shape is"),
        (entry(shape=[2**31]), "shape is"),
        (entry(shape=[2**30, 2**30, 2**30, 0, 1, 1, 1, 1, 1]), "shape is"),
        (entry(shape=[True]), "shape is"),
        (entry(shape="2"), "shape is"),
        (entry(dtype="O"), "expected numbers"),
        (entry(dtype="<c16"), "expected numbers"),
        (entry(dtype="V8"), "expected numbers"),
        (entry(dtype="f4,f4"), "expected numbers"),
        (entry(dtype="<U999999999"), "not understood|needs"),
        (entry(dtype="no"), "dtype is 'no'"),
        (entry(dtype=7), "expected a text"),
        (entry(data="text"), "data are a str"),
        (entry(dtype="<U0", shape=[10**6], data=b""), "texts without characters"),
        (msgpack.packb({"x": {b"__npgeneric__": True, b"data": "a", b"dtype": "<f4"}}), "is no float32"),
        (msgpack.packb({1: 2}), "cannot be read"),
        (b"", "cannot be read"),
        (b"\xc1", "cannot be read|no msgpack"),
        (msgpack.packb([0] * 5000), "cannot be read"),
        (msgpack.packb("x" * 5000), "cannot be read"),
        (b"\x91" * 5000 + b"\xc0", "cannot be read|no msgpack"),
        (b"\xdf\xff\xff\xff\xff", "cannot be read|no msgpack"),
        (msgpack.packb(msgpack.ExtType(1, b"x")), "cannot be read"),
        (msgpack.packb({"x": {"__image__": True, "format": "png", "data": "text"}}), "data are no bytes"),
    ],
)
def test_a_hostile_message_is_refused_and_says_why(content, what):
    with pytest.raises(ValueError, match=what):
        codec.unpack(content, BOUNDS)


def test_a_message_that_is_too_large_is_refused_before_it_is_read():
    with pytest.raises(ValueError, match="at most 10 are read"):
        codec.unpack(codec.pack(np.zeros(100)), codec.Bounds(message_bytes=10))


@settings(max_examples=300)
@given(st.binary(max_size=64), st.integers(0, 200), st.binary(max_size=8))
@example(b"", 10, b"")
def test_damaged_messages_raise_nothing_but_value_errors(noise, cut, middle):
    whole = codec.pack({"image": np.zeros((2, 2, 3), np.uint8), "prompt": "x", "n": np.float32(1)})
    for damaged in (noise, whole[:cut], whole[:cut] + middle + whole[cut + len(middle) :]):
        with contextlib.suppress(ValueError):
            codec.unpack(damaged, BOUNDS)
        assert codec.unpack(whole, BOUNDS)["prompt"] == "x"  # what came before does not matter to a good message


def test_many_small_things_are_bounded_together():
    # Each list and map was bounded alone: 8 MiB of empty maps took seconds, 100 small PNG files a gigabyte.
    whole = codec.Bounds(items_in_all=100, pictures=2)
    with pytest.raises(ValueError, match="more than 100 entries"):
        codec.unpack(msgpack.packb([[{} for _ in range(20)] for _ in range(20)]), whole)
    codec.unpack(msgpack.packb([[{} for _ in range(5)] for _ in range(5)]), whole)
    picture = {"__image__": True, "format": "png", "data": b"x"}
    codec.unpack(msgpack.packb([picture] * 2), whole)
    with pytest.raises(ValueError, match="more than 2 compressed pictures"):
        codec.unpack(msgpack.packb([picture] * 50), whole)
    large = codec.Bounds(pixels=3)
    first, second = codec.unpack(msgpack.packb([picture] * 2), large, lambda data: np.zeros((2, 1, 3), np.uint8))
    assert first.pixels().shape == (2, 1, 3)
    with pytest.raises(ValueError, match="more than 3 pixels in them"):
        second.pixels()


@pytest.mark.parametrize("kind", ["png", "bmp", 3])
def test_a_compressed_picture_that_cannot_be_decoded_is_refused_by_who_reads_it(kind):
    message = msgpack.packb({"x": {"__image__": True, "format": kind, "data": b"x"}})
    read = codec.unpack(message, BOUNDS, None if kind == "png" else lambda data: np.zeros((1, 1, 3), np.uint8))
    with pytest.raises(ValueError, match=f"format '{kind}' is not read here"):
        read["x"].pixels()


@pytest.mark.parametrize("data", [5, 10**10, True, 2.5])
def test_a_text_that_is_a_number_is_refused_and_makes_no_bytes(data):
    """NumPy's bytes_(10**10) is ten gigabytes of zeros, from a message of thirty."""
    with pytest.raises(ValueError, match="expected text"):
        codec.unpack(msgpack.packb({"__npgeneric__": True, "data": data, "dtype": "S1"}), BOUNDS)


def test_a_text_in_an_array_is_no_longer_than_one_outside():
    assert codec.unpack(codec.pack(np.array("가" * 4096)), BOUNDS).item() == "가" * 4096
    for text in (np.array("가" * 4097), np.array(b"a" * 20_000)):
        with pytest.raises(ValueError, match="at most 4096 characters"):
            codec.unpack(codec.pack(text), BOUNDS)


def test_what_a_message_has_is_quoted_without_being_written_out_whole():
    class Written(bytes):
        def __str__(self):
            raise AssertionError("all of it is written out")

    assert codec.brief(Written(b"a" * 100), 10) == "b'aaaaaaaa"
    assert codec.brief([1, -2, b"x" * 100, [3]], 80).startswith("[1, -2, b'xxx")
    assert codec.brief({"a": b"x" * 100}, 80) == "dict"
    assert codec.brief(np.zeros((2, 3)), 80) == "float64[2, 3]"
    assert codec.brief(True, 80) == "True"
