"""Figures in the documents against the result files that they name."""

from __future__ import annotations

import json
import math
import pathlib
import re

import pytest

from robovlms_jax.search import report

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def page(name):
    """The text, with any white space a single space."""
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def test_every_result_file_is_named_by_a_document():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [path.name for path in RESULTS.iterdir() if not re.search(rf"\b{path.name}\b", text)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_result_file_that_a_document_names_is_there(path):
    named = re.findall(r"results/([\w-]+(?:\.json)?)", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (RESULTS / name).exists()] == []


def share(rate):
    low, high = rate["wilson_95_percent"]
    return f"{rate['percent']:.1f} % ({low:.1f} to {high:.1f})"


def test_the_tables_of_the_navigation_page_are_those_of_its_run():
    found, text = result("navigation_cpu"), page("navigation.md")
    names = {"bare": "bare", "safety layer, stops": "safety layer that stops", "safety layer, slows down": "slows down"}
    rows = found["drives"]
    for row in rows:
        line = f"| {row['words']} | {share(row['success'])} | {share(row['without_collision'])} |"
        stopped = row.get("stopped_by_the_layer", "")
        assert re.search(rf"{names[row['driven']]}[^|]*{re.escape(line)} {stopped}", text), row
    training, held_out = (row["scenarios"] for row in rows[:2])
    for name in training:
        cells = [f"{row[name]['success']}, {row[name]['collisions']}" for row in (training, held_out)]
        assert f"| `{name}` | {cells[0]} | {cells[1]} |" in text
    assert f"{found['facts']['parameters']:,}".replace(",", " ") in text
    assert f"{found['recording']['training']['drives']} recorded drives" in text
    assert "no collision in 960 drives" in text
    assert sum(row["without_collision"]["count"] for row in rows if row["driven"] != "bare") == 960


def test_the_int8_table_is_that_of_its_runs():
    found, trials, text = result("int8_cpu"), result("int8_trials_cpu"), page("serving.md")
    sizes = [f"{found['bytes'][name]:,}".replace(",", " ") for name in ("before", "int8")]
    assert f"| bytes of parameters | {sizes[0]} | {sizes[1]} |" in text
    for weights in ("int8", "w8a8"):
        actions = found["actions"][weights]
        far, turned = ([actions[unit][name] for name in ("mean", "p95")] for unit in ("millimetres", "degrees"))
        assert "{:.2f} and {:.2f} mm, {:.3f} and {:.3f} degrees, cosine".format(*far, *turned) in text
        assert f"cosine {actions['cosine']:.4f}" in text and actions["gripper_flips"] == 0
    errors = [
        [found["outliers"][factor][way]["millimetres"]["mean"] for factor in ("10", "100")] for way in ("w8a8", "int8")
    ]
    assert (
        "w8a8 errs by {:.2f} and {:.2f} mm in the mean, int8 weights by {:.2f} and {:.2f}".format(
            *errors[0], *errors[1]
        )
        in text
    )
    times = [found["step_ms"][name]["p50"] for name in ("before", "int8", "w8a8")]
    assert "{:.1f} ms as it is, {:.1f} ms in int8 and {:.1f} ms in w8a8".format(*times) in text
    before, int8, w8a8 = (trials[name]["success"] for name in ("before", "int8", "w8a8"))
    assert f"| {sum(before)} (71.7 %, 63-79) | {sum(int8)} (69.2 %, 60-77) | {sum(w8a8)} (70.0 %, 61-77) |" in text
    for name, after, counts in (("int8", int8, [83, 3, 0]), ("w8a8", w8a8, [83, 3, 1])):
        pairs = list(zip(before, after, strict=True))
        assert [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1))] == counts
        assert list(trials["pairs"][name].values())[:3] == counts


