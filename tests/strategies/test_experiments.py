"""The three protocols as a user runs them, as small as they get; and what they refuse before anything runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib

import pytest

from experiments import (
    adapt,
    bridge,
    calvin_abcd,
    compare_policies,
    continual,
    evaluate,
    few_shot,
    protocols,
    reinforce,
    search,
)
from robovlms_jax import cli
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.load import load_config
from robovlms_jax.runs import chaining, closed_loop, load
from robovlms_jax.search import queue
from robovlms_jax.strategies import lifelong, protocol
from robovlms_jax.training import checkpoints

TINY = (
    *("policy.window=4", "policy.head.hidden_size=32", "policy.head.trunk=32", "data.windows_per_segment=2"),
    *("train.batch_size=4", "train.log_every=1", "train.eval_every=0", "evaluation.batches=1", "evaluation.episodes=0"),
)
SAMPLE = {"start": "sample", "fixed": TINY}


def test_what_judges_a_run_is_there_before_the_first_begins(tmp_path, monkeypatch):
    def work(config):
        begun.append(config)
        return tmp_path

    begun, missing = [], "experiments.not_installed"
    monkeypatch.setattr(protocols.cli, "parse", lambda *arguments, **more: ("ten", "config"))
    monkeypatch.setattr(protocols, "JUDGES", (*protocols.JUDGES, missing))
    with pytest.raises(ModuleNotFoundError, match=missing):
        protocols.main(work, {}, "ten", "")
    assert not begun and "experiments.evaluate" in protocols.JUDGES


def test_every_trial_of_few_shot_begins_as_it_should(tmp_path, monkeypatch):
    based(monkeypatch)
    task = "turn_on_led"
    config = few_shot.FewShotConfig(**SAMPLE, out=str(tmp_path), tasks=(task,), demonstrations=(1,), draws=2, rank=4)
    jobs = few_shot.jobs(dataclasses.replace(config, base=str(tmp_path), methods=("scratch",), statistics="own"))
    made = [job.config(None) for job in jobs]
    assert [(x.train.seed, x.train.init_from, x.train.steps) for x in made] == [(0, "", 300), (1, "", 300)]
    drawn = [json.loads(pathlib.Path(x.data.episode_list).read_text()) for x in made]
    assert [list(x) for x in drawn] == [[task], [task]] and all(len(x[task]) == 1 for x in drawn)
    first, *others = few_shot.jobs(config)
    assert not first.compared and first.config(None).data.exclude_tasks == (task,)
    assert len(others) == 6 and all(job.after == 0 for job in others)


def test_a_list_such_as_upstreams_ten_per_task_is_what_is_drawn_from(tmp_path):
    task, every = "turn_on_led", protocols.demonstrations(protocols.preset("calvin_abcd", "sample", TINY, "few_shot"))
    chosen, path = every[task][-1:], tmp_path / "ten.json"
    path.write_text(json.dumps({task: chosen}))
    settings = {"tasks": (task,), "demonstrations": (1,), "draws": 2, "support": str(path), "methods": ("scratch",)}
    config = few_shot.FewShotConfig(**SAMPLE, **settings, out=str(tmp_path))
    assert len(every[task]) > 1
    for job in few_shot.jobs(config)[1:]:
        drawn = json.loads(pathlib.Path(job.config(None).data.episode_list).read_text())
        assert drawn == {task: [list(chosen[0])]}
    with pytest.raises(ValueError, match="2 demonstrations of 'turn_on_led' are asked for, and there are 1"):
        few_shot.jobs(dataclasses.replace(config, demonstrations=(2,)))
    path.write_text(json.dumps({task: [[1, 100_000]]}))
    with pytest.raises(ValueError, match="names an episode that no annotation matches"):
        few_shot.jobs(config)
    path.write_text(json.dumps({task: [1, 2]}))
    with pytest.raises(ValueError, match="neither JSON"):
        few_shot.jobs(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: few_shot.FewShotConfig(tasks=()), "no task is left to train one"),
        (lambda: few_shot.FewShotConfig(demonstrations=(-1,)), "0 .all. or more"),
        (lambda: few_shot.jobs(few_shot.FewShotConfig(start="sampel")), "few_shot.start='sampel' .* mean 'sample'"),
        (lambda: few_shot.jobs(few_shot.FewShotConfig(**SAMPLE, tasks=("turn_on_lef",))), "did you mean"),
        (lambda: continual.ContinualConfig(groups=("a",)), "forgetting needs two"),
        (lambda: continual.ContinualConfig(groups=("a+b", "b")), r"has \['b'\] more than once"),
        (lambda: continual.ContinualConfig(steps=100, looks=3), "steps=100 is no multiple of continual.looks=3"),
        (lambda: continual.jobs(continual.ContinualConfig(**SAMPLE)), "'sample' has no rollouts"),
        (
            lambda: few_shot.FewShotConfig(demonstrations=(2, 10, 2)),
            r"demonstrations has \[2\] more than once",
        ),
        (lambda: few_shot.FewShotConfig(tasks=("a", "a")), r"few_shot\.tasks has \['a'\] more than once"),
        (lambda: continual.ContinualConfig(methods=("ewc", "ewc")), r"continual\.methods has \['ewc'\] more than once"),
        (lambda: adapt.AdaptConfig(ways=("source", "source")), r"adapt\.ways has \['source'\] more than once"),
        (lambda: adapt.AdaptConfig(ways=("tuned",)), "`tuned` begins with `source`"),
        (lambda: adapt.jobs(adapt.AdaptConfig(**SAMPLE)), "records no demonstrations; name the target's"),
    ],
)
def test_what_a_protocol_cannot_do_is_said_before_anything_runs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: few_shot.jobs(few_shot.FewShotConfig(tasks=("open_drawr",))), "'open_drawr'.* mean 'open_drawer'"),
        (lambda: continual.jobs(continual.ContinualConfig(groups=("open_drawr", "turn_on_led"))), "mean 'open_drawer'"),
        (lambda: adapt.jobs(adapt.AdaptConfig(fixed=("train.sources=robot 1 web 1",))), r"sources names \['web'\]"),
    ],
)
def test_what_needs_no_demonstrations_is_said_before_they_are_recorded(monkeypatch, make, message):
    monkeypatch.setattr(closed_loop, "ensure_demonstrations", lambda *_: pytest.fail("recorded"))
    with pytest.raises(ValueError, match=message):
        make()


def test_the_ways_to_another_domain_are_what_they_are_called(tmp_path):
    config = adapt.AdaptConfig(
        **SAMPLE, out=str(tmp_path), target=calvin_abcd.SAMPLE.as_posix(), recorded=False, seeds=1, demonstrations=1
    )
    jobs = {job.setting["way"]: job for job in adapt.jobs(config)}
    made = {way: job.config(None) for way, job in jobs.items() if job.after is None}
    assert jobs["tuned"].after == 0 and next(iter(jobs)) == "source"
    assert made["source"].train.sources == {} and made["augmented"].data.augment == adapt.STRONG
    assert made["aligned"].data.further.unlabelled == ("target",) and not made["aligned"].data.further.lists
    assert made["mixed"].data.further.lists and not made["mixed"].data.further.align


def test_a_report_says_how_far_apart_domains_are_for_each_way(tmp_path):
    trials = [queue.Trial(n, {"way": "source" if n < 2 else "mixed"}, n, "done", 0.5) for n in range(4)]
    for trial in trials[:3]:  # the last one was judged before this was measured
        queue.write(tmp_path, trial)
        apart = {"means": 0.1 * (1 + trial.number), "covariances": 0.5, "means_within": 0.01}
        (queue.folder(tmp_path, trial.number) / "result.json").write_text(json.dumps({"value": 0.5, "apart": apart}))
    queue.write(tmp_path, trials[3])
    (queue.folder(tmp_path, 3) / "result.json").write_text('{"value": 0.5}')
    _, table, _ = adapt._distances(tmp_path, trials)
    assert "| source | 0.150 ± 0.635 | 0.500 ± 0.000 | 0.010 ± 0.000 |" in table
    assert "| mixed | 0.300 | 0.500 | 0.010 |" in table


def test_a_target_without_a_camera_of_the_policy_is_refused_before_the_first_run():
    start = protocols.preset("calvin_abcd", "sample", TINY, "adapt")
    with pytest.raises(ValueError, match=r"has no camera \['wrist'\], only \['static'\]"):
        adapt._require_cameras(start, dataclasses.replace(start, data=bridge.OWN_SAMPLE))


def test_a_sequence_of_tasks_is_put_together_from_its_runs(tmp_path, monkeypatch):
    config = continual.ContinualConfig(
        groups=("open_drawer", "turn_on_led", "turn_off_led"), methods=("sequential", "adapters"), seeds=1
    )
    monkeypatch.setattr(
        continual.protocols, "demonstrations", lambda start, tasks: {task: [(0, 9)] for task in config.tasks}
    )
    jobs = continual.jobs(dataclasses.replace(config, out=str(tmp_path)))
    assert [(job.setting["method"], job.after) for job in jobs] == [
        *(("first", None), ("sequential", 0), ("sequential", 1), ("adapters", 0), ("adapters", 0)),
    ]
    rows = [[0.8, 0.1, 0.0], [0.5, 0.6, 0.2], [0.3, 0.4, 0.9], [0.0, 0.7, 0.0], [0.0, 0.0, 1.0]]
    results = [{"row": row, "curve": [0.5, 0.7]} for row in rows]
    monkeypatch.setattr(continual.protocol, "result", lambda out, number: json.loads(json.dumps(results[number])))
    trials = [queue.Trial(number, dict(job.setting), 0, "done", 0.0) for number, job in enumerate(jobs)]
    found = continual.sequences(config, trials)
    curves, matrix = found["sequential", 0]
    assert [curve[0] for curve in curves] == [0.0, 0.1, 0.2]
    assert lifelong.measures(curves, matrix).backward == pytest.approx(((0.3 + 0.5) / 2 + 0.2) / 2)
    curves, matrix = found["adapters", 0]
    assert [curve[0] for curve in curves] == [0.0, 0.1, 0.0] and matrix[2] == [0.8, 0.7, 1.0]
    assert lifelong.measures(curves, matrix).backward == pytest.approx(0)
    path = continual.write_report(dataclasses.replace(config, out=str(tmp_path)), trials)
    assert "| adapters | 1 |" in path.read_text() and (tmp_path / "continual.png").exists()


def test_every_group_is_asked_as_often_and_as_its_tasks_were_in_training(tmp_path, monkeypatch):
    config = continual.ContinualConfig(groups=("open_drawer+close_drawer", "turn_on_led"))
    start, asked = calvin_abcd.FIXTURES, []
    monkeypatch.setattr(evaluate, "evaluate", lambda settings: asked.append(settings) or tmp_path / "x.md")
    rates = {"open_drawer": 0.5, "close_drawer": 1.0, "turn_on_led": 0.25}
    monkeypatch.setattr(continual.protocol, "success", lambda directory: {"tasks": rates})
    step = continual._Step(config, start, {}, "sequential", 0, 0)
    assert step._asked(tmp_path / "run") == [0.75, 0.25]
    assert asked[0].tasks == tuple(rates) and asked[0].chains == 2 * start.rollouts.trials
    assert asked[0].execution == start.rollouts.execution and asked[0].max_steps == start.rollouts.max_steps


def based(monkeypatch, **changes):
    """Every run is said to be the sample's preset with these changes."""
    run = cli.override(protocols.preset("calvin_abcd", "sample", TINY, "x"), **changes)
    monkeypatch.setattr(load, "load_config", lambda path: run)
    return run


