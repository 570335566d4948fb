"""What a report calls real where several settings are compared with a best that was chosen afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from robovlms_jax.search import queue, report


def ranked(values):
    trials = [
        queue.Trial(i, {"rate": name}, seed, "done", float(value))
        for i, (name, seed, value) in enumerate((n, s, v) for n, some in values.items() for s, v in enumerate(some))
    ]
    return report.rank(trials, "maximize")


def test_of_equal_settings_a_quarter_of_searches_has_one_that_looks_different_and_few_one_that_is_called_real():
    draws = np.random.default_rng(0).normal(size=(100, 5, 3))
    found = [ranked(dict(zip("abcde", values))) for values in draws]
    alone = np.mean([any(x.noise is False for x in some) for some in found])
    assert 0.14 < alone < 0.37  # 0.25 of 20,000
    assert np.mean([bool(report.beyond_chance(some)) for some in found]) < 0.14  # 0.07 of 20,000


@pytest.mark.parametrize(
    ("others", "verdict", "said"),
    [
        ({"b": [0.40, 0.33, 0.18]}, "real by itself", "1 of 4 differences, called real by itself, may be chance"),
        ({"b": [0.300, 0.201, 0.099]}, "real", None),
    ],
)
def test_a_difference_that_is_one_of_several_is_called_real_where_all_of_them_leave_it(others, verdict, said):
    best = {"a": [0.5, 0.4, 0.3]}
    noise = {"c": [0.5, 0.3, 0.35], "d": [0.3, 0.5, 0.3], "e": [0.2, 0.4, 0.4]}
    found = ranked(best | others | noise)
    assert [x.setting["rate"] for x in found if x.noise is False] == ["b"]
    row = next(line for line in report._table(found, ["rate"]).splitlines() if line.startswith("| b "))
    assert row.rstrip(" |").endswith(f"| {verdict}")
    assert (said in report._verdict(found)) if said else "by itself" not in report._verdict(found)
