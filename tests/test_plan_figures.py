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
    for name in ("xla", "cudnn"):
        step = control[name]
        assert f"{step['traffic'] / 1e9:.2f} GB and {step['roofs_s']['memory'] * 1e3:.2f} ms by" in text
