"""What `experiments.evaluate` asks in CALVIN, under which protocol, and what it says meanwhile."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
import types

import pytest

from experiments import calvin_abcd, evaluate, evaluation_settings, scripted_presets
from robovlms_jax import cli
from robovlms_jax.control import robot
from robovlms_jax.control.asynchronous import AsyncConfig
from robovlms_jax.control.delayed import AsynchronousBatch
from robovlms_jax.control.execution import Execution
from robovlms_jax.control.retrying import Retry
from robovlms_jax.control.robot import CALVIN, end_effector
from robovlms_jax.data.registry import oxe
from robovlms_jax.demo import twin
from robovlms_jax.envs.calvin import adapter as calvin
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.evaluation import chains, filing
from robovlms_jax.evaluation.config import RolloutConfig
from robovlms_jax.evaluation.report import rollouts as rollout_report
from robovlms_jax.evaluation.rollout import Trial, TrialResult
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.runs import load
from robovlms_jax.runs.config import ExperimentConfig


@pytest.fixture
def checkout(tmp_path) -> str:
    """A checkout of mees/calvin as far as sentences go."""
    path = tmp_path / "calvin" / "calvin_models" / "conf" / "annotations" / "new_playtable_validation.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(f"{task}: ['please {task}']" for task in tasks.TASKS))
    return str(tmp_path / "calvin")


def config(**changes) -> evaluation_settings.EvaluateConfig:
    return evaluation_settings.EvaluateConfig(
        checkpoint="run", **{"env": "calvin", "calvin_root": "nowhere", **changes}
    )


def test_calvin_is_asked_the_benchmarks_own_sentences(checkout):
    trials, criterion = evaluate._trials(config(calvin_root=checkout, chains=3))
    assert criterion.completed is calvin.completed_in_each
    for trial in trials:
        assert trial.instructions == tuple(f"please {task}" for task in trial.tasks)
        assert trial.labels["phrasing"] == "benchmark"
    single, _ = evaluate._trials(config(calvin_root=checkout, chains=2, tasks=("open_drawer",)))
    assert single[1].instructions == ("please open_drawer",)


def test_other_wordings_are_asked_only_on_request_or_with_a_warning(checkout, caplog):
    held_out, _ = evaluate._trials(config(calvin_root=checkout, chains=1, held_out=True))
    assert held_out[0].labels["phrasing"] == "held out"
    assert not caplog.records
    without, _ = evaluate._trials(config(chains=1))
    assert without[0].labels["phrasing"] == "training"
    assert "calvin_root nowhere has no validation sentences" in caplog.text
    playtable, _ = evaluate._trials(
        evaluation_settings.EvaluateConfig(checkpoint="run", calvin_root=checkout, chains=1)
    )
    assert playtable[0].labels["phrasing"] == "training"


def test_the_official_protocol_is_the_whole_benchmark_and_says_so(checkout, monkeypatch, tmp_path):
    asked = {}

    def evaluated(policy, envs, trials, directory, settings, films, play):
        asked.update(settings=settings, trials=trials)
        trial = trials[0]
        result = TrialResult(trial.index, trial.tasks, trial.instructions, (False,), (360,), trial.labels)
        setup = {"env": "CALVIN", "policy": "p", "execution": settings.execution.label}
        return chains.Evaluation(setup | {"simulator": {"calvin_env": "797142c"}}, (result,))

    monkeypatch.setattr(evaluate.chains, "evaluate", evaluated)
    policy = types.SimpleNamespace(model=types.SimpleNamespace(config=PolicyConfig()))
    monkeypatch.setattr(evaluate.load, "load_batched_policy", lambda checkpoint, slots, weights: policy)
    monkeypatch.setattr(evaluate.load, "load_config", lambda checkpoint: ExperimentConfig())
    monkeypatch.setattr(evaluate.checkpoints, "locate", pathlib.Path)
    monkeypatch.setattr(evaluate.seals, "identity", lambda directory: evaluate.seals.Identity(3, "abc"))
    monkeypatch.setattr(evaluate.calvin, "calvin_env", lambda root, **kwargs: LineEnv())
    report = evaluate.evaluate(config(calvin_root=checkout, protocol="official", out=str(tmp_path / "out")))
    assert len(asked["trials"]) == 1000
    assert asked["settings"].execution == Execution("first")
    assert asked["settings"].criterion.max_steps == 360
    assert {trial.labels["phrasing"] for trial in asked["trials"]} == {"benchmark"}
    assert {trial.labels["protocol"] for trial in asked["trials"]} == {evaluation_settings.OFFICIAL_LABEL}
    text = report.read_text()
    assert "Simulator of CALVIN: calvin_env 797142c." in text
    assert f"Protocol: {evaluation_settings.OFFICIAL_LABEL}." in text
    assert "benchmark" in text


class LineEnv:
    name = "CALVIN"

    def close(self) -> None: ...


@pytest.mark.parametrize(
    "changes",
    [
        {"env": "playtable"},
        {"chains": 10},
        {"execution": Execution("ensemble")},
        {"held_out": True},
        {"max_steps": 100},
        {"tasks": ("open_drawer",)},
        {"scene": "A"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_contradicts_the_official_protocol_is_refused_by_name(changes):
    with pytest.raises(ValueError, match=rf"protocol official does not go with {next(iter(changes))}="):
        config(protocol="official", **changes)


@pytest.mark.parametrize("typed", [["--chains", "100"], ["--execution.mode=chunk"]], ids=" ".join)
def test_flags_that_contradict_the_official_protocol_are_refused_even_at_their_defaults(monkeypatch, typed):
    begun = ["evaluate", "--checkpoint", "run", "--env", "calvin", "--calvin_root", "x", "--protocol", "official"]
    monkeypatch.setattr(sys, "argv", [*begun, *typed])
    with pytest.raises(SystemExit, match="error: protocol official does not go with"):
        evaluate.main()


@pytest.mark.parametrize(
    ("changes", "owner"),
    [
        ({"env": "playtable", "egl": True}, "calvin"),
        ({"env": "playtable", "calvin_split": "debug"}, "calvin"),
        ({"env": "playtable", "simpler_statistics": "x.json"}, "simpler"),
        ({"image_size": (64, 32)}, "playtable"),
        ({"on_device": True, "films": 0}, "playtable"),
    ],
)
def test_a_field_that_the_environment_does_not_read_is_refused(changes, owner):
    with pytest.raises(ValueError, match=f"is for env {owner}"):
        config(**changes)


def test_what_one_program_cannot_do_is_refused():
    for changes in ({}, {"films": 0, "latency_ms": 10.0}):
        with pytest.raises(ValueError, match="on_device films nothing and knows no latency: pass --films 0"):
            config(env="playtable", calvin_root="", on_device=True, **changes)


@pytest.mark.slow
def test_one_program_on_the_device_has_the_results_of_the_hosts_loop(tmp_path):
    asked = {"tasks": ("open_drawer", "turn_on_led"), "chains": 6, "processes": 3, "image_size": (96, 64), "films": 0}
    found = []
    for on_device in (False, True):
        out = tmp_path / str(on_device)
        how = config(env="playtable", calvin_root="", on_device=on_device, out=str(out), max_steps=80, **asked)
        how = dataclasses.replace(how, checkpoint=str(twin.DIRECTORY), execution=Execution("receding", horizon=5))
        results = chains.load(evaluate.evaluate(how).parent).results
        found.append([(x.index, x.success, x.steps) for x in results])
    assert found[0] == found[1] and len(found[0]) == 6


def test_the_official_protocol_needs_the_sentences():
    with pytest.raises(FileNotFoundError, match=r"new_playtable_validation\.yaml not found"):
        evaluate._trials(config(protocol="official"))


def test_setups_that_differ_have_directories_of_their_own(checkout, tmp_path):
    with pytest.raises(ValueError, match="fresh_process is for env calvin"):
        config(env="playtable", fresh_process=True)
    setups = [{}, {"fresh_process": True}, {"protocol": "official"}, {"held_out": True}, {"scene": "B"}, {"egl": True}]
    setups += [{"weights": "int8"}, {"max_steps": 9}, {"calvin_split": "debug"}, {"env": "playtable"}]
    setups += [{"env": "playtable", "image_size": (64, 32)}, {"env": "playtable", "train_scenes": ("D",)}]
    setups += [{"env": "playtable", "tasks": ("open_drawer",)}, {"execution": Execution("ensemble", decay=0.1)}]
    setups += [{"execution": Execution(retry=Retry(90, seed=seed))} for seed in (1234567, 1234568)]
    trial = Trial(0, {}, ("open_drawer",), ("open it",), {"phrasing": "training"})

    def place(checkpoint="step_3-abc", phrasing="training", **changes):
        asked = config(**changes)
        labelled = dataclasses.replace(trial, labels={"phrasing": phrasing})
        return filing.place(tmp_path, "name", evaluate._conditions(asked, [labelled], checkpoint))

    places = [place(**changes) for changes in setups] + [
        place("step_4-abc"),
        place("step_3-abd"),
        place(phrasing="own"),
    ]
    assert len(set(places)) == len(places)
    # Where things lie, and how many are asked for, makes no other results.
    same = [{}, {"chains": 3}, {"processes": 7}, {"films": 0}, {"calvin_root": "/elsewhere"}, {"out": "x"}]
    assert len({place(**changes) for changes in same}) == 1
    # What was filed before anything could be tried again is found.
    protocol = evaluate._conditions(config(), [trial], "step_3-abc")["protocol"]
    assert protocol["execution"] == {"mode": "chunk", "horizon": 1, "every_frame": False, "decay": 0.01}


def test_main_says_where_the_report_is_even_if_a_library_took_the_root_logger(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", "run"])
    monkeypatch.setattr(evaluation_settings, "of_checkpoint", lambda arguments: evaluation_settings.EvaluateConfig)
    monkeypatch.setattr(evaluate, "evaluate", lambda config: pathlib.Path("out/rollouts.md"))
    evaluate.main()
    assert "report: out/rollouts.md" in capsys.readouterr().err


def test_what_is_not_said_comes_from_the_rollouts_of_the_checkpoints_run(monkeypatch, caplog):
    monkeypatch.setattr(load, "load_config", lambda path: calvin_abcd.PRESETS["playtable_fixtures"])

    def read(*arguments):
        start = evaluation_settings.of_checkpoint(["--checkpoint", "run", *arguments])
        config = cli.read(start, argv=["--checkpoint", "run", *arguments])
        evaluation_settings.say_taken(config, start)
        return config

    caplog.set_level("INFO")
    config = read("--chains", "3", "--execution.horizon", "2")
    assert config.tasks == scripted_presets.FIXTURE_TASKS and config.image_size == (96, 64) and config.max_steps == 160
    assert config.execution == Execution("receding", horizon=2) and config.processes == 40
    assert config.train_scenes == ("A", "B", "C") and config.chains == 3
    assert "image_size 96 64" in caplog.text and "execution" not in caplog.text  # what was typed is no news
    assert read("--latency_ms", "100").execution == Execution()
    assert read("--tasks", "--image_size", "40", "30").tasks == ()
    shown = calvin_abcd.PRESETS["playtable_fixtures"]
    monkeypatch.setattr(load, "load_config", lambda path: dataclasses.replace(shown, rollouts=RolloutConfig()))
    config = read()  # no rollouts: what it learned from is known all the same
    assert config.image_size == (96, 64) and config.tasks == scripted_presets.FIXTURE_TASKS and config.max_steps == 160
    assert (
        read("--env", "simpler").image_size == evaluation_settings.EvaluateConfig("run").image_size
    )  # another robot's


def test_the_real_simulator_is_asked_as_the_runs_own_rollouts_were_and_the_official_protocol_asks_by_itself(
    monkeypatch, caplog
):
    monkeypatch.setattr(load, "load_config", lambda path: calvin_abcd.PRESETS["playtable_fixtures"])
    real = ["--checkpoint", "run", "--env", "calvin", "--calvin_root", "somewhere"]

    def read(*arguments):
        start = evaluation_settings.of_checkpoint([*real, *arguments])
        config = cli.read(start, argv=[*real, *arguments])
        evaluation_settings.say_taken(config, start)
        return config

    caplog.set_level("INFO")
    config = read("--chains", "3")
    assert config.execution == Execution("receding", horizon=5) and config.max_steps == 160 and config.chains == 3
    assert (
        config.tasks == scripted_presets.FIXTURE_TASKS and config.env == "calvin" and config.calvin_root == "somewhere"
    )
    assert "execution receding 5" in caplog.text and "image_size" not in caplog.text
    defaults = evaluation_settings.EvaluateConfig("run")
    assert config.image_size == defaults.image_size and config.processes == defaults.processes
    assert config.train_scenes == ()  # PlayTable's A is not the real A
    assert read("--tasks", "--execution.mode", "first").execution == Execution("first", horizon=5)
    official = read("--protocol", "official")
    assert official.tasks == () and official.max_steps == 360 and official.execution == Execution()


def test_a_report_without_simulator_or_protocol_says_nothing_of_them():
    result = TrialResult(0, ("a",), ("a",), (True,), (3,), {"scene": "D"})
    setup = {"env": "playtable-D", "policy": "p", "execution": "chunk"}
    assert rollout_report._conditions(rollout_report.rows([chains.Evaluation(setup, (result,))])) == []


WIDOWX = PolicyConfig(robot=oxe.ENTRIES["bridge_orig"].robot, cameras=("static",))
GOOGLE = oxe.ENTRIES["fractal20220817_data"].robot
IN_QUANTILES = PolicyConfig(robot=robot.end_effector("OpenVLADataset", "1", "1"), cameras=("static",))


def test_a_policy_of_another_robot_is_refused_by_the_simulator_with_what_differs(monkeypatch, tmp_path):
    arm = tuple(dataclasses.replace(d, unit=d.unit.split()[1]) for d in CALVIN.action[:6])
    metres = dataclasses.replace(CALVIN, name="metres", rate_hz=5.0, action=(*arm, CALVIN.action[6]))
    saved = ExperimentConfig(policy=PolicyConfig(robot=metres))
    monkeypatch.setattr(evaluate.load, "load_batched_policy", None)  # refused before parameters are read
    monkeypatch.setattr(evaluate.load, "load_config", lambda checkpoint: saved)
    monkeypatch.setattr(evaluate.checkpoints, "locate", pathlib.Path)
    monkeypatch.setattr(evaluate.seals, "identity", lambda directory: evaluate.seals.Identity(3, "abc"))
    with pytest.raises(ValueError, match=r"env playtable is driven as another robot .*\n.*30 Hz(.*\n.*){2}'0.02 m'"):
        evaluate.evaluate(config(env="playtable", out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("policy", "statistics", "message"),
    [
        (
            PolicyConfig(),
            "q.json",
            r"another robot \(SimplerEnv's WidowX\).*calvin\):\n(.*\n)*.*rate is 5 Hz, expected 30",
        ),
        (WIDOWX, "q.json", r"with simpler_statistics is driven as another(.*\n)+.*'x': unit is '1', expected 'm'"),
        (IN_QUANTILES, "", r"without simpler_statistics is driven(.*\n)+.*'x': unit is 'm', expected '1'"),
        (dataclasses.replace(WIDOWX, cameras=("secondary",)), "", r"cameras \['secondary'\] are missing"),
        (dataclasses.replace(WIDOWX, robot=GOOGLE), "", "rate is 5 Hz, expected 3 Hz"),
    ],
)
def test_a_policy_of_another_robot_is_refused_by_simplerenv_with_what_differs(policy, statistics, message):
    dataset = "calvin" if policy.robot == CALVIN else "bridge"
    with pytest.raises(ValueError, match=message):
        evaluate._require_robot(config(env="simpler", simpler_statistics=statistics), policy, dataset)


@pytest.mark.parametrize(("policy", "statistics"), [(WIDOWX, ""), (IN_QUANTILES, "q.json")])
def test_simplerenv_takes_metres_as_they_are_and_quantiles_with_their_statistics(policy, statistics):
    evaluate._require_robot(config(env="simpler", simpler_statistics=statistics), policy, "bridge")
    with pytest.raises(ValueError, match="is driven"):  # and not the other way round
        evaluate._require_robot(
            config(env="simpler", simpler_statistics="" if statistics else "q.json"), policy, "bridge"
        )


def test_an_old_checkpoint_that_describes_no_robot_says_by_its_scaling_what_simplerenv_needs(caplog):
    converted, trained = PolicyConfig(), PolicyConfig(action_scaling="quantile")
    for policy, statistics in ((converted, "q.json"), (trained, "")):
        evaluate._require_robot(config(env="simpler", simpler_statistics=statistics), policy, "bridge")
        assert "describes no robot" in caplog.text
    with pytest.raises(ValueError, match="quantiles; pass simpler_statistics"):
        evaluate._require_robot(config(env="simpler"), converted, "bridge")
    with pytest.raises(ValueError, match="metres and radians; leave out simpler_statistics"):
        evaluate._require_robot(config(env="simpler", simpler_statistics="q.json"), trained, "bridge")


def test_late_answers_are_driven_as_asked_and_results_without_them_keep_their_place(monkeypatch, tmp_path):
    handed = {}

    def evaluated(policy, envs, trials, directory, settings, films, play):
        handed.update(policy=policy, settings=settings)
        result = TrialResult(0, trials[0].tasks, trials[0].instructions, (False,), (9,), trials[0].labels)
        return chains.Evaluation({"env": "line", "policy": "p", "execution": "chunk"}, (result,))

    monkeypatch.setattr(evaluate.chains, "evaluate", evaluated)
    policy = types.SimpleNamespace(model=types.SimpleNamespace(config=PolicyConfig()), robot=CALVIN)
    monkeypatch.setattr(evaluate.load, "load_batched_policy", lambda checkpoint, slots, weights: policy)
    monkeypatch.setattr(evaluate.load, "load_config", lambda checkpoint: ExperimentConfig())
    monkeypatch.setattr(evaluate.checkpoints, "locate", pathlib.Path)
    monkeypatch.setattr(evaluate.seals, "identity", lambda directory: evaluate.seals.Identity(3, "abc"))
    monkeypatch.setattr(evaluate.calvin, "calvin_env", lambda root, **kwargs: LineEnv())
    blend = AsyncConfig("blend", ask_below=2)
    late = config(chains=1, latency_ms=100, asynchronous=blend, out=str(tmp_path))
    evaluate.evaluate(late)
    assert isinstance(handed["policy"], AsynchronousBatch) and handed["policy"].robot == CALVIN
    assert handed["policy"]._latency == 3 and handed["policy"]._config == blend  # 30 Hz
    assert "100 ms late, seam blend" in handed["settings"].policy_name
    assert handed["settings"].conditions["protocol"]["asynchronous"]["ask_below"] == 2
    assert "blend-100ms" in evaluate._folder_name(late)
    evaluate.evaluate(config(chains=1, out=str(tmp_path)))
    assert handed["policy"] is policy
    assert not {"latency_ms", "asynchronous"} & set(handed["settings"].conditions["protocol"])
    # Who cannot be moved as asked is refused before the policy is read.
    monkeypatch.setattr(evaluate, "_require_robot", lambda *_: None)
    steps = ExperimentConfig(policy=PolicyConfig(robot=end_effector("nameless", "ticks")))
    monkeypatch.setattr(evaluate.load, "load_config", lambda checkpoint: steps)
    monkeypatch.setattr(evaluate.load, "load_batched_policy", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match="dimension 'x' has unit 'ticks'"):
        evaluate.evaluate(config(chains=1, out=str(tmp_path), execution=Execution(retry=Retry(9))))


def test_late_answers_and_execution_modes_exclude_each_other():
    with pytest.raises(ValueError, match="execution and latency_ms exclude"):
        config(latency_ms=0, execution=Execution("first"))
    with pytest.raises(ValueError, match="asynchronous is read with latency_ms"):
        config(asynchronous=AsyncConfig("switch"))
