"""Figures of reinforcement in documents are those of the files that its runs wrote."""

from __future__ import annotations

import statistics

from tests.test_figures import page, result


def test_the_tables_of_reinforcement_are_those_of_its_runs():
    found, text = result("reinforce_cpu"), page("reinforcement.md")
    for name, run in found["runs"].items():
        cells = []
        for measured in run["results"].values():
            before, after = (measured[when]["successes"] for when in ("before", "after"))
            attempts, pair = measured["before"]["attempts"], measured["paired"]
            assert pair["both"] + pair["first"] == before and pair["both"] + pair["second"] == after
            assert attempts == 96
            cells.append(f"{100 * before / attempts:.1f} → {100 * after / attempts:.1f}")
        last = run["curve"][-1]
        row = f"| {name} | {' | '.join(cells)} | {last['env_steps'] / 1000:.1f} | {last['seconds']:.0f} |"
        assert row in text, row
    devices = result("rollouts_devices_cpu")
    rows = list(devices["decisions_per_s_of_16_tables"].values())
    assert all(row["best"] == max(max(run) for run in row["all"]) for row in rows)
    before, after = rows[0]["best"], rows[3]["best"]
    assert (
        f"{after / before:.1f} times in a sitting before that" in text and f"({after:.0f} against {before:.0f};" in text
    )
    (one, own), (many, all_of_them) = (devices["step"]["ms_per_step"][tables] for tables in ("1", "16"))
    assert f"takes {all_of_them} instead of {many} ms, of one table {own} instead of {one}" in " ".join(text.split())
    parts = devices["parts_of_a_decision_of_16_tables_ms"]
    assert all(f"{value:.2f}" in text for name, value in parts.items() if name != "note")
    true = [f"{100 * seed['accuracy_true']:.1f}" for seed in result("reward_cpu")["seeds"].values()]
    assert f"{true[0]}, {true[1]} and {true[2]} % of the true answers" in text


def test_how_fast_rollouts_are_is_what_one_run_of_the_benchmark_says():
    kernel, text = result("rollouts_kernel_cpu"), page("reinforcement.md")
    assert "python -m benchmarks.rollouts --before a103477 --max_steps 160 --repeats 5 --devices 2" in text
    for name in ("before", "host", "device"):
        row = kernel["two_cores"][name]
        assert row["decisions_per_s"] == max(row["all"])
        numbers = (row["decisions_per_s"], statistics.median(row["all"]), row["decisions_per_processor_s"])
        assert "| {:.0f} | {:.0f} | {:.0f} |".format(*numbers) in text
    fastest, median = kernel["two_cores"]["times_fastest"], kernel["two_cores"]["times_median"]
    assert f"{fastest['before']:.1f} times the loop of the first row** by" in text
    assert f"{median['before']:.1f} times by the medians" in text
    assert f"{fastest['host']:.1f} and {median['host']:.1f} times today's host's loop, which" in text
    one = kernel["one_core"]["times_fastest"]
    assert f"Held to one core {one['before']:.1f} and {one['host']:.1f} times." in text
    found = result("rollouts_before_cpu")
    measured = found["tables"]["16"]
    fastest, median = measured["times_fastest"], measured["times_median"]
    assert f"{fastest['before']:.1f} times by the fastest turns and {median['before']:.1f} by the medians" in text
    rates = [f"{measured[name]['decisions_per_s']:.0f}" for name in ("device", "host", "before")]
    assert "({}, {} and {} decisions/s".format(*rates) in text
    many = [f"{found['64 tables'][name]['decisions_per_s']:.0f}" for name in ("before", "host", "device")]
    assert "{}, {} and {}".format(*many) in text
    assert f"the factor is the same, {found['64 tables']['times_fastest']['before']:.1f}" in text
    one = found["one_device_decisions_per_processor_s"]
    assert (
        "{:.0f} instead of {:.0f} decisions per second".format(*(max(one[k]) for k in ("both cores", "one core")))
        in text
    )
    assert f"{fastest['host']:.1f} and {median['host']:.1f} times today's host's loop" in text