def test_the_figures_of_serving_and_of_bad_input_are_those_of_their_runs():
    found, text = result("serving_cpu"), page("serving.md")
    server = found["server"]
    assert f"{server['p50_ms']:.2f} ms in the median and {server['p99_ms']:.2f} ms at the 99th percentile" in text
    checks, soak = result("safety_cpu")["p50_ms"], result("soak_cpu")["soak"]
    for obstacles, words in (("no obstacle", "without obstacles"), ("8 obstacles", "with eight")):
        arm, base = (checks["after"][f"{robot}, {obstacles}"] for robot in ("arm", "base"))
        assert f"{arm:.2f} to {base:.2f} ms {words}" in text
    before = [checks["before"][f"arm, {obstacles}"] for obstacles in ("no obstacle", "8 obstacles")]
    assert "it took {:.2f} and {:.2f} ".format(*before) in text
    assert f"{soak['answers']:,} answers".replace(",", " ") in text
    assert f"between {min(soak['server_mb']):.1f} and {max(soak['server_mb']):.1f} MB" in text
    first, second, third = result("bad_input_cpu")["runs"]
    for number in (
        first["connections_let_in"],
        first["connections_refused"],
        second["connections_let_in"],
        second["observations_answered_with_an_error"],
        third["bad_messages"],
    ):
        assert f"{number:,}".replace(",", " ") in text
    assert all(f"{run['megabytes_more']} MB more" in text for run in (first, second, third))


def test_the_memory_of_adapters_beside_eight_bits_is_that_of_its_plans():
    found, text = result("int8_base_plan"), page("strategies.md")
    lora, qlora = (found[f"kosmos_lstm_{name}"]["bytes_per_device"] for name in ("lora", "qlora"))
    size = {name: f"{x / 2**30:.1f}" for name, x in found["kosmos_lstm"]["bytes_per_device"].items()}
    for name, words in (("parameters", "of parameters"), ("total", "in all")):
        assert f"{qlora[name] / 2**30:.1f} instead of {lora[name] / 2**30:.1f} GiB {words}" in text
    assert f"full training: {size['total']} GiB" in text
    assert qlora["activations"] == lora["activations"] and f"{lora['activations'] / 2**30:.1f} GiB in both" in text


def test_the_success_of_the_default_is_that_of_its_runs():
    found, text = result("default_cpu"), " ".join((ROOT / "docs" / "playtable.md").read_text(encoding="utf-8").split())
    counts = [sum(marks.count("1") for marks in run["success"].values()) for run in found["runs"].values()]
    assert sum(counts) == found["count"] and len(counts) == 3
    assert f"{found['count'] / found['of']:.1%} ({found['count']} of {found['of']} trials".replace("%", " %") in text
    assert "three seeds: {}, {} and {} %".format(*(f"{100 * count / 200:.1f}" for count in counts)) in text
    runs = [(found[name]["seconds"]["make run"], found[name]["count"]) for name in ("fresh_clone", "fresh_clone_again")]
    before = found["fresh_clone_before"]["b36393e"]
    for took, count in [*runs, (before["make run"], before["count"])]:
        assert f"| {took // 60} min {took % 60} s | {count} |" in text
    rate = f"{found['count'] / found['of']:.1%}".replace("%", " %")
    assert f"where it solves {rate} (three seeds" in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_table_of_the_demonstrations_twin_is_that_of_its_runs():
    found = result("demo_cpu")
    text = " ".join((ROOT / "robovlms_jax/demo/twin/README.md").read_text(encoding="utf-8").split())
    report = (ROOT / "robovlms_jax/demo/twin/report.md").read_text(encoding="utf-8")
    trained, stored = found["as_trained"], found["as_stored"]
    for task, before in trained["success"].items():
        after = stored["success"][task]
        assert f"| {task} | {before.count('1')} of {len(before)} | {after.count('1')} of {len(after)} |" in text
        assert f"| {task} | {after.count('1') / len(after):.1%} (".replace("%", " %") in report
    for rate in (trained, stored):
        low, high = rate["wilson_95_percent"]
        assert (
            f"{rate['count']} of {rate['of']}, {rate['count'] / rate['of']:.1%}".replace("%", " %").replace(
                ".0 %", " %"
            )
            in text
            and f"({low:.0f} to {high:.0f})" in text
        )
    assert f"Of the same 200 trials, {found['alike']} end alike" in text
    played, demo = found["as_the_page_plays"], page("demo.md")
    low, high = played["wilson_95_percent"]
    rate = f"{100 * played['count'] / played['of']:.1f} %"
    assert f"{played['count']} of {played['of']} tasks, {rate} ({low:.0f} to {high:.0f})" in demo
    changed = played["steps_changed_by_the_layer"].values()
    assert f"changed {sum(changed)} of {played['steps']} steps, {max(changed)} of them" in demo


