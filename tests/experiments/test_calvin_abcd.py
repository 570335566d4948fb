"""The main job as a user runs it: trains, resumes bit for bit, stops on SIGTERM, refuses what cannot work."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import calvin_abcd
from robovlms_jax import cli
from robovlms_jax.control.interface import Observation
from robovlms_jax.data import opening
from robovlms_jax.load import load_config, load_policy
from robovlms_jax.runs import measured, run
from robovlms_jax.runs import setup as setups
from robovlms_jax.runs.load import open_model
from robovlms_jax.training import checkpoints, guards

ROOT = pathlib.Path(__file__).resolve().parents[2]

SETTINGS = {
    "policy.window": 4,
    "policy.head.hidden_size": 32,
    "policy.head.trunk": (32,),
    "data.windows_per_segment": 2,
    "train.batch_size": 4,
    "train.steps": 10,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.checkpoint_every": 5,
    "evaluation.batches": 2,
    "evaluation.episodes": 1,
    "optimizer.warmup_steps": 0,
}
SMALL = cli.override(calvin_abcd.PRESETS["sample"], **SETTINGS)
"""Runs of the same sizes and number of steps find each other's compiled programs (tests/conftest.py)."""


def small(output: pathlib.Path, **changes):
    return cli.override(SMALL, **{"train.output": str(output), **changes})