def test_how_fast_a_process_per_core_is_is_what_one_run_says():
    found, text = result("rollouts_apart_cpu"), page("reinforcement.md")
    assert found["command"] in text
    measured, names = found["tables"]["16"], ("apart", "device", "host", "before")
    rates = [measured[name]["decisions_per_s"] for name in names]
    assert all(measured[name]["decisions_per_s"] == max(measured[name]["all"]) for name in names)
    said = "{:.0f} decisions/s where one program on two devices makes {:.0f}, today's host's loop {:.0f} and that of "
    assert (said + "a103477 {:.0f}.").format(*rates) in " ".join(text.split())
    times = [measured[f"apart_times_{how}"][of] for how in ("fastest", "median") for of in ("before", "host")]
    said = "{:.1f} times the loop of before and {:.1f} times today's (by medians {:.1f} and {:.1f})"
    assert said.format(*times) in text
    computing = {name: measured[name]["decisions_per_processor_s"] for name in names}
    said = [computing["apart"] / computing[name] for name in ("before", "host")]
    assert "processor time it is {:.1f} and {:.1f} times".format(*said) in text
    quiet = result("rollouts_before_quiet_cpu")["one_core"]["times_fastest"]
    assert f"on a quiet machine, {quiet['before']:.1f} and {quiet['host']:.1f}." in text


def test_the_table_of_reinforcement_on_many_tables_is_that_of_its_runs():
    found, text = result("reinforce_fixtures_cpu"), page("reinforcement.md")
    columns = ("trained", "unseen_random_tables", "unseen_table", "unseen_phrasing", "unseen_start", "other_tasks")
    assert f"{found['start']['table D, all eight tasks']} trials of all eight tasks on table D" in text
    for name, run in found["runs"].items():
        measured, last = [run["results"][column] for column in columns], run["curve"][-1]
        cells = [" → ".join(f"{x[when]['successes'] / 2:.1f}" for when in ("before", "after")) for x in measured]
        assert all(x["before"]["attempts"] == 200 for x in measured)
        row = f"| {name} | {' | '.join(cells)} | {last['env_steps'] / 1000:.0f} | {last['seconds']:.0f} |"
        assert row in text, row
        others = run["results"]["other_tasks"]
        assert others["before"]["successes"] - others["after"]["successes"] <= 4  # two points of 200 trials


def test_what_answers_alone_gain_is_what_their_runs_say():
    found, text = result("dpo_cpu"), page("reinforcement.md")
    columns = ("trained", "unseen_random_tables", "unseen_table", "unseen_phrasing", "unseen_start", "other_tasks")
    assert f"that solves {found['start']['table D, all eight tasks']} of 200 trials" in text
    for name, run in found["runs"].items():
        measured = [run["results"][column] for column in columns]
        cells = [" → ".join(str(x[when]["successes"]) for when in ("before", "after")) for x in measured]
        assert all(x["before"]["attempts"] == 200 for x in measured)
        assert f"| {name} | {' | '.join(cells)} |" in text
    said = "{:g}, {:g} and {:g} points (mean {:.1f}, 95 % interval by seeds {:.1f} to {:.1f})"
    assert said.format(*_gained(found["runs"])) in text
    earlier = "{:g}, {:g} and {:g} points on random tables (mean {:.1f}, {:.1f} to {:.1f})"
    assert earlier.format(*_gained(found["earlier"]["runs"])) in text
    runs = [run["results"] for run in found["runs"].values()]
    assert f"(p = {runs[2]['unseen_random_tables']['paired']['p']:.2g}), one gains on table D" in text
    assert f"one gains on table D (p = {runs[1]['unseen_table']['paired']['p']:.2g})" in text
    assert sum(run["other_tasks"]["paired"]["p"] < 1e-5 for run in runs) == 2


def _gained(runs):
    """Points on unseen random tables of three seeds, their mean and its interval (Student's t of two degrees)."""
    found = [run["results"]["unseen_random_tables"] for run in runs.values()]
    return _with_interval([(x["after"]["successes"] - x["before"]["successes"]) / 2 for x in found])


def _with_interval(gains):
    mean, wide = statistics.mean(gains), 4.303 * statistics.stdev(gains) / 3**0.5
    return *gains, mean, mean - wide, mean + wide


