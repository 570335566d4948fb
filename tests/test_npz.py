"""Files of named arrays: whatever is wrong with one is said in words that name it."""

from __future__ import annotations

import io

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from robovlms_jax import npz


def whole() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, numbers=np.arange(50.0), words=np.array(["a", "bc"]))
    return file.getvalue()


@hypothesis.given(st.integers(0, len(whole()) - 1), st.integers(0, 8))
@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_file_that_was_cut_off_or_has_a_wrong_bit_is_named_or_means_the_same(tmp_path, place, bit):
    content = bytearray(whole())
    if bit == 8:
        del content[place:]
    else:
        content[place] ^= 1 << bit
    path = tmp_path / "some.npz"
    path.write_bytes(content)
    found, said = {}, str(path)
    try:
        found = npz.read(path)
    except ValueError as error:
        said = str(error)
    assert str(path) in said
    np.testing.assert_array_equal(found.get("numbers", np.arange(50.0)), np.arange(50.0))


def test_a_file_of_one_array_and_none_at_all_are_told_apart(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(2))
    with pytest.raises(ValueError, match=r"one.npy is no file of arrays"):
        npz.read(tmp_path / "one.npy")
    with pytest.raises(FileNotFoundError):
        npz.read(tmp_path / "none.npz")
