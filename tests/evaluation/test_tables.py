"""What all reports are made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from robovlms_jax.evaluation.report import tables
from robovlms_jax.evaluation.rollout_metrics import Rate


def test_names_stand_left_numbers_right_and_a_bar_in_a_cell_stays_in_it():
    text = tables.markdown(["task", "scene", "success"], [["a|b", "D", "50 %"]], text_columns=2)
    assert text == "| task | scene | success |\n| --- | --- | ---: |\n| a\\|b | D | 50 % |"


def test_numbers_that_do_not_exist_are_words_in_tables_and_null_in_json(tmp_path):
    assert (tables.significant(np.nan), tables.decimals(np.nan), tables.percent(np.nan)) == ("n/a", "", "n/a")
    assert (tables.significant(0.01234), tables.decimals(1.25, 1), tables.percent(0.5)) == ("0.0123", "1.2", "50.0 %")
    tables.write_json(tmp_path / "a.json", {"x": np.array([1.0, np.inf]), "y": (np.float32(0.5), float("nan"))})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1.0, None], "y": [0.5, None]}


@pytest.mark.parametrize("attempts", [1, 7, 1000])
def test_intervals_are_the_score_intervals_by_their_formula(attempts):
    # Wilson 1927, with the 97.5 % quantile of the normal distribution.
    z2 = 1.959963984540054**2
    for successes in {0, 1, attempts // 2, attempts}:
        p, low, high = successes / attempts, *Rate(successes, attempts).interval
        centre, half = p + z2 / (2 * attempts), np.sqrt(z2 * (p * (1 - p) + z2 / (4 * attempts)) / attempts)
        expected = np.array([centre - half, centre + half]) / (1 + z2 / attempts)
        np.testing.assert_allclose([low, high], np.clip(expected, 0, 1), atol=1e-12)