COMPILED: list[tuple[str, str]] = []
"""Thread and program of each that was compiled in `finished`."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A run of ten steps, never interrupted."""

    def notice(event: str, seconds: float, fun_name: str = "", **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            COMPILED.append((threading.current_thread().name, fun_name))

    jax.monitoring.register_event_duration_secs_listener(notice)
    try:
        return run.train("sample", small(tmp_path_factory.mktemp("runs") / "whole", **{"train.profile": 2}))
    finally:
        jax.monitoring.unregister_event_duration_listener(notice)


def params_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    params = open_model(directory)[1]
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def metrics_of(directory: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_a_run_leaves_everything_needed(finished):
    for name in (
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "report.md",
        "report.json",
        "tensorboard",
        "checkpoints/10",
    ):
        assert (finished / name).exists(), name
    record = json.loads((finished / "environment.json").read_text())
    assert record["packages"]["jax"] == jax.__version__
    assert json.loads((finished / "config.json").read_text())["data"]["text_length"] > 0
    report = (finished / "report.md").read_text()
    assert "--data.root" in report and "--backbone.weights" in report
    # The sample's training shifts its pictures: what it sees differs from what is stored, and is no black square.
    pixels = np.asarray(Image.open(finished / "augmented.png").convert("RGB"))
    stored, seen = pixels[32:200, 12:180], pixels[204:372, 12:180]
    assert "augmented.png" in report and seen.std() > 10 and np.any(stored != seen)
    assert sorted(metrics_of(finished)) == list(range(1, 11))


def test_a_run_says_where_its_time_went_and_compiles_once(finished):
    # Fails if a step after the second compiles anything (new shapes, types or shardings), or if phases are lost.
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line} == {"step", *measured.names(load_config(finished))}
    compiled = {line["step"]: line["train/compilations"] for line in lines if "train/loss" in line}
    assert len({compiled[step] for step in range(1, 6)}) == 1, compiled
    (shares,) = [line for line in lines if "goodput/step" in line]
    del shares["step"]
    assert sum(shares.values()) == pytest.approx(1) and len(shares) == 5 and shares["goodput/compile"] > 0
    assert json.loads((finished / "report.json").read_text())["facts"]["time in the training loop"].startswith("step ")


def test_training_evaluation_and_report_find_their_programs_compiled_ahead(finished):
    # Fails if shapes, shardings or functions ahead are others than those of the calls: then all is compiled twice.
    beside = [program for thread, program in COMPILED if thread.startswith("ahead")]
    needed = {"jit(train_step)", "jit(eval_step)", "jit(served_step)"}
    assert needed <= set(beside), COMPILED
    assert not needed & {program for thread, program in COMPILED if not thread.startswith("ahead")}, COMPILED


def test_a_trace_is_left_where_tensorboard_looks(finished):
    # train.profile = 2: the traced steps are the third and the fourth, each with its number.
    (trace,) = (finished / "tensorboard").glob("plugins/profile/*/*.xplane.pb")
    events = [
        (event.name, dict(event.stats))
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    assert sorted(stats["step_num"] for name, stats in events if name == "train") == [3, 4]
    assert any("train_step" in name for name, _ in events)


@pytest.mark.slow
def test_the_second_epoch_compiles_nothing(tmp_path):
    # Two passes over one episode with an evaluation and a checkpoint in each; a batch of another shape or a step that
    # takes the state in another sharding would compile again.
    listed = tmp_path / "one.txt"
    episode = opening.open_split(SMALL.data, "training").episodes[0]
    listed.write_text(f"0 {episode.start} {episode.end}\n")
    changes = {"data.episode_list": str(listed), "train.epochs": 4.0}
    windows = episode.end - episode.start
    epoch = windows // 4
    changes |= {"train.eval_every": epoch, "train.checkpoint_every": epoch}
    output = run.train("sample", small(tmp_path / "run", **changes))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    compiled = {line["step"]: line["train/compilations"] for line in lines if "train/loss" in line}
    # What follows the first evaluation and checkpoint is only seen a step later.
    assert len(compiled) > 3 * epoch and compiled[1] > 0
    assert compiled[max(compiled)] == compiled[epoch + 1], compiled


def test_what_is_learned_does_not_depend_on_sentences_that_are_only_asked(tmp_path, monkeypatch):
    # A tokenizer with merges from validation's wordings gives new words tokens of their own, and all others other ids.
    made = setups.prepare(small(tmp_path / "run"))
    wording = "wax the zebra's xylophone"
    monkeypatch.setattr(setups, "_asked", lambda config: [wording] * 50)
    monkeypatch.setattr(setups.validation, "sentences", lambda split: [f"never {wording}"] * 50)
    asked = setups.prepare(small(tmp_path / "run"))
    assert asked.backbone.assets == made.backbone.assets
    tokens, mask = asked.encode(f"never {wording}")  # there is room for it all the same
    assert len(tokens) > len(made.encode("open the drawer")[0]) and mask.any()


def test_ten_steps_equal_five_and_resume_and_five(finished, tmp_path, monkeypatch, caplog, short_runs):
    # Parameters, optimizer moments, PRNG and data position must all come back, or the loss of step six differs already;
    # so must the tokenizer, although today's sentences would make another.
    output = tmp_path / "halves"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "checkpoints" / "10")
    every = setups.language.every
    monkeypatch.setattr(setups.language, "every", lambda *given: [*every(*given), *["wax the zebra's xylophone"] * 50])
    monkeypatch.setattr(run.build, "init_params", lambda *_: pytest.fail("parameters were made only to be replaced"))
    run.train("sample", small(output, **{"train.resume": True, "train.log_every": 1}))
    assert "the checkpoint's own tokenizer.json go on; today's sentences would make others" in caplog.text
    whole, halves = params_of(finished), params_of(output)
    assert whole.keys() == halves.keys()
    for path, x in whole.items():
        np.testing.assert_array_equal(halves[path], x, err_msg=path)
    assert metrics_of(output) == metrics_of(finished)
    facts = json.loads((output / "report.json").read_text())["facts"]
    assert facts["this start went on after step"] == 5 and "time in the training loop" in facts


def test_a_checkpoint_alone_serves(finished, tmp_path):
    # Copied elsewhere, without the run directory: config, normalisation and tokenizer travel inside.
    alone = tmp_path / "checkpoint"
    shutil.copytree(finished / "checkpoints" / "10", alone)
    rng = np.random.default_rng(0)
    frames = [
        Observation(
            {
                "static": rng.integers(0, 256, (200, 200, 3), np.uint8),
                "wrist": rng.integers(0, 256, (84, 84, 3), np.uint8),
            }
        )
        for _ in range(6)
    ]
    chunks = []
    for directory in (finished, alone):
        policy = load_policy(directory)
        policy.reset("open the drawer")
        chunks.append([policy.act(frame).actions for frame in frames])
        assert policy._batched._step._cache_size() == 1, "recompiled within an episode"
    np.testing.assert_array_equal(chunks[0], chunks[1])
    assert chunks[0][0].shape == (10, 7) and set(np.unique(np.stack(chunks[0])[..., 6])) <= {-1.0, 1.0}
    assert load_config(alone).policy == SMALL.policy
    policy.reset(
        "a sentence much longer than any of the training split, to see that prompts of any length are served as "
        "well, please"
    )
    assert np.isfinite(policy.act(frames[0]).actions).all()


@pytest.mark.slow
def test_one_batch_can_be_overfit(tmp_path):
    # The loss must fall to near nothing on a handful of windows: every part of the chain learns.
    listed = tmp_path / "one.txt"
    listed.write_text("0 0 8\n")
    dataset = opening.open_split(SMALL.data, "training")
    episode = dataset.episodes[0]
    listed.write_text(f"0 {episode.start} {episode.end}\n")
    config = small(
        tmp_path / "overfit",
        **{
            "data.episode_list": str(listed),
            "data.static_shift": 0,
            "data.wrist_shift": 0,
            "train.steps": 120,
            "train.batch_size": 8,
            "optimizer.learning_rate": 1e-3,
            "train.checkpoint_every": 120,
            "train.log_every": 40,
            "evaluation.episodes": 0,
        },
    )
    losses = metrics_of(run.train("sample", config))
    assert losses[120] < 0.5 * losses[1], losses


def test_sigterm_saves_and_a_second_start_without_resume_is_refused(tmp_path, monkeypatch, caplog, short_runs):
    # In this process, with the finished run's programs; a real one, as a scheduler would stop it, is a slow test.
    def stop(batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch

    eventful(monkeypatch, 4, stop)
    monkeypatch.setattr(run.logs, "to_stderr", lambda: None)  # caplog's handler stays
    output = tmp_path / "stopped"
    assert not run.run("sample", small(output, **{"train.profile": 2}))
    assert "stopped by SIGTERM" in caplog.text
    assert 3 <= int(checkpoints.locate(output).name) < 10
    assert not (output / "report.md").exists()
    with pytest.raises(ValueError, match=r"already holds checkpoints.*--train.resume"):
        run.train("sample", small(output))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.root": "/nowhere"}, "nowhere"),
        ({"data.root": ""}, "data.root is empty"),
        ({"backbone.name": "kosmos-3"}, "no backbone 'kosmos-3'"),
        ({"backbone.weights": "/nowhere"}, "no directory /nowhere"),
        ({"train.batch_size": 5}, "no multiple of data.windows_per_segment=2; try 4 or 6"),
        (
            {"train.batch_size": 6, "train.accumulation": 2},
            "does not divide .* try train.batch_size=4 or 8, or train.accumulation=1",
        ),
        ({"mesh.tensor": 3}, "does not make .* set mesh.tensor=1, or one"),
        ({"train.trainable": ("^nothing/",)}, "match no parameter"),
        ({"train.resume": True}, "nothing to resume"),
        ({"policy.window": 500}, "policy.window=500"),
        ({"data.exclude_tasks": ("open_drawr",)}, "did you mean 'open_drawer'"),
        ({"data.text_length": 3}, "data.text_length is 3"),
        ({"train.wandb_project": "x"}, "pip install wandb"),
    ],
)
def test_mistakes_are_named_before_training(tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(run.loop, "fit", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((ValueError, FileNotFoundError, ImportError), match=message.replace("(", r"\(")):
        run.train("sample", small(tmp_path / "run", **changes))


def test_errors_reach_the_user_as_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*nowhere"):
        run.run("sample", small(tmp_path, **{"data.root": "/nowhere"}))


def test_resume_with_another_model_names_the_difference(finished, tmp_path, monkeypatch):
    output = tmp_path / "other"
    shutil.copytree(finished, output)
    monkeypatch.setattr(opening, "open_split", lambda *_: pytest.fail("data were opened before the refusal"))
    with pytest.raises(ValueError, match=r"policy.head.hidden_size: 32 in the checkpoint, 64 now"):
        run.train("sample", small(output, **{"train.resume": True, "train.steps": 20, "policy.head.hidden_size": 64}))
    with pytest.raises(ValueError, match=r"train.seed: 0 in the checkpoint, 1 now"):
        run.train("sample", small(output, **{"train.resume": True, "train.steps": 20, "train.seed": 1}))
    with pytest.raises(ValueError, match=r"train.steps=7 is less than the 10 steps"):
        run.train("sample", small(output, **{"train.resume": True, "train.steps": 7}))


@pytest.fixture
def damaged(tmp_path) -> pathlib.Path:
    """The bundled sample with the images of the first training episode overwritten."""
    root = tmp_path / "damaged"
    shutil.copytree(calvin_abcd.SAMPLE, root)
    shard = next((root / "training").glob("shard_*.bin"))
    with shard.open("r+b") as file:
        file.write(b"\0" * 200_000)
    return root


def test_unreadable_episodes_are_replaced_counted_and_named(damaged, tmp_path, caplog, short_runs):
    output = run.train(
        "sample",
        small(tmp_path / "run", **{"data.root": str(damaged), "data.max_corrupt_share": 0.5}),
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    count = max(line.get("train/corrupt_segments", 0) for line in lines)
    assert 0 < count < 20
    assert "unreadable episode replaced by another" in caplog.text
    assert "episode 0 (" in caplog.text


@pytest.mark.slow
def test_too_many_unreadable_episodes_stop_the_run(damaged, tmp_path):
    changes = {"data.root": str(damaged), "data.max_corrupt_share": 0.0, "train.steps": 200}
    with pytest.raises(guards.CorruptDataError, match=r"more than data.max_corrupt_share=0.0.*episode 0"):
        run.train("sample", small(tmp_path / "run", **changes))


def test_divergence_stops_the_run_and_keeps_the_checkpoint(tmp_path, short_runs):
    changes = {
        "optimizer.learning_rate": 1e30,
        "optimizer.warmup_steps": 6,
        "train.checkpoint_every": 1,
        "optimizer.clip_norm": 0.0,
    }
    output = tmp_path / "run"
    with pytest.raises(guards.DivergedError, match=r"not finite.*optimizer.learning_rate"):
        run.train("sample", small(output, **changes))
    assert checkpoints.locate(output).name in ("1", "2")  # the first update has rate 0, the second does the damage
    (line,) = (output / guards.NONFINITE).read_text().splitlines()
    assert json.loads(line)["step"] == int(checkpoints.locate(output).name) + 1
    assert len(json.loads(line)["episodes"]) == 2 and "loss" in json.loads(line)["values"]


def eventful(monkeypatch, step: int, event) -> None:
    """Runs get, for that step, what `event` makes of its batch."""
    honest = run._batches

    def batches(setup, stage, start):
        with contextlib.closing(honest(setup, stage, start)) as inner:
            for number, batch in enumerate(inner, start + 1):
                yield event(batch) if number == step else batch

    monkeypatch.setattr(run, "_batches", batches)
    monkeypatch.setattr(run, "_loader_rate", lambda setup, stage, start: (setup, 1.0))


@pytest.mark.slow
def test_a_skipped_batch_is_skipped_once_across_a_resume(tmp_path, monkeypatch):
    # Batch 3 of 6 is bad. Fails if it is drawn again after a resume, or if its count is forgotten.
    def spoilt(batch):
        return {"robot": batch["robot"].replace(actions=np.full_like(batch["robot"].actions, np.nan))}

    eventful(monkeypatch, 3, spoilt)
    skip = {"train.on_nonfinite": "skip", "train.checkpoint_every": 4}
    whole = run.train("sample", small(tmp_path / "whole", **skip, **{"train.steps": 6}))
    output = tmp_path / "halves"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoints" / "6")
    run.train("sample", small(output, **skip, **{"train.steps": 6, "train.resume": True}))
    for path, x in params_of(whole).items():
        np.testing.assert_array_equal(params_of(output)[path], x, err_msg=path)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [x["train/skipped_steps"] for x in lines if "train/loss" in x] == [0, 0, 1, 1, 1, 1]
    assert len((output / guards.NONFINITE).read_text().splitlines()) == 1
    # The same run with a limit of none ends there instead, with the state of step 2 or, skipped, step 3.
    with pytest.raises(guards.DivergedError, match=r"more than train.max_skipped=0"):
        run.train("sample", small(tmp_path / "strict", **skip, **{"train.max_skipped": 0}))
    with pytest.raises(guards.DivergedError, match=r"step 3: .*after step 2, the last good one, is saved"):
        run.train("sample", small(tmp_path / "abort"))
    assert checkpoints.locate(tmp_path / "abort").name == "2"


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a directory"):
        load_policy(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="an empty directory"):
        load_policy(tmp_path)
