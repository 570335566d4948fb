"""The arithmetic of policy gradients against numbers worked out by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax.rl import behaviours, estimates


def test_advantages_are_those_of_the_worked_example():
    rewards, values = jnp.array([0.0, 0.0, 1.0]), jnp.array([0.5, 0.6, 0.7, 0.0])
    ended, cut = jnp.array([False, False, True]), jnp.array([False, False, True])
    found = estimates.advantages(rewards, values, ended, cut, discount=0.99, trace=0.95)
    np.testing.assert_allclose(found, [0.446829, 0.37515, 0.3], atol=1e-6)


def test_a_trial_that_was_cut_off_goes_on_in_its_value_and_no_further():
    """The third decision's time was up: what follows it is worth its value. What comes behind is another trial's."""
    rewards, values = jnp.array([0.0, 0.0, 0.0, 1.0]), jnp.array([0.5, 0.6, 0.7, 0.8, 0.0])
    cut = jnp.array([False, False, True, True])
    ended = jnp.array([False, False, False, True])
    found = estimates.advantages(rewards, values, ended, cut, discount=0.99, trace=0.95)
    third = 0.99 * 0.8 - 0.7
    second = 0.99 * 0.7 - 0.6 + 0.99 * 0.95 * third
    np.testing.assert_allclose(found, [0.99 * 0.6 - 0.5 + 0.99 * 0.95 * second, second, third, 0.2], atol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss"),
    [(1, 1.5, -1.28), (1, 0.5, -0.5), (-1, 0.5, 0.8), (-1, 1.5, 1.5), (-1, 5.0, 3.0)],
)
def test_the_clipped_loss_is_bounded_above_below_and_twice_where_the_advantage_is_negative(advantage, ratio, loss):
    found = estimates.clipped_loss(jnp.float32(advantage), jnp.float32(ratio), low=0.2, high=0.28)
    np.testing.assert_allclose(found, loss, rtol=1e-6)


def test_without_a_second_bound_a_bad_action_costs_as_much_as_its_ratio():
    found = estimates.clipped_loss(jnp.float32(-1), jnp.float32(5), low=0.2, high=0.28, dual=None)
    assert found == 5


def test_the_divergence_is_that_of_the_worked_example():
    np.testing.assert_allclose(estimates.divergence(jnp.log(1.2), jnp.float32(0)), 0.015655, atol=1e-6)


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_the_divergence_is_never_negative(log_prob, reference):
    assert estimates.divergence(jnp.float32(log_prob), jnp.float32(reference)) >= -1e-6


def test_advantages_of_a_group_are_those_of_the_worked_example_and_zero_where_all_are_equal():
    returns = jnp.array([1.0, 0, 0, 0, 1, 0, 0, 0, 1, 1])
    groups = jnp.array([0] * 8 + [1] * 2)
    found = estimates.group_advantages(returns, groups, 3)
    expected = [1.62018, *[-0.54006] * 3, 1.62018, *[-0.54006] * 3, 0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_standardised_values_look_at_what_counts_alone():
    values, weights = jnp.array([1.0, 3.0, 1e9]), jnp.array([1.0, 1.0, 0.0])
    np.testing.assert_allclose(estimates.standardised(values, weights)[:2], [-1, 1], atol=1e-5)


def test_a_value_that_moved_too_far_is_pulled_back_by_its_clipped_self():
    args = (jnp.float32(1.0), jnp.float32(0.0), jnp.float32(1.0))
    assert estimates.value_loss(*args, clip=0, delta=10) == 0
    np.testing.assert_allclose(estimates.value_loss(*args, clip=0.2, delta=10), 0.5 * 0.8**2, rtol=1e-6)
    far = estimates.value_loss(jnp.float32(0.0), jnp.float32(0.0), jnp.float32(30.0), clip=0.2, delta=10)
    np.testing.assert_allclose(far, 10 * (30 - 5))


def test_a_value_that_says_nothing_explains_nothing():
    target, weights = jnp.array([0.0, 1.0, 2.0]), jnp.ones(3)
    np.testing.assert_allclose(estimates.explained_variance(target, target, weights), 1)
    np.testing.assert_allclose(estimates.explained_variance(jnp.zeros(3), target, weights), 0, atol=1e-6)


def test_steps_of_a_noisy_flow_are_those_of_the_worked_example():
    """sigma and the weights of the noise for n = 4, a = 0.5, in this project's direction of time."""
    of_actions, of_noise, std = behaviours.flow_step(jnp.arange(4) / 4, 0.25, 0.5)
    np.testing.assert_allclose(std / 0.5, [1, 0.86603, 0.5, 0.28868], atol=1e-5)
    np.testing.assert_allclose(of_noise, [0.625, 0.375, 0.1875, -0.04167], atol=1e-5)
    np.testing.assert_allclose(of_actions, [0.25, 0.5, 0.75, 1.0], atol=1e-6)
