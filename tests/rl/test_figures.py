"""Figures of reinforcement in documents are those of the files that its runs wrote."""

from __future__ import annotations

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
    rates = [round(row["best"]) for row in devices["decisions_per_s_of_16_tables"].values()]
    for row in devices["decisions_per_s_of_16_tables"].values():
        assert row["best"] == max(max(run) for run in row["all"])
    assert all(f"| {rate} |" in text for rate in rates) and f"{rates[3] / rates[0]:.1f} times the loop" in text
    (one, own), (many, all_of_them) = (devices["step"]["ms_per_step"][tables] for tables in ("1", "16"))
    assert f"takes {all_of_them} instead of {many} ms, of one table {own} instead of {one}" in " ".join(text.split())
    parts = devices["parts_of_a_decision_of_16_tables_ms"]
    assert all(f"{value:.2f}" in text for name, value in parts.items() if name != "note")
    less = devices["less_load"]["best"]
    assert f"({less[3] / less[0]:.1f} times an hour before" in text
    true = [f"{100 * seed['accuracy_true']:.1f}" for seed in result("reward_cpu")["seeds"].values()]
    assert f"{true[0]}, {true[1]} and {true[2]} % of the true answers" in text


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