def test_what_gives_a_bases_parameters_a_meaning_comes_from_its_run(tmp_path, monkeypatch):
    changes = {"policy.cameras": ("static",), "policy.window": 2, "policy.action_scaling": "quantile"}
    changes |= {"policy.action_low": (-0.5,) * 6, "backbone.attention": "prefix", "backbone.lora_rank": 4}
    base = based(monkeypatch, **changes)
    config = few_shot.FewShotConfig(
        **(SAMPLE | {"fixed": tuple(x for x in TINY if not x.startswith("policy."))}),
        out=str(tmp_path),
        base=str(tmp_path),
        tasks=("turn_on_led",),
        demonstrations=(1,),
        draws=1,
        rank=4,
        methods=("full", "lora", "scratch"),
    )
    full, lora, scratch = (job.config(None) for job in few_shot.jobs(config))
    for made in (full, lora, scratch):
        assert (made.policy.cameras, made.policy.window) == (("static",), 2)
        assert (made.backbone.attention, made.backbone.lora_rank) == ("prefix", 4)
    assert full.policy == dataclasses.replace(base.policy, action_scaling="bounds")  # not taken from one demonstration
    assert (lora.backbone.lora_alpha, scratch.train.init_from) == (base.backbone.lora_alpha, "")
    (own,) = few_shot.jobs(dataclasses.replace(config, statistics="own", methods=("full",)))
    own, preset = own.config(None).policy, calvin_abcd.PRESETS["sample"].policy
    assert (own.cameras, own.action_scaling, own.action_low) == (("static",), preset.action_scaling, preset.action_low)
    with pytest.raises(ValueError, match=r"rank=8: few_shot.base=.* has adapters of rank 4.* Pass --rank 4"):
        few_shot.jobs(dataclasses.replace(config, rank=8))
    with pytest.raises(
        ValueError, match=r"fixed sets policy.window=4 \(there 2\), and the parameters of few_shot.base"
    ):
        few_shot.jobs(dataclasses.replace(config, fixed=TINY))