def test_the_table_of_actions_as_words_is_that_of_its_runs():
    found, text = result("discrete_cpu"), page("concepts/structures.md")
    for run in found["runs"]:
        rate = {0.0004: "4e-4", 0.002: "2e-3"}[run["rate"]]
        assert f"| {run['words']} | {rate} | {run['steps']} | {run['successes']} |" in text
    seeds = found["three_seeds"]
    each = "{}, {} and {} of 40 trials each".format(*seeds["success"])
    assert f"{each}, so {mean_and_interval(seeds)}" in text
    loop = found["open_loop"]
    first, copied, parallel = (row["training"] for row in loop["rows"])
    own, recorded = (f"{first[words][0]:.1f}" for words in ("own", "recorded"))
    assert f"the same errors, {own} and {recorded} mm in the first action" in text
    assert f"standing still errs by {loop['standing still']['training'][0]:.1f}" in text
    assert f"the first action errs by {parallel['own'][0]:.1f} mm" in text
    assert f"the second to fifth action err by {copied['recorded'][1]:.1f} mm, from the policy's own by" in text
    assert f"{copied['own'][1]:.1f}, the first by {copied['own'][0]:.1f}" in text
    median, likely = loop["median_of_the_distribution"]["validation"], loop["rows"][2]["validation"]["own"]
    assert f"({median[0]:.1f} against {likely[0]:.1f} mm on held-out windows)" in text


def mean_and_interval(found):
    return f"{found['mean']:.2f} ± {found['half_width']:.2f}"


