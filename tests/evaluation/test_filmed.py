"""Which trials' films are kept."""

from __future__ import annotations

import types

import hypothesis
from hypothesis import strategies as st

from robovlms_jax.evaluation.filmed import FailuresFirst


def kept(tasks, solved, order, most):
    """(trial, solved) of the films that are kept when trials end in some order."""
    trials = [types.SimpleNamespace(index=i, tasks=(task,)) for i, task in enumerate(tasks)]
    chosen = FailuresFirst(trials, most)
    assert list(chosen.films.trials) == (list(range(len(trials))) if most else [])
    for index in order if most else ():
        result = types.SimpleNamespace(success=(solved[index],))
        chosen.films.keep(types.SimpleNamespace(trial=trials[index], result=result))
    return [(recording.trial.index, recording.result.success[-1]) for recording in chosen.recordings()]


def test_nine_failures_among_two_hundred_fill_all_films_but_one():
    failed = {26, 28, 30, 101, 103, 110, 190, 191, 199}
    found = kept([f"task {i // 25}" for i in range(200)], [i not in failed for i in range(200)], range(200), 8)
    assert [solved for _, solved in found] == [False] * 7 + [True]
    # One of each of the three tasks that fail (1, 4, 7), then second and third ones.
    assert [index for index, _ in found] == [26, 28, 30, 101, 103, 190, 191, 0]


def test_without_failures_solved_trials_are_spread():
    assert kept(["a"] * 8, [True] * 8, range(8), 4) == [(0, True), (2, True), (4, True), (6, True)]
    assert kept(["a"] * 8, [False] * 8, range(8), 2) == [(0, False), (1, False)]
    assert kept(["a", "a"], [True, False], range(2), 1) == [(1, False)] and kept(["a"], [True], range(1), 0) == []


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=50, deadline=None)
def test_the_order_in_which_trials_end_changes_nothing(data):
    trials = data.draw(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=12))
    tasks, solved = zip(*trials, strict=True)
    order, most = data.draw(st.permutations(range(len(trials)))), data.draw(st.integers(0, 6))
    found = kept(tasks, solved, order, most)
    assert found == kept(tasks, solved, range(len(trials)), most)
    assert len(found) == min(most, len(trials))
