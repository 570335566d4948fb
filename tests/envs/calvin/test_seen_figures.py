"""Figures of docs/calvin.md, "Taught where blocks lie", against the chains that were played."""

from __future__ import annotations

import pytest

from tests.envs.calvin.chains_summary import pair, summary, table
from tests.test_figures import page, result


@pytest.fixture(scope="module")
def found():
    return result("calvin_small/results")


@pytest.fixture(scope="module")
def rows(found):
    return found["calvin_seen"]["chains_on_d"]


def test_every_row_is_what_its_chains_come_to(rows):
    for name, row in rows.items():
        assert row == summary(row["solved_in_each"]), name


def test_every_comparison_is_what_its_chains_come_to(found, rows):
    """Fails if a p value, an interval or a count of first tasks is not that of the chains."""
    digits = {name: found[name]["chains_on_d"]["solved_in_each"] for name in ("calvin_full", "calvin_small")}
    digits |= {name: row["solved_in_each"] for name, row in rows.items()}
    for names, told_pair in found["calvin_seen"]["paired"].items():
        one, other = names.split(", ")[:2]
        first, count = told_pair["from"], told_pair["chains"]
        computed = pair(*(digits[name][first : first + count] for name in (one, other)))
        assert told_pair == {"from": first, "chains": count} | computed, names


def test_the_pages_tables_are_those_of_the_rows(found, rows):
    text = page("calvin.md")
    full = summary(found["calvin_full"]["chains_on_d"]["solved_in_each"])
    for line in table([full, *(rows[name] for name in ("waits_kept_ten", "ten", "unseen_ten"))]):
        assert line in text
