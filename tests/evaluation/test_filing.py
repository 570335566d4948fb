"""Results are found again by what they are results of, and never shown as another's."""

from __future__ import annotations

import pytest

from robovlms_jax.evaluation import chains, filing
from tests.evaluation import test_chains

CONDITIONS = {"checkpoint": "step_3-abc", "image_size": [200, 84], "protocol": {"scene": "D", "tasks": []}}


def evaluate(directory, conditions=CONDITIONS, policy_name="toy"):
    return test_chains.evaluate(directory, conditions=conditions, policy_name=policy_name)


def test_the_same_policy_under_another_path_finds_its_results_and_others_do_not(tmp_path):
    first = evaluate(filing.place(tmp_path, "line", CONDITIONS))
    again = evaluate(filing.place(tmp_path, "line", CONDITIONS), policy_name="a copy elsewhere")
    assert again.results == first.results
    for change in ({"checkpoint": "step_4-abd"}, {"image_size": [64, 32]}, {"protocol": {"scene": "A", "tasks": []}}):
        other = filing.place(tmp_path, "line", CONDITIONS | change)
        assert not other.exists()
        with pytest.raises(ValueError, match=rf"another setup \({next(iter(change))}: "):
            evaluate(filing.place(tmp_path, "line", CONDITIONS), CONDITIONS | change)


def test_results_of_earlier_versions_are_named_and_left_alone(tmp_path, caplog):
    old = test_chains.evaluate(tmp_path / "playtable-D-chunk")
    new = filing.place(tmp_path, "line", CONDITIONS)
    assert (
        f"do not say which checkpoint they are of, and are left alone: {tmp_path / 'playtable-D-chunk'}" in caplog.text
    )
    evaluate(new)
    assert chains.load(tmp_path / "playtable-D-chunk") == old
    caplog.clear()
    assert filing.place(tmp_path, "line", CONDITIONS) == new and not caplog.text  # said once


def test_a_directory_that_was_named_is_used_unless_it_holds_other_results(tmp_path, caplog):
    assert filing.choose(tmp_path / "out", "line", CONDITIONS) == tmp_path / "out"
    evaluate(tmp_path / "out")
    assert filing.choose(tmp_path / "out", "line", CONDITIONS) == tmp_path / "out"
    assert "another setup" not in caplog.text
    other = CONDITIONS | {"checkpoint": "step_4-abd"}
    target = filing.choose(tmp_path / "out", "line", other)
    assert target.parent == tmp_path / "out" / "step_4-abd"
    assert "results of another setup (checkpoint: 'step_3-abc' there, 'step_4-abd' here)" in caplog.text
    test_chains.evaluate(tmp_path / "old")
    assert filing.choose(tmp_path / "old", "line", CONDITIONS).parent == tmp_path / "old" / "step_3-abc"
    assert "checkpoint: None there" in caplog.text
