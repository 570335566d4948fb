"""Figures of docs/clusters.md that compilers said are those of their files in benchmarks/results/plans."""

from __future__ import annotations

import pytest

from tests.test_figures import page, result


def test_the_traffic_of_control_steps_is_that_of_their_plans():
    found, text = result("plans/control_before_after"), page("clusters.md")
    newest = "windows_side_by_side"
    for target, name in (("h100:1", "H100"), ("orin:1", "AGX Orin")):
        plan = result(f"plans/kosmos_lstm_{target.replace(':', '_')}_control")["plans"]["control"]
        assert found[newest]["traffic"][target] == plan["traffic"]
        before, after = (found[when]["traffic"][target] for when in ("before", newest))
        rate = plan["roofs_s"]["memory"] / after
        assert f"| {name} | {before / 1e9:.2f} GB, {before * rate * 1e3:.3g} ms |" in text
        floor, need = plan["bytes"]["parameters"] / 1e9, plan["needed_s"] * 1e3
        assert f"| {after / 1e9:.2f} GB, {after * rate * 1e3:.3g} ms | {floor:.2f} GB, {need:.3g} ms |" in text
    causes = list(found["by_cause_h100"].values())
    assert sum(causes) == pytest.approx(found["windows_side_by_side"]["traffic"]["h100:1"], rel=1e-3)
    assert all(f"{cause / 1e9:.2f}" in text for cause in causes)
    v5e = found["v5e_five_layers"]
    moved, weights = v5e["traffic"], v5e["weights_without_the_words_table"]
    assert f"{moved / 1e9:.3f} GB of traffic for {weights / 1e9:.3f} GB of weights, {moved / weights:.2f} times" in text
    layers = found["training_h100_8_two_layers"]["per_layer_of_both_towers"]
    assert f"{sum(layers.values()) / 1e9:.1f} GB for each pair of layers" in text


def test_what_plans_say_with_cudnn_is_what_their_results_say():
    found, text = result("plans/cudnn_before_after"), page("clusters.md")
    steps, control = found["training_h100_8"], found["control_h100_1"]
    for name in ("xla", "cudnn", "constants", "plain_norms"):
        step = steps[name]
        took = step["schedule_s"]["kernels"] + step["schedule_s"]["waited"]
        cells = (took * 1e3, step["peak_bytes"] / 2**30, step["windows_per_s"], step["mfu"] * 100)
        assert "| {:.1f} ms | {:.2f} GiB | {:.0f} | {:.1f} % |".format(*cells) in text
        assert f"| {step['traffic'] / 1e9:.1f} GB | {step['roofs_s']['memory'] * 1e3:.0f} /" in text
    causes = steps["by_cause"]["bytes"]
    assert sum(causes.values()) == pytest.approx(steps[steps["by_cause"]["of"]]["traffic"], rel=1e-3)
    assert all(f"| {cause} | {moved / 1e9:.1f} |" in text for cause, moved in causes.items())
    for name in ("xla", "cudnn", "biases", "apart", "triton"):
        step = control[name]
        said = f"{step['traffic'] / 1e9:.2f} GB and {step['roofs_s']['memory'] * 1e3:.2f} ms"
        assert f"{said}, and {step['kernels']} kernels" in text if name == "apart" else said in text
    newest = control["biases"]
    over = newest["roofs_s"]["memory"] / newest["needed_s"]
    assert (
        f"by {newest['kernels']} kernels instead of {control['cudnn']['kernels']}: {over:.2f} times the floor" in text
    )
    now = control["read"]
    over, fewer = now["roofs_s"]["memory"] / now["needed_s"], 100 - 100 * now["flops"] / newest["flops"]
    said = f"{now['traffic'] / 1e9:.2f} GB and {now['roofs_s']['memory'] * 1e3:.2f} ms by {now['kernels']} kernels"
    assert f"{said}: {over:.2f} times the floor, 1.3 was the aim, and {fewer:.1f} % fewer FLOPs" in text
    left = control["by_cause"]["bytes"]
    assert sum(left.values()) == pytest.approx(control[control["by_cause"]["of"]]["traffic"], rel=1e-3)
    assert ", ".join(f"{cause} {moved / 1e9:.2f}" for cause, moved in left.items()) in text
    beyond = control["beyond_weights"]
    moved = sum(beyond["bytes"].values()) / 1e9, (now["traffic"] - left["weights"]) / 1e9
    assert "The {} kinds of kernels that move {:.2f} of the {:.2f} GB".format(len(beyond["bytes"]), *moved) in text
    rows = [(name, beyond["kernels"][name], x / 1e6, x / 3.35e6) for name, x in beyond["bytes"].items()]
    assert all("| {} | {} | {:.1f} | {:.1f} |".format(*row) in text for row in rows)
    assert f"moves {steps['biases']['traffic'] / 1e9:.1f} GB with such biases" in text
    assert f"{steps['padded']['traffic'] / 1e9:.1f} GB with KOSMOS-2's features padded once" in text


def test_what_masks_inside_of_loops_cost_tpus_is_what_their_results_say():
    found, text = result("plans/masks_tpu_before_after"), page("clusters.md")
    for target in ("v5p:2x2x1", "v6e:4x4"):
        steps = [found[target][when] for when in ("before", "inside", "biases")]
        took = [1e3 * (step["schedule_s"]["kernels"] + step["schedule_s"]["waited"]) for step in steps]
        rows = (
            ([step["traffic"] / 1e9 for step in steps], "{:.1f}, {:.1f} and {:.1f} GB"),
            (took, "{:.1f}, {:.1f} and {:.1f} ms by its schedule"),
            ([step["peak_bytes"] / 2**30 for step in steps], "{:.2f}, {:.2f} and {:.2f} GiB"),
        )
        assert f"{target} " + ", ".join(form.format(*values) for values, form in rows) in text
    last = [found[target]["biases"] for target in ("v5p:2x2x1", "v6e:4x4")]
    mfu, estimate = ([step[name] for step in last] for name in ("mfu", "estimate_bytes"))
    assert "MFU by the slowest resource {:.1f} and {:.1f} %".format(*(100 * x for x in mfu)) in text
    assert (
        "estimated as {:.2f} and {:.2f} GiB, {:.1f} and {:.1f} % too little".format(
            *(x / 2**30 for x in estimate),
            *(100 - 100 * x / y["peak_bytes"] for x, y in zip(estimate, last, strict=True)),
        )
        in text
    )
