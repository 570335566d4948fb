"""Work in processes is the work done here: the same results, all progress counted, errors raised."""

from __future__ import annotations

import functools

import pytest

from robovlms_jax.data import workers


def square(offset: int, number: int, advance: workers.Advance) -> int:
    advance(number)
    if number == 13:
        raise ValueError("13 cannot be done.")
    return number**2 + offset


@pytest.mark.parametrize("count", [1, 2])
def test_every_job_is_done_and_its_progress_counted_wherever_it_runs(count):
    numbers, progress = [3, 1, 4, 1, 5], []
    work = functools.partial(square, 10)
    found = dict(workers.completed(work, [(n,) for n in numbers], workers=count, advance=progress.append))
    assert found == {position: n**2 + 10 for position, n in enumerate(numbers)}
    assert sum(progress) == sum(numbers)


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_a_job_is_raised(count):
    with pytest.raises(ValueError, match="13 cannot be done"):
        list(workers.completed(functools.partial(square, 0), [(13,), (1,)], workers=count, advance=lambda n: None))
