import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robovlms_jax.actions import normalize

numbers = st.floats(-3, 3, width=32, allow_subnormal=False)  # jax on CPU flushes subnormals to zero
actions = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(7)), elements=numbers)
bounds = st.tuples(
    hnp.arrays(np.float32, 6, elements=st.floats(-2, 1, width=32)),
    hnp.arrays(np.float32, 6, elements=st.floats(0.125, 2, width=32)),
).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(actions, bounds)
def test_normalized_arm_is_in_range_and_round_trips_inside_the_bounds(x, bounds):
    low, high = bounds
    normalized = normalize.normalize(x, low, high)
    assert normalized.dtype == np.float32
    assert np.abs(normalized[:, :6]).max() <= 1 + 1e-6
    back = normalize.unnormalize(normalized, low, high)
    np.testing.assert_allclose(back[:, :6], np.clip(x[:, :6], low, high), atol=1e-6)


@given(actions, bounds)
def test_gripper_passes_untouched(x, bounds):
    np.testing.assert_array_equal(normalize.normalize(x, *bounds)[:, 6], x[:, 6])
    np.testing.assert_array_equal(normalize.unnormalize(x, *bounds)[:, 6], x[:, 6])


@given(actions, bounds)
def test_unnormalize_then_normalize_is_the_identity_on_the_unit_range(x, bounds):
    unit = np.clip(x, -1, 1)
    np.testing.assert_allclose(normalize.normalize(normalize.unnormalize(unit, *bounds), *bounds), unit, atol=1e-4)


@given(actions)
def test_symmetric_bounds_are_upstreams_formula(x):
    low, high = (-0.65,) * 6, (0.65,) * 6
    np.testing.assert_allclose(
        normalize.normalize(x, low, high)[:, :6], np.clip(x[:, :6], -0.65, 0.65) / 0.65, atol=1e-6
    )
    np.testing.assert_allclose(normalize.unnormalize(x, low, high)[:, :6], 0.65 * x[:, :6], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float32, (2, 7), elements=numbers), bounds)
def test_numpy_and_jax_agree(x, bounds):
    for function in (normalize.normalize, normalize.unnormalize):
        traced = jax.jit(function)(x, *bounds)
        assert isinstance(traced, jax.Array)
        np.testing.assert_allclose(traced, function(x, *bounds), atol=2e-6)
    np.testing.assert_array_equal(normalize.binarize_gripper(jnp.asarray(x)), normalize.binarize_gripper(x))


def test_binarized_gripper_is_exactly_open_or_closed():
    gripper = np.array([-3.0, -1.0, -1e-30, 0.0, 1e-30, 1.0], np.float32)
    binary = normalize.binarize_gripper(gripper)
    assert binary.dtype == np.float32
    assert binary.tolist() == [-1, -1, -1, -1, 1, 1]


def test_bounds_of_the_wrong_length_are_named():
    with pytest.raises(ValueError, match=r"low \(7,\).*\[6\]"):
        normalize.normalize(np.zeros((2, 7), np.float32), np.zeros(7), np.ones(7))