def test_a_base_of_another_robot_brings_neither_its_scales_nor_its_cameras(tmp_path, monkeypatch, caplog):
    spec = dataclasses.replace(CALVIN, name="other", rate_hz=5.0)
    spec = dataclasses.replace(spec, action=tuple(dataclasses.replace(x, unit="") for x in spec.action))
    changes = {
        "policy.robot": spec,
        "policy.cameras": ("static",),
        "policy.action_low": (-0.5,) * 6,
        "policy.window": 2,
    }
    based(monkeypatch, **changes)
    fixed = tuple(x for x in TINY if not x.startswith("policy.window"))
    config = few_shot.FewShotConfig(
        **(SAMPLE | {"fixed": fixed}), out=str(tmp_path), base="runs/x", tasks=("turn_on_led",), demonstrations=(1,)
    )
    made, preset = few_shot.jobs(config)[0].config(None), calvin_abcd.PRESETS["sample"].policy
    assert (made.policy.robot, made.policy.cameras) == (CALVIN, preset.cameras)
    assert (made.policy.action_low, made.policy.window) == (preset.action_low, 2)
    assert "runs/x is another robot's" in caplog.text and "expected 5 Hz" in caplog.text


@pytest.mark.parametrize("program", [few_shot, continual])
def test_a_base_that_learned_from_pictures_of_another_size_is_refused_unless_one_is_chosen(program, monkeypatch):
    sizes = {"rollouts.image_size": (112, 84), "demonstrations.image_size": (112, 84)}
    based(monkeypatch, **sizes, **{"rollouts.trials": 8, "demonstrations.episodes": 8})
    monkeypatch.setattr(
        protocols, "demonstrations", lambda start, tasks: {"turn_on_led": [(0, 9)], "open_drawer": [(0, 9)]}
    )
    config = program.PRESETS["quick"]
    tasks = {"tasks": ("turn_on_led",), "demonstrations": (1,)} if program is few_shot else {}
    config = dataclasses.replace(config, base="runs/x", **tasks)
    with pytest.raises(ValueError, match=r"base=runs/x learned from .* 112 and 84 px .* asks 96 and 64 px"):
        program.jobs(config)
    chosen = ("rollouts.image_size=112 84", "demonstrations.image_size=112 84")
    monkeypatch.setattr(few_shot.support, "write", lambda path, support: str(path))
    assert program.jobs(dataclasses.replace(config, fixed=(*config.fixed, *chosen)))


