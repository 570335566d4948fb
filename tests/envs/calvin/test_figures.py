"""Figures of docs/calvin.md against the result files that it names."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from robovlms_jax.envs.calvin import task_chains
from robovlms_jax.envs.calvin.tasks import TASKS
from tests.envs.calvin.chains_summary import FIXTURES, GROUPS, summary
from tests.test_figures import compared, page, points, result, share, solved

ROWS = {"sliding door": "door", "LED": "led", "placing, stacking": "placing and stacking"}
"""Rows of the page's table that are called otherwise in `GROUPS`."""


def test_what_the_calvin_page_says_of_34_tasks_is_what_was_run():
    found, text = result("calvin_small/results"), page("calvin.md")
    names = ("playtable_small", "calvin_small", "calvin_small_abcd")
    rows = [found[name]["chains_on_d"] for name in names]
    for row in rows:
        solved = [int(digit) for digit in row["solved_in_each"]]
        assert row["chains"] == len(solved)
        assert row["average_length"]["value"] == pytest.approx(sum(solved) / len(solved), abs=5e-4)
        counts = row["tasks_solved_of_asked"].values()
        assert sum(solved) == sum(done for done, _ in counts) == row["fixtures"]["count"] + row["blocks"]["count"]
        assert sum(asked for _, asked in counts) == row["fixtures"]["of"] + row["blocks"]["of"]
    lengths = [(row["average_length"]["value"], *row["average_length"]["bootstrap_95_percent"]) for row in rows]
    cells = [
        ("chains played", [row["chains"] for row in rows]),
        ("**tasks in a row**", ["{:.2f} ({:.2f} to {:.2f})".format(*values) for values in lengths]),
        ("at least 1 to 5, %", [", ".join(f"{x:.1f}" for x in row["in_a_row_percent"]) for row in rows]),
    ]
    for name in ("fixtures", "blocks"):
        shares = [f"{row[name]['count']} of {row[name]['of']}, {share(row[name])}" for row in rows]
        cells.append((f"{name}, solved of asked", shares))
    for name in ("drawer", "sliding door", "LED", "lightbulb", "lifts", "pushes", "rotations", "placing, stacking"):
        starts = GROUPS[ROWS.get(name, name)]
        counts = [[n for task, n in row["tasks_solved_of_asked"].items() if task.startswith(starts)] for row in rows]
        cells.append((name, ["{} of {}".format(*map(sum, zip(*row, strict=True))) for row in counts]))
    for name, values in cells:
        assert f"| {name} | {' | '.join(map(str, values))} |" in text
    for recording in found["recording"].values():
        assert "{recorded} of {attempted}".format(**recording) in text
    single = found["calvin_small_abcd"]["single_tasks"]
    outcomes = [digit for task in single["tasks"].values() for digit in task["success"]]
    assert (single["count"], single["of"]) == (outcomes.count("1"), len(outcomes))
    for name, task in single["tasks"].items():
        assert f"| `{name}` | {task['success'].count('1')} of {len(task['success'])} |" in text
    assert f"| all | {single['count']} of {single['of']}, {share(single)} |" in text


def test_chain_by_chain_the_calvin_page_tells_policies_apart_as_their_results_do():
    found, text = result("calvin_small/results"), page("calvin.md")
    names = ("playtable_small", "calvin_small", "calvin_small_abcd")
    digits = {name: [int(x) for x in found[name]["chains_on_d"]["solved_in_each"]] for name in names}
    paired = (found["paired"], found["paired_abcd"]["calvin_small"])
    for (before, after), row in zip(itertools.pairwise(names), paired, strict=True):
        first = [(x > 0, y > 0) for x, y in zip(digits[before], digits[after], strict=True)]
        alone = first.count((False, True)), first.count((True, False))
        assert alone == (row[f"{after}_only"], row[f"{before}_only"])
        assert "in {} of the 200, and fails where the other succeeds in {}:".format(*alone) in text
        assert "{:.1f} points ({:.1f} to {:.1f}) more".format(*row["difference_points"]) in text
        assert "{} ({:.2f} to {:.2f}) more tasks in a row".format(*row["tasks_in_a_row"]) in text
        assert f"p = {row['p']:.2g}".replace("e-0", "e-") in text
    chains = task_chains.official_chains()[: len(digits["calvin_small"])]
    fixture = [chain.tasks[0] in FIXTURES for chain in chains]
    for name, kind in (("fixture", True), ("block", False)):
        counts = [sum(x > 0 for x, there in zip(digits[policy], fixture) if there == kind) for policy in names]
        cells = " | ".join(f"{count} of {fixture.count(kind)}" for count in counts)
        assert f"| first task a {name} | {cells} |" in text
    pairs = list(zip(digits["calvin_small"], digits["calvin_small_abcd"], fixture, strict=True))
    alone = [sum(y > 0 and not x for x, y, there in pairs if there is kind) for kind in (True, False)]
    other = [sum(x > 0 and not y for x, y, there in pairs if there is kind) for kind in (True, False)]
    assert f"{alone[0]} are begun with success by it alone and {other[0]} by the other alone" in text
    assert f"that begin with a block, {alone[1]} and {other[1]} (" in text
    ends = [chain.tasks[k] in FIXTURES for chain, k in zip(chains, digits["calvin_small_abcd"]) if k < 5]
    assert f"{ends.count(False)} of the {len(ends)} chains that `calvin_small_abcd` does not finish" in text
    perfect = [sum(1 for _ in itertools.takewhile(FIXTURES.__contains__, chain.tasks)) for chain in chains]
    assert f"would have {sum(perfect) / len(perfect):.2f} tasks in a row on these chains" in text