def test_the_tables_of_few_demonstrations_task_after_task_and_another_table_are_those_of_their_runs():
    found, text = result("strategies_cpu"), page("strategies.md")
    few, continual, adapt = (found[name] for name in ("few_shot", "continual", "adapt"))
    for row in few["rows"]:
        assert f"| {row['demonstrations']} | {row['method']} | {mean_and_interval(row)} |" in text
        assert sum(row["success"]) / len(row["success"]) == pytest.approx(row["mean"], abs=1e-3)
    for row in continual["rows"]:
        measures = " | ".join(mean_and_interval(row[name]) for name in ("forward", "backward", "area"))
        after = " | ".join(f"{x:.2f}" for x in row["after"][1])
        assert f"| {row['method']} | {measures} | {after} |" in text
    for row in adapt["rows"]:
        seeds = ", ".join(f"{x:.2f}" for x in row["success"])
        assert f"| {row['way']} | {seeds} | {mean_and_interval(row)} |" in text
    for row in found["own_arm"]["rows"]:
        seeds = ", ".join(f"{x:.2f}" for x in row["success"])
        assert f"| {row['demonstrations']} | {row['start']} | {seeds} | {mean_and_interval(row)} |" in text
    for row in found["mirror"]["rows"]:
        seeds, sides = ", ".join(f"{x:.2f}" for x in row["success"]), ("success", "left", "right")
        means = " | ".join(
            "{:.2f} ± {:.2f}".format(*(row[f"{x}_{end}"] for end in ("mean", "half_width"))) for x in sides
        )
        assert f"| {row['drives']} | {'half' if row['mirror'] == '0.5' else 'none'} | {seeds} | {means} |" in text
    alone = found["mirror"]["rows"][2:]
    assert [round(40 * sum(row["right"])) for row in alone] == [0, 18] and all(alone[1]["right"])
    apart = {(row["drives"], row["of"]): row for row in found["mirror"]["differences"]}
    assert "noise ({:+.2f}, {:.2f} to {:.2f})".format(*apart["both sides", "success"]["difference"]) in text
    assert "noise ({:+.2f}, {:.2f} to {:.2f})".format(*apart["left alone", "left"]["difference"]) in text
    for row in adapt["apart"]:
        assert f"| {row['way']} | {mean_of(row['means'], 3)} | {mean_of(row['covariances'], 3)} |" in text
        assert sum(row["means_within"]) / 3 <= 0.005
    apart = {(row["start"], row["demonstrations"]): row for row in found["own_arm"]["differences"]}
    assert [name for name, row in apart.items() if not row["noise"]] == [("another arm's 800", 4)]
    for name in (("another arm's 800", 4), ("Bridge's bundled episodes", 4)):
        assert "{:+.2f}, {:.2f} to {:.2f}".format(*apart[name]["difference"]) in text
    apart = {row["setting"]: row for row in [*few["differences"], *adapt["differences"]]}
    assert [name for name, row in apart.items() if not row["noise"]] == ["augmented"]
    for name, words in (("augmented", "by more than noise** ("), ("augmented, 1200 steps", "noise (")):
        assert words + "{:.2f}, {:.2f} to {:.2f})".format(*apart[name]["difference"]) in text
    for found in continual["search_of_ewc_floor_0.1_seed_0"]:
        assert "{:.2f} and {:.2f} at 1e{:.0f}".format(*found["after"], math.log10(found["ewc"])) in text


def from_the_best(row, best):
    if row is best:
        return "best"
    apart = [one - other for one, other in zip(row["success"], best["success"], strict=True)]
    mean, half = sum(apart) / len(apart), report.half_width_of(apart)
    return f"{mean:+.2f} ± {half:.2f}" + (", noise" if abs(mean) <= half else "")


def mean_of(values, digits):
    return f"{sum(values) / len(values):.{digits}f} ± {report.half_width_of(values):.{digits}f}"


def test_the_tables_of_compared_policies_are_those_of_their_runs():
    text = page("structures.md") + page("strategies.md")
    for comparison in result("policies_cpu")["comparisons"].values():
        assert comparison["command"] in text
        rows = comparison["rows"]
        best = max(rows, key=lambda row: row["mean"])
        for row in rows:
            assert len(row["success"]) == 3 and sum(row["success"]) / 3 == pytest.approx(row["mean"], abs=1e-3)
            cells = [row["variant"], ", ".join(f"{x:.2f}" for x in row["success"]), mean_of(row["success"], 2)]
            cells += [from_the_best(row, best), mean_of(row["errors_mm"], 1)]
            cells += [mean_of(row[name], 2) for name in ("unseen", "answers_before", "answers") if name in row]
            assert f"| {' | '.join(cells)} |" in text, cells
    again = result("policies_cpu")["comparisons"]["structures"]["rows"][-1]["played_again"]
    assert "they solve {}, {} and {} of {}.".format(*again["solved"], again["trials"]) in page("structures.md")


def test_the_table_of_searched_rates_is_that_of_its_trials():
    found, text = result("strategies_cpu")["search"], page("strategies.md")
    best = max(found["rows"], key=lambda row: row["mean"])
    for row in found["rows"]:
        cells = [row["learning_rate"], ", ".join(f"{x:.2f}" for x in row["success"]), mean_of(row["success"], 2)]
        assert f"| {' | '.join([*cells, from_the_best(row, best)])} |" in text, cells
        assert sum(row["success"]) / len(row["success"]) == pytest.approx(row["mean"], abs=1e-3)
    assert found["command"] in text.replace("\\ ", "")
    kept = {
        row["learning_rate"]: [max(pair) for pair in zip(row["half_way"], row["success"], strict=True)]
        for row in found["rows"]
    }
    assert f"by what is kept ({paired(kept['1.6e-3'], kept['4e-4'])}, noise)" in text