def test_a_run_says_what_it_does_otherwise_than_the_one_it_begins_with(monkeypatch, caplog):
    run = based(monkeypatch, **{"backbone.lora_rank": 4, "policy.cameras": ("static",)})
    chaining.say_differences(cli.override(run, **{"train.batch_size": 8}), "runs/x")
    assert not caplog.text
    chaining.say_differences(cli.override(run, **{"backbone.lora_rank": 0, "policy.cameras": ("wrist",)}), "runs/x")
    assert "policy.cameras: there ('static',), here ('wrist',)" in caplog.text
    assert "backbone.lora_rank: there 4, here 0\n  What its adapters learned is lost" in caplog.text
    assert "no effect" not in caplog.text


@pytest.mark.parametrize(("field", "value"), [("name", "kosmos-2-mini"), ("weights", "there"), ("adapter", "there")])
def test_a_backbone_that_is_asked_for_beside_a_run_to_begin_with_is_said_to_have_no_effect(
    monkeypatch, caplog, field, value
):
    run = based(monkeypatch, **{"backbone.lora_rank": 4})
    changed = cli.override(run, **{f"backbone.{field}": value})
    chaining.say_differences(changed, "runs/x")
    said = f"brings its backbone, kosmos-2-twin, which is trained here; backbone.{field}={value} has no effect"
    assert said in caplog.text
    caplog.clear()
    monkeypatch.setattr(chaining.load, "load_config", lambda path: changed)
    chaining.say_differences(changed, "runs/x")
    assert not caplog.text


