"""The grid, its resumption and its report. Training and rollouts are replaced by notes of what was asked for."""

from __future__ import annotations

import json
import pathlib

import jax
import pytest

from experiments import compare_structures, evaluate
from robovlms_jax.evaluation import chains
from robovlms_jax.evaluation.rollout import TrialResult
from robovlms_jax.playtable import recording
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.runs import run
from robovlms_jax.training import guards


@pytest.fixture
def asked(monkeypatch):
    """What was recorded, trained and rolled out, in order. A gpt diverges."""
    log = []

    def record(config):
        log.append(("record", config.episodes, config.out))
        return {"recorded": 1, "attempted": 1, "frames": 1}

    def train(name, config):
        config.validate(1)
        log.append(("train", name))
        if heads.kind_of(type(config.policy.head)) == "gpt":
            raise guards.DivergedError("loss is nan")
        done = pathlib.Path(config.train.output)
        done.mkdir(parents=True)
        report = {"facts": {"parameters": 7}, "overall": {"count": 3, "translation_m": 0.002, "mae": [0.1] * 6}}
        (done / "report.json").write_text(json.dumps(report))
        return done

    def roll_out(config):
        log.append(("roll out", pathlib.Path(config.out).parts[-3], config.execution.label))
        result = TrialResult(0, ("open_drawer",), ("open it",), (config.execution.mode == "chunk",), (9,))
        setup = {"env": "playtable-D", "policy": "p", "execution": "e", "max_steps": 1, "stop_at_success": True}
        pathlib.Path(config.out).mkdir(parents=True)
        list(chains._append(pathlib.Path(config.out) / "results-000.jsonl", setup, iter([result])))
        return pathlib.Path(config.out) / "rollouts.md"

    monkeypatch.setattr(recording, "record", record)
    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(evaluate, "evaluate", roll_out)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    return log


def test_the_grid_has_every_product_and_nothing_twice():
    full = compare_structures.cells(compare_structures.CompareConfig(full=True))
    assert {cell.structure for cell in full} == set(heads.products())
    assert len({cell.name for cell in full}) == len(full)
    one_step = [cell for cell in full if cell.structure.history == "one_step"]
    assert {cell.window for cell in one_step} == {1}
    assert {cell.window for cell in full if cell not in one_step} == {1, 4, 8, 16}
    assert {len(cell.executions) for cell in full if cell.chunk == 1} == {1}
    assert {len(cell.executions) for cell in full if cell.chunk > 1} == {4}
    default = compare_structures.cells(compare_structures.CompareConfig())
    assert [compare_structures._name(cell.structure) for cell in default] != []
    assert {compare_structures._name(cell.structure) for cell in default} == set(compare_structures.PAPER)


def test_every_cell_is_a_configuration_that_fits_together():
    config = compare_structures.CompareConfig(full=True)
    for cell in compare_structures.cells(config):
        experiment = compare_structures.experiment(cell, config, pathlib.Path("nowhere"))
        experiment.validate(1)
        assert heads.kind_of(type(experiment.policy.head)) == cell.structure.head


def test_actions_as_words_are_decoded_at_once_and_taught_at_five_times_the_rate_of_the_other_heads():
    config = compare_structures.CompareConfig(learning_rate=1e-4)
    made = [compare_structures.experiment(cell, config, pathlib.Path("x")) for cell in compare_structures.cells(config)]
    rates = {x.policy.readout: x.optimizer.learning_rate for x in made}
    assert rates == {"action_query": pytest.approx(1e-4), "token": pytest.approx(5e-4)}
    assert [x.policy.head.decoding for x in made if x.policy.readout == "token"] == ["parallel"]


def test_finished_cells_are_not_run_again_and_more_may_follow(tmp_path, asked):
    names = ("one_step-action_query-mlp", "policy_head-action_query-gpt")
    config = compare_structures.CompareConfig(out=str(tmp_path), structures=names, windows=(4,), steps=5, trials=1)
    text = compare_structures.compare(config).read_text()
    first = "one_step-action_query-mlp-window1-chunk5"
    assert asked == [
        ("record", 1600, "data/playtable_fixtures"),
        ("train", first),
        ("roll out", first, "first"),
        ("roll out", first, "receding 2"),
        ("roll out", first, "chunk"),
        ("train", "policy_head-action_query-gpt-window4-chunk5"),
    ]
    assert "0/1 = 0%" in text and "1/1 = 100%" in text and "diverged" in text and "not CALVIN's" in text
    assert "| 2.0 |" in text  # mm
    record = json.loads((tmp_path / "structures.json").read_text())
    assert len(record["cells"]) == 6
    assert (tmp_path / "structures.png").stat().st_size > 1000
    asked.clear()
    assert compare_structures.compare(config).read_text() == text
    assert asked == [("record", 1600, "data/playtable_fixtures")]  # which finds that all is there
    asked.clear()
    more = compare_structures.CompareConfig(
        out=str(tmp_path),
        structures=names[:1],
        chunks=(1, 5),
        executions=("first", "chunk", "ensemble"),
        steps=5,
        trials=1,
    )
    compare_structures.compare(more)
    new = "one_step-action_query-mlp-window1-chunk1"
    assert asked[1:] == [("train", new), ("roll out", new, "first"), ("roll out", first, "ensemble 0.01")]
    with pytest.raises(ValueError, match=r"another budget \(steps: 5 there, 6 here\)"):
        compare_structures.compare(compare_structures.CompareConfig(out=str(tmp_path), steps=6, trials=1))


def test_impossible_comparisons_are_refused():
    with pytest.raises(ValueError, match=r"one_step-pool-lstm.*known: all, .*policy_head-action_query-lstm"):
        compare_structures.CompareConfig(structures=("one_step-pool-lstm",))
    with pytest.raises(ValueError, match="windows"):
        compare_structures.CompareConfig(windows=(0,))
