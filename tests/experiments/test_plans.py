"""The matrix of plans: what is chosen without a compiler, and estimates beside what compilers said."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks import plans
from robovlms_jax.parallel import targets
from robovlms_jax.training import memory

MATRIX = json.loads((pathlib.Path(plans.__file__).parent / "results/plans/matrix.json").read_text(encoding="utf-8"))
COMPILED = {(x["preset"], x["target"]): x for x in MATRIX if "bytes" in x.get("compiled", {})}


def test_a_plan_has_the_most_windows_for_which_there_is_room(monkeypatch):
    # The decision alone, with an invented estimate: of a device with room for four of them.
    room, asked = targets.parse("v5e:4x4").figures.memory / plans.ROOM, []

    def invented(loss_fn, state, batch, **others):
        asked.append(batch["robot"].window_mask.shape[1])
        return memory.Estimate(0, 0, 0, int(asked[-1] / 5 * room), 0)

    monkeypatch.setattr(memory, "estimate", invented)
    monkeypatch.setattr(plans, "_traced", lambda preset, windows: (None, 197e12))
    row = plans.estimated("sample", "v5e:4x4")
    assert asked == [8, 4] and row["windows_per_segment"] == 4
    assert row["windows_per_step"] == 4 * 16 and row["mesh"] == {"data": 1, "fsdp": 16}
    assert row["compute_s"] == 1.0 and plans.windows_per_s(row) == 64.0
    monkeypatch.setattr(memory, "estimate", lambda *_, **__: memory.Estimate(0, 0, 0, int(2 * room), 0))
    assert plans.estimated("sample", "v5e:4x4")["windows_per_segment"] == 0


def test_presets_with_equal_plans_are_one_line_of_the_table():
    row = MATRIX[0] | {"target": "h100:8"}
    other = row | {"preset": "other", "windows_per_segment": 0}
    text = plans.markdown([row | {"preset": "one"}, row | {"preset": "two"}, other]).splitlines()
    assert len(text) == 4 and text[2].startswith("| `one`, `two` | ") and "no room" in text[3]


def test_the_table_of_the_page_is_that_of_the_plans():
    page = (pathlib.Path(__file__).parents[2] / "docs/clusters.md").read_text(encoding="utf-8")
    assert plans.markdown(MATRIX) in page


REMAT = json.loads((pathlib.Path(plans.__file__).parent / "results/plans/remat.json").read_text(encoding="utf-8"))


def test_the_table_of_what_layers_keep_is_that_of_its_programs():
    page = (pathlib.Path(__file__).parents[2] / "docs/clusters.md").read_text(encoding="utf-8")
    assert plans.kept_table(REMAT) in page
    for found in (x for target in ("h100:8", "v5e:4x4") for x in REMAT[target].values()):
        assert 0.85 < found["estimate_bytes"] / found["peak_bytes"] < 1.15
        assert found.get("host_estimate_bytes", 0) == pytest.approx(found.get("host_bytes", 0), rel=0.02)
    # By PCIe 5 with 16 lanes, 64 GB/s.
    assert f"take {REMAT['h100:8']['offload']['host_bytes'] / 64e9 * 1e3:.0f} ms each way" in page


@pytest.mark.parametrize("key", sorted(COMPILED), ids="-".join)
def test_estimates_are_within_15_percent_of_what_compilers_say(key):
    row = COMPILED[key]
    assert 0.85 < row["estimate"]["total"] / row["compiled"]["bytes"]["peak"] < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(COMPILED), ids="-".join)
def test_estimates_are_still_those_that_were_compared(key):
    # Fails if a change to the model or to the estimate moves it away from what the compiler said.
    again = plans.estimated(*key)
    assert again["windows_per_segment"] == COMPILED[key]["windows_per_segment"]
    assert again["estimate"]["total"] == pytest.approx(COMPILED[key]["estimate"]["total"], rel=0.03)