def test_what_answers_teach_beyond_learning_them_by_heart_is_what_held_out_pairs_say():
    found, text = result("dpo_cpu"), " ".join(page("reinforcement.md").split())
    curves = [run["curve"] for run in found["runs"].values()]

    def three(values, form="{:.1f}"):
        first, second, third = (form.format(value) for value in values)
        return f"{first}, {second} and {third}"

    def ends(name):
        return [curve[-1][name] for curve in curves]

    assert f"gives {three(100 * x for x in ends('preferred_taught'))} % in the end" in text
    assert f"of those held out {three(100 * x for x in ends('preferred_held_out'))} %;" in text
    assert f"it gave {three(100 * curve[0]['preferred_held_out'] for curve in curves)} % after one iteration" in text
    lowest = [min(curve, key=lambda row: row["loss_held_out"]) for curve in curves]
    steps = three((row["step"] for row in lowest), "{}")
    losses = three((row["loss_held_out"] for row in lowest), "{:.3f}")
    assert f"after {steps} iterations ({losses})" in text
    assert f"rises to {three(ends('loss_held_out'), '{:.3f}')}, where" in text
    assert f"falls to {three(ends('loss_taught'), '{:.3f}')}." in text


def test_the_table_of_awr_and_grpo_is_that_of_their_runs():
    found, text = result("reinforce_baselines_cpu"), page("reinforcement.md")
    columns = ("trained", "unseen_random_tables", "unseen_table", "unseen_phrasing", "unseen_start", "other_tasks")
    for method, runs in found["methods"].items():
        for name, run in runs.items():
            measured, last = [run["results"][column] for column in columns], run["curve"][-1]
            assert last["step"] == 8 and all(x["before"]["attempts"] == 200 for x in measured)
            cells = [" → ".join(str(x[when]["successes"]) for when in ("before", "after")) for x in measured]
            row = f"| {method.upper()}, {name} | {' | '.join(cells)} |"
            assert f"{row} {last['env_steps'] / 1000:.0f} | {last['seconds']:.0f} |" in text, row
    curves = {**found["methods"], "ppo": result("reinforce_fixtures_cpu")["runs"]}
    shares = {
        method: "{:.0f}, {:.0f} and {:.0f} %".format(*(100 * run["curve"][7]["success"] for run in runs.values()))
        for method, runs in curves.items()
    }
    assert "AWR solves {awr} of trials in its eighth iteration and PPO {ppo} in the same".format(**shares) in text
    assert f"(GRPO, which counts other trials, {shares['grpo']})" in text


def test_what_corrections_and_a_learned_reward_gain_is_what_their_runs_say():
    policies, text = result("corrections_cpu")["policies"], page("reinforcement.md")
    rows = {"start": "before", "800 steps more, demonstrations alone": "demonstrations alone"}
    rows["800 steps, half of each batch corrections of all rollouts"] = (
        "corrections of all rollouts (`--of all`), half of each batch"
    )
    rows["800 steps, half of each batch corrections of rollouts that failed"] = (
        "corrections of rollouts that failed, half of each batch"
    )
    for name, words in rows.items():
        found = policies[name]["seed 0"]
        counts = [found[kind]["count"] for kind in ("unseen_random_tables", "unseen_table", "unseen_start")]
        assert all(x["count"] == x["success"].count("1") and x["of"] == 200 for x in found.values())
        assert f"| {words} | {' | '.join(map(str, counts))} |" in text
    learned = result("preferences_cpu")
    for name, before in (("unseen_random_tables", "95 → "), ("trained", "84 → "), ("unseen_phrasing", "80 → ")):
        assert f"{before}{learned['results'][name]['after']['successes']}" in text
    pair = learned["results"]["unseen_random_tables"]["paired"]
    assert f"({pair['second']} trials gained, {pair['first']} lost," in text
    assert f"{100 * learned['reward']['accuracy_true']:.1f} % of the true" in text


