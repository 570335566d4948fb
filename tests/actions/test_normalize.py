import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robovlms_jax.actions import mu_law, normalize

numbers = st.floats(-3, 3, width=32, allow_subnormal=False)  # jax on CPU flushes subnormals to zero
actions = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(7)), elements=numbers)
bounds = st.tuples(
    hnp.arrays(np.float32, 6, elements=st.floats(-2, 1, width=32)),
    hnp.arrays(np.float32, 6, elements=st.floats(0.125, 2, width=32)),
).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(actions, bounds)
def test_normalized_arm_is_in_range_and_round_trips_inside_the_bounds(x, bounds):
    low, high = bounds
    normalized = normalize.normalize(x, low, high, (6,))
    assert normalized.dtype == np.float32
    assert np.abs(normalized[:, :6]).max() <= 1 + 1e-6
    back = normalize.unnormalize(normalized, low, high, (6,))
    np.testing.assert_allclose(back[:, :6], np.clip(x[:, :6], low, high), atol=1e-6)


@given(actions, bounds)
def test_gripper_passes_untouched(x, bounds):
    np.testing.assert_array_equal(normalize.normalize(x, *bounds, (6,))[:, 6], x[:, 6])
    np.testing.assert_array_equal(normalize.unnormalize(x, *bounds, (6,))[:, 6], x[:, 6])


@given(actions, bounds)
def test_unnormalize_then_normalize_is_the_identity_on_the_unit_range(x, bounds):
    unit = np.clip(x, -1, 1)
    np.testing.assert_allclose(
        normalize.normalize(normalize.unnormalize(unit, *bounds, (6,)), *bounds, (6,)), unit, atol=1e-4
    )


@given(actions)
def test_symmetric_bounds_are_upstreams_formula(x):
    low, high = (-0.65,) * 6, (0.65,) * 6
    np.testing.assert_allclose(
        normalize.normalize(x, low, high, (6,))[:, :6], np.clip(x[:, :6], -0.65, 0.65) / 0.65, atol=1e-6
    )
    np.testing.assert_allclose(normalize.unnormalize(x, low, high, (6,))[:, :6], 0.65 * x[:, :6], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float32, (2, 7), elements=numbers), bounds)
def test_numpy_and_jax_agree(x, bounds):
    for function in (normalize.normalize, normalize.unnormalize):
        traced = jax.jit(lambda x, function=function: function(x, *bounds, (6,)))(x)
        assert isinstance(traced, jax.Array)
        np.testing.assert_allclose(traced, function(x, *bounds, (6,)), atol=2e-6)


def test_bounds_of_the_wrong_length_are_named():
    with pytest.raises(ValueError, match=r"low \(7,\).*\[6\]"):
        normalize.normalize(np.zeros((2, 7), np.float32), np.zeros(7), np.ones(7), (6,))


NORMALIZERS = [
    normalize.Normalizer((-0.65,) * 6, (0.65,) * 6, (6,)),
    normalize.Normalizer((-0.65,) * 6, (0.65,) * 6, (6,), mean=0.1, std=0.5),
    normalize.Normalizer((-1.0, -0.5, -2.0) * 2, (0.5, 0.75, 1.0) * 2, (6,), mu=255.0),
    normalize.Normalizer((-1.0,) * 6, (1.0,) * 6, (6,), mean=-0.05, std=1.5, mu=8.0),
]


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float64, (3, 7), elements=st.floats(-3, 3)), st.sampled_from(NORMALIZERS))
def test_normalizers_are_undone_and_spare_the_gripper(x, normalizer):
    # Upstream never undoes `regular_action` and lets it, and mu-law, run over the gripper.
    y = normalizer.normalize(x)
    np.testing.assert_array_equal(y[:, 6], x[:, 6])
    back = normalizer.unnormalize(y)
    np.testing.assert_allclose(back[:, :6], np.clip(x[:, :6], normalizer.low, normalizer.high), atol=1e-9)
    np.testing.assert_array_equal(back[:, 6], x[:, 6])


def test_normalizer_is_upstreams_formulas_in_upstreams_order():
    x = np.linspace(-1.5, 1.5, 21).reshape(3, 7)
    bounded = np.clip(x, -0.65, 0.65) / 0.65
    regular = (bounded - 0.1) / (0.5 + 1e-6)
    companded = np.sign(regular) * np.log(1 + 255 * np.abs(regular)) / np.log(256)
    ours = normalize.Normalizer((-0.65,) * 6, (0.65,) * 6, (6,), mean=0.1, std=0.5 + 1e-6, mu=255.0).normalize(x)
    np.testing.assert_allclose(ours[:, :6], companded[:, :6], rtol=1e-12)


@given(st.floats(-1, 1, width=32), st.sampled_from([1.0, 8.0, 255.0]))
def test_mu_law_maps_the_unit_range_onto_itself_and_back(value, mu):
    x = np.array([value, -1.0, 0.0, 1.0])
    y = mu_law.compress(x, mu)
    np.testing.assert_allclose(mu_law.expand(y, mu), x, atol=1e-12)
    np.testing.assert_allclose(y[1:], [-1, 0, 1], atol=1e-12)
    assert np.abs(y[0]) >= np.abs(x[0]) * (1 - 1e-12)  # small actions get more room, none less


def test_standardize_is_the_z_score():
    x = np.random.default_rng(0).normal(2, 3, (1000, 7))
    mean, std = x[:, :6].mean(0), x[:, :6].std(0)
    z = normalize.standardize(x, mean, std, (6,))
    np.testing.assert_allclose(z[:, :6].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(z[:, :6].std(0), 1)
    np.testing.assert_allclose(normalize.unstandardize(z, mean, std, (6,)), x)
