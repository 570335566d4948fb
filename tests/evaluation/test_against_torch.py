"""The benchmark against PyTorch compares two programs that compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import against_torch


@pytest.fixture(scope="module")
def sides():
    model = against_torch.make_model(layers=1, width=32, image=32, window=3)
    batch, threads = against_torch.make_batch(model), torch.get_num_threads()
    yield against_torch.ours(model, batch), against_torch.torchs(model, batch, 1)
    torch.set_num_threads(threads)


SECTIONS = [pytest.param("training", marks=pytest.mark.slow), "forward", "control"]


@pytest.mark.parametrize("section", SECTIONS)
def test_both_sides_compute_the_same(sides, section, exact_matmul):
    # Three updates; as many control steps as fill the window, and one more. A missing norm, another order of tokens or
    # an optimizer with other settings shows.
    ours, theirs = (side[section] for side in sides)
    first = None
    for _ in range(4 if section == "control" else 3):
        found, expected = np.asarray(ours()), np.asarray(theirs())
        np.testing.assert_allclose(found, expected, atol=2e-5)
        first = expected if first is None else first
    if section != "forward":
        assert np.abs(expected - first).max() > 1e-6  # later steps are not the first one again


def test_times_are_compared_turn_against_turn_and_fastest_against_fastest():
    found = against_torch.summarize({"ours": [[1.0, 1.0], [4.0, 4.0]], "torch": [[2.0, 2.0], [16.0, 4.0]]})
    assert found["times_of_torch"] == pytest.approx((0.5 + 0.4) / 2)
    assert found["times_of_torch_fastest"] == pytest.approx(0.5)