def paired(one, other, words="{:+.2f} ± {:.2f}"):
    apart = [x - y for x, y in zip(one, other, strict=True)]
    return words.format(sum(apart) / len(apart), report.half_width_of(apart))


def test_what_is_concluded_of_compared_policies_is_what_their_pairs_say():
    strategies, structures = page("strategies.md"), page("structures.md")
    few = {
        (row["demonstrations"], row["method"]): row["success"] for row in result("strategies_cpu")["few_shot"]["rows"]
    }
    for method, words in (("full", "all parameters"), ("lora", "adapters"), ("head", "the head alone")):
        assert f"{words} {paired(few['50', method], few['2', method])}" in strategies
    apart = {row["way"]: row["means"] for row in result("strategies_cpu")["adapt"]["apart"]}
    for way in ("mixed", "tuned"):
        assert f"`{way}` {paired(apart[way], apart['source'])}" in strategies
    rows = {
        name: {row["variant"]: row for row in comparison["rows"]}
        for name, comparison in result("policies_cpu")["comparisons"].items()
    }
    kept = rows["cotraining"]["together"]
    assert min(x - y for x, y in zip(kept["answers"], kept["answers_before"], strict=True)) > -0.01
    assert f"({paired(kept['answers'], rows['cotraining']['demonstrations alone']['answers'])} against" in strategies
    often = [sum(row["tasks"][f"{way}_drawer"] >= 0.9 for row in rows["heads"].values()) for way in ("close", "open")]
    assert (
        often == [4, 3]
        and "closed by most (0.9 and more for four of the heads) and opened as often by three" in structures
    )
    lamp = [f"{rows['data'][name]['tasks']['turn_on_led']:.2f}" for name in ("0.1x", "1x", "5x")]
    assert "({} of its trials) than with all ({}) or five times as much ({})".format(*lamp) in structures


def test_the_table_of_what_heads_cost_is_that_of_its_measurement():
    found, text = result("policies_cpu")["costs"], page("structures.md")
    for name, cost in found["heads"].items():
        count = f"{cost['head_parameters']:,}".replace(",", " ")
        assert f"| {name} | {cost['milliseconds']:.2f} | {cost['step_bytes'] / 2**20:.1f} | {count} |" in text, name


def solved(row):
    rate = row["in_a_row"][0]
    low, high = rate["interval"]
    return f"{100 * rate['value']:.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def points(change):
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * change[end] for end in ("value", "low", "high")))


def compared(found):
    """Condition -> both policies' rows and how many trials only one of them solved."""
    only = {row["condition"]: "{first} / {second}".format(**row["counts"]) for row in found["differences"]}
    rows = {(row["policy"], row["condition"]): row for row in found["conditions"]}
    conditions = dict.fromkeys(row["condition"] for row in found["conditions"])
    return {name: ([rows[x, name] for x in found["policies"]], only.get(name, "not tested")) for name in conditions}


def test_the_table_of_compared_checkpoints_is_that_of_its_run():
    found, text = result("compare_cpu"), page("comparing.md")
    for condition, ((one, two), only) in compared(found).items():
        change = points(one["change"]) if one["change"] else ""
        line = f"| `{condition}` | {solved(one)} | {change} | {solved(two)} | {only} |".replace("|  |", "| |")
        assert line in text, line
    usual = next(row for row in found["differences"] if row["condition"] == "usual")
    shown = "{:+.1f} points ({:+.1f} to {:+.1f})".format(
        *(100 * usual["rate"][end] for end in ("value", "low", "high"))
    )
    assert shown in text and f"p = {usual['counts']['p']:g}" in text
    assert f"flatters it by {100 * found['selection']['optimism']:.1f} point" in text