def test_what_three_seeds_of_corrections_gain_is_what_their_runs_say():
    found, text = result("corrections_seeds_cpu"), " ".join(page("reinforcement.md").split())
    before, alone, corrected = found["policies"].values()
    kinds = ("unseen_random_tables", "unseen_table", "unseen_start")
    counts = {
        words: [", ".join(str(seed[kind]["count"]) for seed in runs.values()) for kind in kinds]
        for words, runs in (
            ("before", before),
            ("demonstrations alone, seeds 0, 1, 2", alone),
            ("corrections, half of each batch", corrected),
        )
    }
    assert all(f"| {words} | {' | '.join(cells)} |" in text for words, cells in counts.items())
    assert all(x["count"] == x["success"].count("1") for seed in corrected.values() for x in seed.values())
    points = "{:g}, {:g} and {:g} points"
    said = dict.fromkeys(kinds, f"{points} (mean {{:.1f}}, {{:.1f}} to {{:.1f}}; p = ")
    interval = "(mean {:.1f}, 95 % interval by seeds {:.1f} to {:.1f}"
    said["unseen_start"] = f"{points} more than demonstrations alone {interval}; p = "
    for kind, words in said.items():
        seeds = found["compared"][kind].values()
        gains = [(seed["corrections"] - seed["alone"]) / 2 for seed in seeds]
        values = "{:.2g}, {:.2g} and {:.2g}".format(*(seed["p"] for seed in seeds))
        assert words.format(*_with_interval(gains)) + values in text
    lost = [
        [seed["unseen_table"]["per_task"][task][0] for seed in runs.values()]
        for task in ("open_drawer", "move_slider_left")
        for runs in (corrected, alone)
    ]
    assert "opened in {}, {} and {} instead of {}, {} and {},".format(*lost[0], *lost[1]) in text
    assert "to the left in {}, {} and {} instead of {}, {} and {})".format(*lost[2], *lost[3]) in text
    lever = [
        [seed["unseen_random_tables"]["per_task"]["turn_on_lightbulb"][0] for seed in x.values()]
        for x in (corrected, alone)
    ]
    assert "upwards {}, {} and {} of 25 instead of {}, {} and {})".format(*lever[0], *lever[1]) in text


def test_what_three_seeds_of_a_learned_reward_gain_is_what_their_runs_say():
    found, text = result("preferences_seeds_cpu"), page("reinforcement.md")
    columns = ("trained", "unseen_random_tables", "unseen_table", "unseen_phrasing", "unseen_start", "other_tasks")
    before = result("dpo_cpu")["runs"]["seed 0"]["results"]  # of the same policy on the same trials
    for name, run in found["runs"].items():
        measured = [run["results"][column] for column in columns]
        assert [x["before"] for x in measured] == [before[column]["before"] for column in columns]
        cells = [" → ".join(str(x[when]["successes"]) for when in ("before", "after")) for x in measured]
        last = run["curve"][-1]
        assert last["step"] == 12 and f"({last['env_steps'] / 1000:.0f} thousand control steps)" in text
        assert f"| {name} | {' | '.join(cells)} |" in text
    for kind in columns[:5]:
        seeds = [run["results"][kind] for run in found["runs"].values()]
        gains = [(x["after"]["successes"] - x["before"]["successes"]) / 2 for x in seeds]
        assert "{:g}, {:g} and {:g} points (mean {:.1f}, {:.1f} to {:.1f}".format(*_with_interval(gains)) in text, kind
        values = "p = {:.2g}, {:.2g} and {:.2g}".format(*(x["paired"]["p"] for x in seeds))
        assert values in text, values
    assert (
        f"gives {100 * found['reward']['accuracy_true']:.1f} % of the true answers about rollouts that taught" in text
    )


def test_the_table_of_the_simulators_speed_is_that_of_its_run():
    text = page("playtable.md")
    for count, row in result("simulator_cpu")["tables"].items():
        cells = [f"{row['steps']['per_s']:.0f}"]
        for size in ("rendered_steps_200_84", "rendered_steps_96_64"):
            cells += [f"{row[size]['per_s']:.0f}", f"{row[size]['times_calvin_per_s']:.0f}"]
        assert f"| {count} | {' | '.join(cells)} |" in text
