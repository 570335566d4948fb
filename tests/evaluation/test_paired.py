from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robovlms_jax.evaluation import paired


def pairs(both, first, second, neither):
    return [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither


def test_the_interval_of_a_difference_is_the_published_one():
    """Airways before and after transplantation, Fagerland, Lydersen & Laake 2014, Statistics in Medicine 33, 2850."""
    found = paired.difference(pairs(1, 1, 7, 12))
    assert found.value == pytest.approx(-6 / 21)
    assert (round(found.low, 3), round(found.high, 3)) == (-0.517, -0.026)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=4, max_size=4).filter(any))
def test_the_ends_of_an_interval_are_where_the_statistic_is_significant(counts):
    both, first, second, neither = counts
    found = paired.difference(pairs(*counts))
    mirrored = paired.difference(pairs(both, second, first, neither))
    assert (found.low, found.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-9)
    assert -1 <= found.low <= found.value <= found.high <= 1
    for end, sign in ((found.low, 1), (found.high, -1)):
        if abs(end) < 1:
            assert paired._score(first, second, sum(counts), end) == pytest.approx(sign * 1.959964, abs=1e-5)


def test_without_discordant_trials_the_statistic_has_its_closed_form():
    """Share of the second alone is then max(0, -delta), so that z^2 = n delta^2 / (|delta| (1 - |delta|))."""
    found, z2 = paired.difference(pairs(30, 0, 0, 10)), 1.959964**2
    assert found.high == pytest.approx(z2 / (40 + z2), abs=1e-6)
    assert found.low == pytest.approx(-z2 / (40 + z2), abs=1e-6)


def test_power_is_the_published_one():
    """O'Brien 2002, in G*Power's manual (McNemar, exact): one-sided at 5 %, 50 pairs, 32 and 8 % discordant."""
    assert paired.power(50, 0.32, 0.08, alpha=0.10) == pytest.approx(0.839343, abs=5e-5)


def test_power_is_the_sum_over_all_outcomes():
    trials, first, second = 12, 0.45, 0.1
    total = 0.0
    for ones, others in itertools.product(range(trials + 1), repeat=2):
        if 0 < ones + others <= trials and stats.binomtest(ones, ones + others).pvalue <= 0.05:
            total += stats.multinomial.pmf(
                [ones, others, trials - ones - others], trials, [first, second, 1 - first - second]
            )
    assert paired.power(trials, first, second) == pytest.approx(total, abs=1e-9)
    assert paired.power(trials, 0, 0) == 0
    with pytest.raises(ValueError, match=r"first=0\.7 and second=0\.4"):
        paired.power(10, 0.7, 0.4)


def test_without_a_difference_the_test_keeps_its_level():
    assert 0.01 < paired.power(400, 0.1, 0.1) <= 0.05


@pytest.mark.parametrize(("claimed", "discordant"), [(0.1, 0.2), (0.05, 0.2), (0.3, 0.3)])
def test_the_trials_of_a_claim_are_the_fewest_that_suffice_and_near_connors_formula(claimed, discordant):
    found = paired.trials_needed(claimed, discordant)
    halves = (discordant + claimed) / 2, (discordant - claimed) / 2
    assert paired.power(found, *halves) >= 0.8
    assert max(paired.power(trials, *halves) for trials in range(found // 2, found)) < 0.8
    # Connor 1987, Biometrics 43, 207-211, for the test without the exact one's caution
    wanted = 1.96 * math.sqrt(discordant) + 0.8416 * math.sqrt(discordant - claimed**2)
    connor = (wanted / claimed) ** 2
    assert connor < found < 1.2 * connor + 6


def test_a_claim_that_no_number_of_trials_supports_is_said():
    assert paired.trials_needed(0.0005, 0.5) is None
    assert paired.smallest_difference(10, 0.1) is None
    assert paired.smallest_difference(100, 0.0) is None
    with pytest.raises(ValueError, match=r"expected 0 < claimed <= discordant"):
        paired.trials_needed(0.3, 0.2)


def test_a_claim_is_priced_up_to_the_number_of_trials_that_is_named():
    """Above 16 384, the last power of two that the search doubles to."""
    assert 16_384 < paired.trials_needed(0.0094, 0.2) <= 20_000


def test_the_smallest_difference_is_where_power_reaches_its_aim():
    found = paired.smallest_difference(100, 0.2)
    assert paired.power(100, (0.2 + found) / 2, (0.2 - found) / 2) >= 0.8
    assert paired.power(100, (0.2 + found - 0.001) / 2, (0.2 - found + 0.001) / 2) < 0.8


def test_holm_corrects_as_in_the_textbook():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.5, 0.9]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_a_mean_difference_is_paired():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 6, 300)
    same = paired.mean_difference(first, first)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    found = paired.mean_difference(first, np.maximum(first - rng.integers(0, 2, 300), 0))
    spread = np.std(first - np.maximum(first - 1, 0))
    assert found.low < found.value < found.high
    assert found.high - found.low < 4 * max(spread, 0.5) / math.sqrt(300)


def test_the_bias_of_choosing_is_the_expected_maximum_of_equals():
    """Of two equal checkpoints the better half exceeds its truth by sd / sqrt(pi), and the other half not at all."""
    rng, trials = np.random.default_rng(1), 100
    bias, honest = [], []
    for _ in range(400):
        found = paired.selection(rng.uniform(size=(2, trials)) < 0.5, splits=4)
        bias.append(found.optimism)
        honest.append(found.honest)
    expected = math.sqrt(0.25 / (trials / 2)) / math.sqrt(math.pi)
    assert np.mean(bias) == pytest.approx(expected, abs=4 * np.std(bias) / math.sqrt(400))
    assert np.mean(honest) == pytest.approx(0.5, abs=4 * np.std(honest) / math.sqrt(400))


def test_a_checkpoint_that_is_better_is_chosen_on_every_half():
    outcomes = np.zeros((3, 40))
    outcomes[1, :38] = 1
    outcomes[2, :10] = 1
    found = paired.selection(outcomes)
    assert found.chosen == found.chosen_on_half == 1
    assert found.picked == (0.0, 1.0, 0.0)
    assert found.half.low < found.half.value <= found.half.high
    with pytest.raises(ValueError, match=r"shape \(1, 40\), expected at least 2 checkpoints"):
        paired.selection(outcomes[:1])