def test_the_figures_of_simplerenv_are_those_of_its_run():
    found, text = result("simpler_cpu"), page("how_to/simpler.md")
    for who in ("scripted", "random"):
        assert f"| {found[who]['solved']} of {found['layouts']} |" in text
    assert f"{found['seconds_per_step']['scripted']:.3f} s" in text


def test_the_figures_of_the_gymnasium_page_are_those_of_its_runs():
    found, text = result("fetch_reach_cpu"), page("how_to/gymnasium.md")
    assert "in {}, {} and {} of {} episodes".format(*found["success"], found["episodes"]) in text
    assert "in {}, {} and {} of {}, and its".format(*found["before"]["success"], found["before"]["episodes"]) in text
    assert found["all"]["count"] == sum(found["success"]) and f"{share(found['all'])} of all" in text
    assert "{attempted} demonstrations, {frames} frames".format(**found["demonstrations"]) in text
    assert "it was {success} of {episodes}".format(**found["without_wander"]) in text


def test_the_table_beside_pytorch_is_that_of_its_run():
    found, text = result("against_torch_cpu"), (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert f"{found['parameters'] / 1e6:.1f} M parameters" in text
    assert max(found["largest_difference"].values()) < 5e-6
    for name, section in found["sections"].items():
        ours, theirs = (section["median_seconds"][side] for side in ("ours", "torch"))
        times = (
            f"{1e3 * ours:.1f} ms | {1e3 * theirs:.1f} ms" if name == "control" else f"{ours:.3f} s | {theirs:.3f} s"
        )
        ratio, fastest = section["times_of_torch"], section["times_of_torch_fastest"]
        row = next(line for line in text.splitlines() if f"| {times} |" in line)
        assert f"{ratio:.2f}" in row and row.endswith(f"| {fastest:.2f} |")


def test_what_an_h200_did_is_what_its_result_files_say():
    text, steps, control = page("clusters.md"), result("train_step_h200"), result("policy_step_h200")
    for name in ("xla_attention_erfc", "cudnn_attention_erfc", "cudnn_attention_erf"):
        row, held = steps[name]["windows_per_segment"]["8"], steps[name]["device_peak_bytes"]
        cells = (row["seconds_per_step"] * 1e3, row["windows_per_second"], row["mfu"] * 100, held / 1e9)
        assert "| {:.0f} | {:.1f} | {:.1f} % | {:.1f} GB |".format(*cells) in text
    shared = steps["k_1_8_16"]
    for k, row in shared["windows_per_segment"].items():
        times, limit = (shared["speedup"][k][name] for name in ("measured", "limit"))
        cells = (k, row["frames_per_step"], row["seconds_per_step"] * 1e3, row["windows_per_second"], times, limit)
        rest = (row["mfu"] * 100, row["program_peak_bytes"] / 1e9)
        line = "| {} | {} | {:.0f} | {:.1f} | {:.2f} | {:.2f} | {:.1f} % | {:.1f} GB |".format(*cells, *rest)
        assert line in text
    again = control["as_of_2026_11_27"]["slots"]["1"]["median_seconds"] * 1e3
    assert f"(`as_of_2026_11_27`) | {again:.2f} |" in text
    kinds = steps["kernels_of_three_steps"]["kinds_seconds"]
    parts = "{products:.0f} of products".format(**{kind: x / 3 * 1e3 for kind, x in kinds.items()})
    assert parts in text and f"{kinds['attention'] / 3 * 1e3:.0f} of attention" in text
    for row in control["seconds_alone_and_in_turns_ms"].values():
        cells = [f"{row[key]:.2f}" for key in ("alone_median_ms", "median_ms")]
        assert all(cell in text for cell in cells)
    for layer in result("attention_h200")["layers"].values():
        for way in ("ours", "xla", "cudnn"):
            for part in ("forward", "gradient"):
                assert f"{layer[part][way] * 1e3:.2f}" in text
