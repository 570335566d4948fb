"""Figures of docs/calvin.md, "Taught where blocks lie", against the chains that were played."""

from __future__ import annotations

import pytest

from tests.envs.calvin.chains_summary import pair, summary, table, told
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
    for line in table([full, *(rows[name] for name in ("waits_kept_ten", "ten", "seed_1", "unseen_ten"))]):
        assert line in text


def more(pairing):
    return "({:.2f}, {:.2f} to {:.2f}, more".format(*pairing["more_tasks_in_a_row"])


def span(pairing):
    return "{:.2f}, {:.2f} to {:.2f}".format(*pairing["more_tasks_in_a_row"])


def lifted(row, where):
    counts = [n for task, n in row["tasks_solved_of_asked"].items() if task.startswith("lift") and task.endswith(where)]
    return "{} of {}".format(*map(sum, zip(*counts, strict=True)))


def test_what_is_said_of_the_rows_is_in_them(found, rows):
    """Fails if a sentence of the section gives a figure that the chains do not."""
    text, paired = page("calvin.md"), found["calvin_seen"]["paired"]
    ten, other, kept, unseen = (rows[name] for name in ("ten", "seed_1", "waits_kept_ten", "unseen_ten"))
    lengths = [told(row["average_length"]) for row in (ten, other, unseen)]
    assert (
        "**`calvin_seen` does {}, and {} when trained again with `--train.seed 1`, on a table".format(*lengths) in text
    )
    assert f"`calvin_unseen` does {lengths[2]} on one that is not**" in text
    assert ten["average_length"][1] > 1 and other["average_length"][1] > 1 > unseen["average_length"][1]
    full, again = paired["ten, calvin_full"], paired["seed_1, calvin_full"]
    said = "in {} of the 200 chains, the reverse in {} {} tasks in a row, p = {:.0e})"
    assert said.format(full["this_only"], full["other_only"], more(full), full["p"]) in text
    assert "the second in {this_only} and {other_only} ({}, p = {p:.0e})".format(span(again), **again) in text
    value, low, high = (-x for x in paired["seed_1, ten"]["more_tasks_in_a_row"])
    assert f"the second seed does {value:.2f} ({high:.2f} to {low:.2f}) less" in text
    before = [span(paired[f"{name}, waits_kept_ten"]) for name in ("ten", "seed_1")]
    assert "it is {}, and {}, more".format(*before) in text
    for words, where in (("out of the shelf {} and {} ({} with", "slider"), ("from the table {} and {} ({})", "table")):
        assert words.format(*(lifted(row, where) for row in (ten, other, kept))) in text
    for words, task in (("drawer ({} and {})", "push_into_drawer"), ("stacked ({} and {})", "stack_block")):
        counts = ["{} of {}".format(*row["tasks_solved_of_asked"][task]) for row in (ten, other)]
        assert words.format(*counts) in text
    for name, count in found["calvin_seen"]["recording"].items():
        if name not in ("what", "held_out"):
            assert "{recorded} of {attempted}".format(**count) in text


def test_what_the_first_action_alone_does_is_in_the_rows(found, rows):
    text, first = page("calvin.md"), rows["first"]
    count = first["chains"]
    for line in table([first, summary(rows["ten"]["solved_in_each"][:count])]):
        assert line in text
    assert f"it does {told(first['average_length'])} on the first {count} chains" in text
    assert first["average_length"][1] > 1 and more(found["calvin_seen"]["paired"]["first, calvin_full"]) in text
    rotations = "{} of {}".format(*first["groups"]["rotations"])
    assert f"lifts from the table ({rotations} and {lifted(first, 'table')})" in text


def test_what_a_table_that_was_not_shown_costs_is_in_the_rows(found, rows):
    text, unseen, paired = page("calvin.md"), rows["unseen_ten"], found["calvin_seen"]["paired"]
    small, apart = summary(found["calvin_small"]["chains_on_d"]["solved_in_each"]), paired["unseen_ten, calvin_small"]
    said = "in {this_only} chains, the reverse in {other_only} {} tasks in a row, p = {p:.2f})"
    assert said.format(more(apart), **apart) in text
    low, high = paired["unseen_ten, calvin_full"]["more_tasks_in_a_row"][1:]
    assert low < 0 < high and more(paired["unseen_ten, calvin_full"]) in text
    counts = [row["blocks"][part] for row in (unseen, small) for part in ("count", "of")]
    assert "({} of {}; {} of {} by `calvin_small`)".format(*counts) in text
    assert "the LED {} of {} times ({} of {} by".format(*unseen["groups"]["led"], *small["groups"]["led"]) in text


def test_what_executing_less_of_a_chunk_did_is_in_the_rows(found, rows):
    text, paired = page("calvin.md"), found["calvin_seen"]["paired"]
    five, kept = rows["waits_kept_five"], rows["waits_kept_ten"]["solved_in_each"]
    count = five["chains"]
    full = found["calvin_full"]["chains_on_d"]["solved_in_each"]
    ten, other = summary(kept[:count]), summary(full[:count])
    assert f"does {told(five['average_length'])} on the first {count} of these chains" in text
    assert f"where `calvin_full` does {told(other['average_length'])}: **executed alike, the two are not told" in text
    low, high = paired["waits_kept_five, calvin_full"]["more_tasks_in_a_row"][1:]
    assert low < 0 < high and f"{more(paired['waits_kept_five, calvin_full'])}; " in text
    for row, words in ((five, "{} of {} blocks and {} of {} fixtures"), (other, "{} of {} and {} of {})")):
        counts = [row[kind][part] for kind in ("blocks", "fixtures") for part in ("count", "of")]
        assert words.format(*counts) in text
    assert f"does {told(ten['average_length'])} there {more(paired['waits_kept_ten, waits_kept_five'])})" in text
    for name in ("led", "rotations", "lifts", "pushes"):
        pairs = ["{} of {}".format(*row["groups"][name]) for row in (five, ten)]
        assert f"{'LED' if name == 'led' else name} {' and '.join(pairs)}" in text
    later = [told(summary(digits[count:], count)["average_length"]) for digits in (kept, full)]
    assert f"on the {200 - count} others it does {later[0]}, `calvin_full` (with five" in text and later[1] in text
    assert f"{found['calvin_seen']['waiting_share_percent']['blocks']} % of the steps of the blocks' recording" in text


def test_how_held_out_errors_fell_is_as_measured(found):
    held = found["calvin_seen"]["held_out"]
    said = "{:.2f} cm after 4000 steps, {:.2f} after 8000 and {:.2f} after 14 000"
    assert said.format(*(held[step]["scene_cm"] for step in ("4000", "8000", "14000"))) in page("calvin.md")