def test_a_search_and_a_protocol_name_a_wrong_preset_alike():
    with pytest.raises(ValueError, match=r"search\.start='sampel' is no preset of calvin_abcd; did you mean 'sample'"):
        search.main(["--start", "sampel", "--space", "train.seed=1,2"])
    with pytest.raises(ValueError, match=r"few_shot\.experiment='calvin_abdc' .*; did you mean 'calvin_abcd'"):
        few_shot.jobs(few_shot.FewShotConfig(experiment="calvin_abdc"))
    with pytest.raises(
        ValueError, match=r"adapt\.start='playtable_fixtures' is no preset of bridge\. Choose with --start: "
    ):
        adapt.jobs(adapt.AdaptConfig(experiment="bridge"))


@pytest.mark.parametrize("program", [few_shot, continual, adapt, search, compare_policies])
def test_programs_of_many_runs_begin_with_a_preset_that_there_is(program):
    for config in program.PRESETS.values():
        assert config.start in importlib.import_module(f"experiments.{config.experiment}").PRESETS


@pytest.mark.parametrize("program", [few_shot, continual, adapt, search, reinforce, compare_policies])
def test_a_misspelt_preset_flag_is_answered_with_the_flag(program, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(program.PRESETS, next(iter(program.PRESETS)), description="x", argv=["--presett", "quick"])
    assert end.value.code == 2
    assert "--presett is no flag of this program; did you mean --preset?" in capsys.readouterr().err


def test_a_protocol_ends_with_the_words_of_what_stopped_it(monkeypatch):
    def work(config):
        raise checkpoints.UnwrittenError("the checkpoint of step 3 could not be written")

    monkeypatch.setattr("sys.argv", ["few_shot"])
    monkeypatch.setattr(protocols.logs, "to_stderr", lambda **_: None)
    with pytest.raises(SystemExit, match="the checkpoint of step 3 could not be written"):
        protocols.main(work, few_shot.PRESETS, "quick", "x")


@pytest.mark.parametrize("program", [few_shot, continual, adapt, compare_policies])
def test_a_report_needs_no_demonstrations_and_refuses_a_directory_without_trials(program, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(protocols, "demonstrations", never)
    config = dataclasses.replace(next(iter(program.PRESETS.values())), out=str(tmp_path / "wrong"), report=True)
    with pytest.raises(ValueError, match=r"wrong has no trials to report of\. .* with --out"):
        program.work(config)
    assert not (tmp_path / "wrong").exists()
    kinds = {few_shot: {"method": "full", "demonstrations": "2"}, adapt: {"way": "source"}}
    kinds |= {continual: {"method": "first", "group": "a"}, compare_policies: {"variant": "other"}}
    folder = queue.folder(tmp_path / "wrong", 0)
    folder.mkdir(parents=True)
    trial = queue.Trial(0, kinds[program], 0, "failed", reason="it broke")
    (folder / "trial.json").write_text(json.dumps(dataclasses.asdict(trial)))
    assert "Trials: " in program.work(config).read_text()


def test_a_searchs_report_of_a_directory_without_trials_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"wrong has no trials to report of"):
        search.main(["--start", "sample", "--space", "train.steps=1,2", "--report", "--out", str(tmp_path / "wrong")])
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_few_demonstrations_end_to_end(tmp_path):
    config = few_shot.FewShotConfig(
        **SAMPLE,
        out=str(tmp_path),
        tasks=("turn_on_led",),
        demonstrations=(1,),
        methods=("full", "lora", "head", "scratch"),
        draws=1,
        base_steps=2,
        steps=2,
        rank=4,
    )
    text = few_shot.work(config).read_text()
    assert "Trials: 4 done" in text and (tmp_path / "few_shot.png").exists()
    base, lora = (load_config(protocol.run_of(tmp_path, number)) for number in (0, 2))
    assert lora.backbone.lora_rank == 4 and lora.policy.proprio == base.policy.proprio
    assert few_shot.work(config).read_text() == text  # nothing is run again