def test_other_executions_were_tried_on_chains_that_are_none_of_the_official_ones():
    found, text = result("calvin_small/results")["other_executions"], page("calvin.md")
    conditions, official = task_chains.initial_conditions(), task_chains.official_chains()
    begun = {tuple(chain.condition.items()) for chain in official[:200]}
    known = {(tuple(chain.condition.items()), chain.tasks) for chain in official}
    for number, *tasks in found["chains"]:
        names, condition = tuple(list(TASKS)[i] for i in tasks), conditions[number]
        assert task_chains.is_valid_chain(condition, names)
        assert tuple(condition.items()) not in begun and (tuple(condition.items()), names) not in known
    five, ten, two = ([int(x) for x in digits] for digits in found["solved_in_each"].values())
    assert len(five) == len(ten) == len(found["chains"])
    means = sum(five) / len(five), sum(ten) / len(ten)
    assert "give {:.3f} tasks in a row there, all ten {:.3f}:".format(*means) in text
    assert "{:.3f} ({:.2f} to {:.2f}) more, so that".format(*found["chunk_minus_receding_5"]["tasks_in_a_row"]) in text
    assert f"on {len(two)} chains: {sum(two)} tasks, where five of ten solve {sum(five[: len(two)])}." in text


def test_what_the_comparison_in_the_real_simulator_says_is_what_was_run():
    found, text = result("calvin_small/compare"), page("comparing.md")
    for condition, (rows, only) in compared(found).items():
        cells = [cell for row in rows for cell in (solved(row), points(row["change"]) if row["change"] else "")]
        line = f"| `{condition}` | {' | '.join(cells)} | {only} |".replace("|  |", "| |")
        assert line in text, line
    solved_of = {name: [row["in_a_row"][0]["successes"] for row in rows] for name, (rows, _) in compared(found).items()}
    (alone, other_words), (_, usual) = solved_of["unseen"], solved_of["usual"]
    said = (
        f"solves {other_words} of 24 fixture tasks, instead of {usual} as asked, and is not told apart from PlayTable"
    )
    assert f"{said} alone, {alone} of 24" in page("calvin.md")


def test_the_calvin_pages_figures_are_those_of_its_runs():
    experts, learned, text = result("calvin_experts_cpu"), result("calvin_fixtures_cpu/results"), page("calvin.md")
    tasks = experts["tasks"].values()
    assert (
        "{} of {} single tasks".format(*(sum(row[name] for row in tasks) for name in ("successes", "attempts"))) in text
    )
    by_scene = ", ".join(f"{scene} {sum(row['by_scene'][scene][0] for row in tasks)}" for scene in "ABCD")
    assert f"({len(tasks)} tasks, five trials in each scene: {by_scene} of 170)" in text
    chains = experts["chains"]
    in_a_row = ", ".join(f"{100 * share:.0f}" for share in chains["in_a_row"])
    assert f"{chains['average_length']:.2f} tasks in a row (95 % interval {chains['interval'][0]:.2f} to" in text
    assert f"at least 1 to 5: {in_a_row} %" in text
    for name in learned["trained"]["tasks"]:
        cells = [learned[who]["tasks"][name]["success"] for who in ("trained", "playtable_alone")]
        assert f"| `{name}` | " + " | ".join(f"{x.count('1')} of {len(x)}" for x in cells) + " |" in text
    assert f"{learned['trained']['count']} of {learned['trained']['of']}, 83.8 % (77.3 to 88.7)" in text
    assert learned["trained"]["wilson_95_percent"] == [77.3, 88.7]
    recording = learned["recording"]
    assert f"{recording['recorded']} of {recording['attempted']} demonstrations succeeded" in text


