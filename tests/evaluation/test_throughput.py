from __future__ import annotations

import json
import os
import types

import jax
import numpy as np
import pytest

from benchmarks import evaluation, host_loop, rollouts
from robovlms_jax import schema
from robovlms_jax.control.execution import Execution
from robovlms_jax.envs import vector
from tests.evaluation.toy_world import LineEnv


def test_a_picture_is_taken_once_per_chunk_and_every_environment_takes_all_steps(monkeypatch):
    """Breaks when the idle policy ends a trial early, or pictures are paid for that nobody asked for."""
    lines = [LineEnv() for _ in range(3)]
    real = evaluation.rollout.SuccessCriterion

    def never(max_steps):
        return real(max_steps, completed=lambda old, new: [set()] * len(new))

    monkeypatch.setattr(evaluation.rollout, "SuccessCriterion", never)
    monkeypatch.setattr(LineEnv, "reset", lambda self, robot_obs, scene_obs: None)
    rates = evaluation._measure(vector.EnvPool(lines), chunk=5, steps=20)
    assert rates["steps_per_s"] > 0
    assert [line.steps for line in lines] == [6 + 20] * 3  # 6 to warm up
    assert [line.renders for line in lines] == [2 + 4] * 3


def test_impossible_measurements_are_refused():
    with pytest.raises(ValueError, match="positive"):
        evaluation.Args(tables=(0,))
    with pytest.raises(ValueError, match="chunks"):
        evaluation.Args(chunks=())


@pytest.mark.slow
def test_tables_and_processes_are_measured(tmp_path, capsys):
    out = tmp_path / "evaluation.json"
    args = evaluation.Args(tables=(2,), processes=(1,), chunks=(2,), image_size=(24, 16), steps=4, out=out)
    evaluation.main(args)
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["tables"]["2"]["chunk_2"]["steps_per_s"] > 0
    assert result["processes"]["1"]["chunk_2"]["steps_per_s"] > 0


def test_rates_of_rollouts_are_of_the_fastest_and_the_median_turn_and_the_first_is_left_out():
    def way(*seconds):
        left = iter(seconds)
        return lambda: rollouts.Turn(decisions=12, seconds=next(left), computing=2.0)

    found = rollouts._measured({"host": way(90.0, 4.0, 3.0, 6.0), "device": way(80.0, 1.0, 2.0, 2.0)}, repeats=3)
    assert found["host"] == {
        "first_seconds": 90.0,
        "decisions_per_s": 4.0,
        "decisions_per_processor_s": 6.0,
        "all": [3.0, 4.0, 2.0],
    }
    assert found["times_fastest"] == {"host": 3.0} and found["times_median"] == {"host": 2.0}


def test_processes_of_rollouts_share_out_the_trials_and_have_a_core_each(monkeypatch):
    played = []
    player = types.SimpleNamespace(results=lambda params, trials: played.append(trials) or ())
    monkeypatch.setattr(rollouts.rollouts, "Player", lambda *how: player)
    for count, part in ((4, 0), (2, 0), (2, 1)):
        rollouts.device(None, None, None, count, rollouts.Args(), part)()
    whole, first, second = played
    for one, other in zip(whole, [*first, *second], strict=True):
        assert one.instructions == other.instructions
        jax.tree.map(np.testing.assert_array_equal, one.start, other.start)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with pytest.raises(ValueError, match="processes=2 are to have a core each"):
        rollouts.Args(processes=2)


def test_an_earlier_revision_reads_a_checkpoint_without_the_fields_that_it_does_not_know(capfd):
    read = host_loop._lenient(schema.from_dict)
    assert read(Execution, {"mode": "receding", "horizon": 3, "later": 1}) == Execution("receding", horizon=3)
    assert "without later" in capfd.readouterr().err


def test_a_revision_that_git_does_not_know_is_named():
    message = "before='no-such-revision' cannot be had"
    with pytest.raises(ValueError, match=message), rollouts._checkout("no-such-revision"):
        pass
