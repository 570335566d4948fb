"""`experiments.compare`: what is refused, what is asked, what the page says."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import types

import numpy as np
import pytest

from experiments import calvin_abcd, compare, evaluation_settings
from robovlms_jax.control import robot
from robovlms_jax.control.execution import Execution
from robovlms_jax.control.retrying import Retry
from robovlms_jax.evaluation import chains, comparison, conditions
from robovlms_jax.evaluation.rollout import TrialResult
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.runs import load, played
from robovlms_jax.runs.config import ExperimentConfig

TWIN = "robovlms_jax/demo/twin"
FIXTURES = ("open_drawer", "close_drawer", "turn_on_led", "turn_off_led")


def policy(name, **changes) -> compare._Policy:
    settings = ExperimentConfig()
    rollouts = dataclasses.replace(settings.rollouts, trials=1, **changes)
    settings = dataclasses.replace(settings, rollouts=rollouts)
    return compare._Policy(name, name, pathlib.Path(name), None, settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("open_drawer",)}, r"differ in tasks: a has , b has open_drawer.*say --tasks"),
        ({"execution": Execution("first")}, "differ in execution: a has chunk, b has first"),
        ({"image_size": (96, 64)}, "differ in image_size: a has 200 84, b has 96 64"),
    ],
)
def test_checkpoints_that_were_asked_otherwise_are_refused_by_name_unless_somebody_chose(changes, message):
    first, second = policy("a"), policy("b", **changes)
    with pytest.raises(ValueError, match=message):
        compare._require_alike([first, second], typed=())
    compare._require_alike([first, second], typed=tuple(changes))


def test_checkpoints_of_other_robots_are_refused_by_name():
    other = robot.RobotSpec("mine", 10.0, (), (robot.Dimension("elbow", "rad", "absolute", "joint", "", -1.0, 1.0),))
    strange = dataclasses.replace(
        policy("b"),
        settings=dataclasses.replace(
            ExperimentConfig(), policy=PolicyConfig(robot=other, action_low=(-1.0,), action_high=(1.0,))
        ),
    )
    with pytest.raises(ValueError, match=r"b: this simulator is driven as another robot[\s\S]*mine"):
        compare._require_alike([policy("a"), strange], typed=compare.OWN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": ("fog",)}, r"conditions has unknown \['fog'\]"),
        ({"env": "calvin", "conditions": ("lighting",)}, "env calvin has no condition lighting: calvin_env's cameras"),
        ({"env": "calvin"}, "needs calvin_root"),
        ({"weights": ("int8",)}, "weights has 1 words for 2 checkpoints"),
        ({"weights": ("int8", "int9")}, r"weights has unknown \['int9'\]"),
        ({"tasks": ("fly",)}, r"tasks has unknown \['fly'\]"),
        ({"trials": 0}, "trials=0 must be at least 1"),
        ({"tasks": FIXTURES, "ask_chains": True}, "leave one out"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        compare.CompareConfig(("a", "b"), **changes)


def test_results_of_versions_that_could_try_nothing_again_are_gone_on_with():
    policy = compare._Policy("a", "step_3-abc", pathlib.Path("a"), None, calvin_abcd.FIXTURES)
    for retry, named in ((Retry(), False), (Retry(9), True)):
        config = compare.CompareConfig(("a", "b"), execution=Execution(retry=retry))
        stored = compare._settings(config, policy, "usual").conditions["protocol"]["execution"]
        assert ("retry" in stored) == named


def test_the_same_policy_twice_is_refused_and_settings_come_from_the_checkpoints_run():
    with pytest.raises(ValueError, match=r"names the same policy twice: .*demo/twin"):
        compare._policies(compare.CompareConfig((TWIN, TWIN)))
    start = compare.of_checkpoints(["--checkpoints", TWIN, TWIN, "--trials", "3"])
    assert start.checkpoints == (TWIN, TWIN) and len(start.tasks) == 8 and start.max_steps == 160
    assert start.image_size == (96, 64) and start.execution == Execution("receding", horizon=5)
    assert compare.of_checkpoints(["--checkpoints", TWIN, "--ask_chains"]).tasks == ()
    found = compare._policies(compare.CompareConfig((TWIN, TWIN), weights=("stored", "int8")))
    assert [each.label.removeprefix(found[0].label) for each in found] == ["", "-int8"]


def test_in_the_real_simulator_compare_asks_what_evaluate_asks(monkeypatch, tmp_path):
    preset = calvin_abcd.PRESETS["playtable_fixtures"]
    monkeypatch.setattr(load, "load_config", lambda path: preset)
    real = ["--env", "calvin", "--calvin_root", "x"]
    one = evaluation_settings.of_checkpoint(["--checkpoint", "run", *real])
    many = compare.of_checkpoints(["--checkpoints", "run", *real])
    for name in (*played.of(preset).asking("calvin"), "processes"):
        assert getattr(many, name) == getattr(one, name), name
    larger = dataclasses.replace(preset, rollouts=dataclasses.replace(preset.rollouts, image_size=(112, 84)))
    pair = [compare._Policy(name, name, tmp_path / name, None, x) for name, x in (("a", preset), ("b", larger))]
    compare._require_alike(pair, (), "calvin")  # pictures of the real one are what its cameras give
    with pytest.raises(ValueError, match=r"differ in image_size: .*a has 96 64, .*b has 112 84"):
        compare._require_alike(pair, ())


class Tables:
    """Stands for PlayTable."""

    name, about, size = "playtable-D", {}, 1

    def __init__(self, *args, **kwargs): ...

    def reset(self, slots, starts): ...

    def observe(self, slots):
        return [types.SimpleNamespace(images={"static": np.zeros((8, 8, 3), np.uint8)})]


def results(trials, solved):
    return tuple(
        TrialResult(t.index, t.tasks, t.instructions, (bool(ok),), (10,), t.labels) for t, ok in zip(trials, solved)
    )


def test_the_page_holds_everything_and_says_who_is_better(monkeypatch, tmp_path):
    rng, folders = np.random.default_rng(0), []

    def evaluated(acting, envs, trials, folder, settings):
        folders.append(folder.relative_to(tmp_path).parts)
        share = 0.2 if trials[0].labels["condition"] == "empty" else 0.9 if "int8" in str(folder) else 0.5
        return chains.Evaluation(settings.setup(envs), results(trials, rng.uniform(size=len(trials)) < share))

    acting = types.SimpleNamespace(encode_text=lambda text: text)
    monkeypatch.setattr(compare, "PlayTables", Tables)
    monkeypatch.setattr(compare.chains, "evaluate", evaluated)
    monkeypatch.setattr(compare.load, "load_batched_policy", lambda *args, **kwargs: acting)
    config = compare.CompareConfig(
        (TWIN, TWIN), str(tmp_path), weights=("stored", "int8"), tasks=FIXTURES, trials=60, image_size=(96, 64)
    )
    page = compare.compare(config)
    assert len(folders) == 20 and {parts[0] for parts in folders} == {"results"} and len(set(folders)) == 20
    text, record = (tmp_path / "comparison.md").read_text(), json.loads((tmp_path / "comparison.json").read_text())
    html = page.read_text()
    assert "data:image/png;base64," in html and not re.search(r'(src|href)="(?!data:|#)', html)
    assert "**twin 0 int8 is better**" in text and "told apart" in text
    assert "These are not CALVIN's numbers" in text.replace("these are", "These are")
    usual = [each for each in record["differences"] if each["condition"] == "usual"]
    assert len(usual) == 1 and usual[0]["told_apart"] and usual[0]["rate"]["high"] < 0
    assert {each["condition"] for each in record["differences"]}.isdisjoint({"empty", "shuffled", "other_task"})
    assert record["selection"]["chosen"] == 1
    assert len(record["conditions"]) == 20
    changes = {each["condition"]: each["change"] for each in record["conditions"] if each["policy"] == "twin 0"}
    assert changes["usual"] is None and changes["empty"]["high"] < 0


def entry(name, scores, tasks=("a", "b"), start=0):
    made = tuple(
        TrialResult(i, tasks, tasks, (True,) * score + (False,) * (score < 2), (1,) * min(score + 1, 2))
        for i, score in enumerate(scores, start)
    )
    return comparison.Entry(name, {conditions.USUAL: chains.Evaluation({"env": "x"}, made)})


def test_chains_are_compared_by_their_first_and_by_all_tasks():
    first, second = entry("p", [2, 2, 1, 0]), entry("q", [2, 0, 0, 0])
    one, all_of_them = comparison.differences([first, second])
    assert (one.at_least, all_of_them.at_least) == (1, 2)
    assert (one.counts.first, one.counts.second, one.counts.both, one.counts.neither) == (2, 0, 1, 1)
    assert (all_of_them.counts.first, all_of_them.counts.both) == (1, 1)
    assert one.length.value == pytest.approx(0.75) and one.counts.p == 0.5
    assert one.corrected == 1.0 and not one.told_apart


def test_trials_are_paired_by_number_and_must_be_the_same():
    found, _ = comparison.differences([entry("p", [2, 1]), entry("q", [1, 2], start=1)])
    assert found.trials == 1
    with pytest.raises(ValueError, match=r"trial 0 asked \('a', 'b'\) on one side and \('b', 'a'\)"):
        comparison.differences([entry("p", [1]), entry("q", [1], tasks=("b", "a"))])
    with pytest.raises(ValueError, match="no trial was run by both sides"):
        comparison.differences([entry("p", [1]), entry("q", [1], start=5)])


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on_and_says_the_same(tmp_path):
    start = compare.of_checkpoints(["--checkpoints", TWIN])
    config = dataclasses.replace(
        start, out=str(tmp_path), trials=8, conditions=("usual", "empty", "camera"), processes=8, max_steps=40
    )
    compare.compare(config)
    before = (tmp_path / "comparison.md").read_text()
    stored = sorted(tmp_path.glob("results/*/camera/results-000.jsonl"))[0]
    lines = stored.read_text().splitlines(keepends=True)
    stored.write_text("".join(lines[:4]))  # killed after three trials
    compare.compare(config)
    assert (tmp_path / "comparison.md").read_text() == before
    assert len(stored.read_text().splitlines()) == 9
    with pytest.raises(ValueError, match="another setup"):
        compare.compare(dataclasses.replace(config, max_steps=41))