def test_what_the_calvin_page_says_of_pictures_and_blocks_is_what_was_run():
    found, text = result("block_eyes_cpu"), page("calvin.md")
    for row in found["eyes"]:
        seen, own = row["held_out"], " (the twin's)" if (row["picture_px"], row["patch_px"]) == (64, 16) else ""
        cells = (
            f"{row['picture_px']} px, {row['patch_px']}{own} | {row['steps']}",
            ", ".join(f"{x:.2f}" for x in seen["median_cm"]),
            ", ".join(f"{100 * x:.0f}" for x in seen["within_2cm"]),
            ", ".join(f"{x:.1f}" for x in seen["turn_median_deg"]),
            ", ".join(f"{x:.0f}" for x in row["cpu_ms_per_step"]),
        )
        assert f"| {' | '.join(cells)} |" in text
    policy = found["policy"]
    assert "solves {count} of {of} on table D".format(**policy["all"]) in text
    assert share(policy["all"]) in text and share(policy["failures_at_another_block_rotate_lift"]) in text
    for name, verb in (("pushes", "push"), ("rotations", "rotate"), ("lifts", "lift")):
        assert "{} {count} of {of}".format(name, **policy["tasks"][verb]["solved"]) in text


def test_what_the_larger_policy_did_in_the_real_simulator_is_what_was_run():
    every, text = result("calvin_small/results"), page("calvin.md")
    found = every["calvin_full"]
    row, starts = found["chains_on_d"], found["blocks_by_start"]
    digits, tasks = [int(x) for x in row["solved_in_each"]], row["tasks_solved_of_asked"]
    assert row["average_length"]["value"] == pytest.approx(sum(digits) / row["chains"], abs=5e-4)
    assert sum(digits) == sum(done for done, _ in tasks.values()) == row["fixtures"]["count"] + row["blocks"]["count"]
    length = (row["average_length"]["value"], *row["average_length"]["bootstrap_95_percent"])
    assert "| **tasks in a row** | {:.2f} ({:.2f} to {:.2f}) |".format(*length) in text
    assert f"| at least 1 to 5, % | {', '.join(f'{x:.1f}' for x in row['in_a_row_percent'])} |" in text
    for name in ("fixtures", "blocks"):
        counted = f"{row[name]['count']} of {row[name]['of']}, {share(row[name])}"
        assert f"| {name}, solved of asked | {counted} |" in text
    groups = [[n for task, n in tasks.items() if task.startswith(starts)] for starts in GROUPS.values()]
    counts = ["{} of {}".format(*map(sum, zip(*group, strict=True))) for group in groups]
    for cells in (counts[:4], counts[4:]):
        assert f"| {', '.join(cells)} |" in text
    for name, said in (("seen", "from where demonstrations began that it"), ("held_out", "from where demonstrations")):
        assert "{count} of {of}".format(**starts[name]) + f" {said}" in text
    assert "{count} of {of} from new beginnings".format(**starts["new"]) in text
    for row in (starts["seen"], starts["held_out"], starts["new"]):
        outcomes = "".join(row["trials"].values())
        assert (row["count"], row["of"]) == (outcomes.count("1"), len(outcomes))
    first, later = (starts["in_chains"][name] for name in ("first", "later"))
    asked = [
        (k, k < done)
        for chain, done in zip(task_chains.official_chains(), digits)
        for k, task in enumerate(chain.tasks[: done + 1])
        if task not in FIXTURES
    ]
    assert [sum(won for k, won in asked if k == 0), sum(k == 0 for k, _ in asked)] == first
    assert [sum(won for k, won in asked if k), sum(k > 0 for k, _ in asked)] == later
    assert (
        "{} of 96 blocks that come first".format(*first) in text and "{} of {} that come later".format(*later) in text
    )
    again, once = (found["paired"][name] for name in ("calvin_small_abcd_again", "calvin_small_abcd"))
    assert "in {calvin_full_only} of the 200 chains, the reverse in {other_only}".format(**again) in text
    assert "({:.2f}, {:.2f} to {:.2f}, more tasks in a row".format(*again["tasks_in_a_row"]) in text
    assert "({calvin_full_only} and {other_only}; ".format(**once) in text
    kinds = found["demonstrations_of_blocks"]
    assert "{lifts} demonstrations of lifts, {pushes} of pushes and {rotations} of rotations".format(**kinds) in text
    assert "{lifts}, {pushes} and {rotations} of them on D".format(**kinds["on_d"]) in text
    assert "{count} of {of}, ".format(**found["blocks_on_playtable"]) in text
    assert f"{found['recording']['playtable']['frames']:,} frames".replace(",", " ") in text
    more = found["with_retry"]
    counts = [
        sum(int(x) for x in solved[: more["chains"]])
        for solved in (more["solved_in_each"], found["chains_on_d"]["solved_in_each"])
    ]
    said = "the first {chains} of these chains".format(**more)
    assert f"{said} {counts[0]} tasks with it and {counts[1]} without, " in text
    assert "{:.2f} ({:.2f} to {:.2f}) more a chain".format(*more["more_tasks_in_a_row"]) in text


def test_what_more_demonstrations_of_blocks_did_is_what_was_run():
    every, text = result("calvin_small/results"), page("calvin.md")
    found, before = every["calvin_full_blocks"], every["calvin_full"]["chains_on_d"]["solved_in_each"]
    row, losses = found["chains_on_d"], found["training"]["loss_arm"]
    digits = [int(x) for x in row["solved_in_each"]]
    for name, scores in (("", digits), ("_before", [int(x) for x in before[: row["chains"]]])):
        solved = {True: [0, 0], False: [0, 0]}
        for chain, done in zip(task_chains.official_chains(), scores):
            for k, task in enumerate(chain.tasks[: done + 1]):
                solved[task in FIXTURES][0] += k < done
                solved[task in FIXTURES][1] += 1
        kinds = {kind: row[f"{kind}{name}"] for kind in ("fixtures", "blocks")}
        assert [[kinds[kind]["count"], kinds[kind]["of"]] for kind in kinds] == [solved[True], solved[False]]
        assert row[f"average_length{name}"][0] == pytest.approx(sum(scores) / row["chains"], abs=5e-4)
    assert f"| on D, {row['chains']} official chains | `calvin_full` |" in text
    cells = ["{:.2f} ({:.2f} to {:.2f})".format(*row[f"average_length{name}"]) for name in ("_before", "")]
    assert f"| **tasks in a row** | {' | '.join(cells)} |" in text
    for kind in ("fixtures", "blocks"):
        cells = ["{count} of {of}".format(**row[f"{kind}{name}"]) for name in ("_before", "")]
        assert f"| {kind}, solved of asked | {' | '.join(cells)} |" in text
    assert "({:.2f}, {:.2f} to {:.2f}, more tasks in a row".format(*found["paired"]["more_tasks_in_a_row"]) in text
    assert "{lifts} lifts, {pushes} pushes and {rotations} rotations more".format(**found["demonstrations"]) in text
    for name in ("beginnings_d", "beginnings_abcd", "taken_over_d"):
        assert "{recorded} of {attempted}".format(**found["recording"][name]) in text
    first, last = losses["steps_1_to_60"], losses["steps_1060_to_1150"]
    assert "{beginnings_d:.3f} on beginnings and {taken_over_d:.3f} where".format(**first) in text
    assert "{beginnings_d:.3f}, {taken_over_d:.3f}, {fixtures_d:.3f} and {old_d:.3f}".format(**last) in text
    old, new = (found["hand_comes_down"]["policies"][name] for name in ("calvin_full", "calvin_full_blocks"))
    assert (
        f"comes down {np.median(old['cm']):.1f} cm from" in text and f"and {np.median(new['cm']):.1f} cm after" in text
    )
    assert "within 2 cm {} and {} times".format(*(sum(cm <= 2 for cm in each["cm"]) for each in (old, new))) in text
    assert f"the named one in {old['named_is_nearest']} and {new['named_is_nearest']})" in text


def test_the_first_try_at_it_is_told_as_it_was():
    every, text = result("calvin_small/results"), page("calvin.md")
    rows = every["calvin_small_seen"]["chains_on_d"]
    for row in rows.values():
        told = interval_of(row["average_length"])
        assert f"{told} on {row['chains']}" in text
        digits = row["solved_in_each"]
        assert row["average_length"][0] == pytest.approx(sum(map(int, digits)) / row["chains"], abs=5e-4)
    lights = {name: summary(row["solved_in_each"])["tasks_solved_of_asked"] for name, row in rows.items()}
    totals = {
        (name, light): [sum(x) for x in zip(*(n for task, n in solved.items() if task.endswith(light)))]
        for name, solved in lights.items()
        for light in ("_led", "_lightbulb")
    }
    bulb = ["{} of {}".format(*totals[name, "_lightbulb"]) for name in ("lights", "words")]
    assert f"the lightbulb went from {bulb[0]} to {bulb[1]}" in text
    assert "the LED stayed at {} of {}".format(*totals["words", "_led"]) in text
    assert f"error of {every['calvin_small_seen']['held_out']['without_pictures']['ahead_cm']:.1f} cm on" in text


def interval_of(values):
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)
