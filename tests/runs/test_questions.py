"""Questions about pictures in whole runs: shares, stages, what is refused before anything is compiled."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import cotrain
from robovlms_jax.backbones import registry
from robovlms_jax.data import sources
from robovlms_jax.runs import closed_loop, load, measured, questions, run, steps
from robovlms_jax.runs import setup as setups
from robovlms_jax.training.config import OptimizerConfig, StageConfig
from tests.experiments.test_calvin_abcd import params_of, small

ASKING = {
    "data.vl.paths": {"questions": str(cotrain.QUESTIONS / "train.jsonl")},
    "data.vl.validation": {"questions": str(cotrain.QUESTIONS / "validation.jsonl")},
    "data.vl.turns": "each",
    "policy.auxiliary.vl_weight": 0.1,
    "evaluation.batches": 1,
    "evaluation.episodes": 0,
    "train.profile": 0,
}
RATE = OptimizerConfig(learning_rate=1e-3)
STAGES = (
    StageConfig(steps=2, name="vl", trainable=("^backbone/",), optimizer=RATE, sources={"questions": 1.0}),
    StageConfig(steps=2, name="together", optimizer=RATE, sources={"robot": 1.0, "questions": 1.0}),
    StageConfig(steps=1, name="robot", optimizer=RATE),
)


def asking(output, **changes):
    return small(output, **(ASKING | changes))


def assert_same(first, second):
    expected = params_of(second)
    for path, x in params_of(first).items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


def test_conversations_longer_than_the_learned_positions_are_refused():
    vlm = registry.get("blip2-opt-2.7b")
    questions.require_positions("web", vlm.text.max_positions, vlm)
    with pytest.raises(ValueError, match=r"source 'web' has .* learned \d+ positions. Set data.vl.length"):
        questions.require_positions("web", vlm.text.max_positions + 1, vlm)


def test_a_share_of_nothing_is_the_plain_run(tmp_path):
    # The same batches, and the same program to the last operation.
    length = {"data.text_length": 32}  # the tokenizer is made from more sentences, so prompts may have other lengths
    plain = setups.prepare(small(tmp_path / "a", **length))
    none = {"train.sources": {"robot": 1.0, "questions": 0.0}}
    without = setups.prepare(asking(tmp_path / "b", **none, **length))
    programs = []
    for setup in (plain, without):
        (stage,), (abstract,) = setup.stages, setup.abstracts
        rows = setup.rows(stage)
        assert rows == {"robot": 2}
        assert dataclasses.replace(stage, sources={}) == dataclasses.replace(plain.stages[0], sources={})
        batch = setup.train.evaluation_batch(np.array([0, 1]))
        loss = steps.make_loss(setup.config, setup.model, stage)
        programs.append(str(jax.make_jaxpr(loss)(abstract.params, {"robot": batch}, jax.random.key(0))))
        order = sources.fingerprints(setup.sources, rows, stage.seed)
        assert order == sources.fingerprints(plain.sources, rows, stage.seed)
    assert programs[0] == programs[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("stages") / "whole"
    changes = {"train.stages": STAGES, "train.checkpoint_every": 1, "train.keep_checkpoints": 9}
    return run.train("sample", asking(output, **changes))


@pytest.mark.slow
def test_losses_of_sources_are_told_apart_and_held_out_questions_are_asked(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines if "train/loss" in line}
    assert "train/token_accuracy" in logged[1] and "train/loss_arm" not in logged[1]
    assert {"train/loss_robot", "train/loss_questions", "train/loss_arm"} <= set(logged[3])
    total = logged[3]["train/loss_robot"] + 0.1 * logged[3]["train/loss_questions"]
    assert logged[3]["train/loss"] == pytest.approx(total, rel=1e-4)
    assert "train/loss_questions" not in logged[5]
    (found,) = [line for line in lines if "validation/accuracy_questions" in line]
    assert 0 <= found["validation/accuracy_questions"] <= 1 and found["validation/loss_questions"] > 0
    known = measured.names(load.load_config(uninterrupted))
    assert {name for line in lines for name in line} == {"step", *known}
    facts = json.loads((uninterrupted / "report.json").read_text())["facts"]
    assert facts["accuracy of questions"] == pytest.approx(found["validation/accuracy_questions"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3], ids=["in the questions", "between stages", "in both together"])
def test_a_run_stopped_among_questions_goes_on_bit_for_bit(uninterrupted, tmp_path, step):
    output = tmp_path / "resumed"
    shutil.copytree(uninterrupted, output)
    for later in range(step + 1, 6):
        shutil.rmtree(output / "checkpoints" / str(later))
    changes = {"train.stages": STAGES, "train.checkpoint_every": 9, "train.resume": True}
    run.train("sample", asking(output, **changes))
    assert_same(output, uninterrupted)


@pytest.mark.slow
def test_every_stages_checkpoint_is_a_policy_of_its_own(uninterrupted):
    for step in (2, 4, 5):
        assert params_of(uninterrupted / "checkpoints" / str(step))


HEAD = StageConfig(steps=1, name="late", trainable=("^head/",), sources={"questions": 1.0})
BAD = {
    "a source that is nowhere": (
        {"train.sources": {"robot": 1.0, "web": 0.5}},
        r"train\.sources names \['web'\].*\['questions', 'robot'\]",
    ),
    "answers that nothing can learn": (
        {"train.stages": (*STAGES[:1], HEAD)},
        r"stage 'late': answers of \['questions'\].*\^head/",
    ),
    "a weight of nothing": ({"policy.auxiliary.vl_weight": 0.0}, r"policy\.auxiliary\.vl_weight=0 learns no answers"),
    "a weight without questions": ({"data.vl.paths": {}, "data.vl.validation": {}}, r"data\.vl\.paths names none"),
    "an insulated backbone without a teacher": (
        {"policy.insulate": True},
        r"stage 'train': with policy\.insulate actions teach the backbone nothing",
    ),
    "answers beyond the context": ({"data.vl.length": 20}, r"have more than data\.vl\.length=20 tokens"),
    "an unknown task": (
        {"train.stages": (StageConfig(steps=1, weights={"vll": 1.0}),)},
        r"weights of \['vll'\], which this policy does not learn",
    ),
    "an unknown task among questions alone": (
        {"train.stages": (StageConfig(steps=1, weights={"actoins": 1.0}, sources={"questions": 1.0}),)},
        r"stage '1': weights of \['actoins'\], which this policy does not learn",
    ),
    "answers without a weight": (
        {"train.stages": (StageConfig(steps=1, name="look", weights={"vl": 0.0}, sources={"questions": 1.0}),)},
        r"stage 'look': 'vl' has weight 0, so that the answers of \['questions'\] would teach nothing",
    ),
    "more sources than rows": (
        {"train.sources": {"robot": 1.0, "questions": 1.0}, "train.batch_size": 2},
        "cannot be shared among",
    ),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.sources": {"robot": 3.0, "question": 1.0}}, r"train\.sources names \['question'\]"),
        ({"train.source_weights": {"question": 2.0}}, r"train\.source_weights names \['question'\]"),
        (
            {"data.vl.validation": {}, "data.vl.paths": {"questions": "nowhere.json"}},
            "'questions': no file nowhere.json",
        ),
        ({"train.batch_size": 63, "data.windows_per_segment": 4}, "no multiple of data.windows_per_segment=4; try 60"),
    ],
)
def test_what_is_wrong_without_data_is_said_before_demonstrations_are_recorded(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(closed_loop, "ensure_demonstrations", lambda *_: pytest.fail("recorded"))
    quiet = {"train.output": str(tmp_path / "run"), "train.compilation_cache": ""}
    with pytest.raises((ValueError, OSError), match=message):
        run.train("together", cotrain.preset("together", **quiet, **changes))


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_named_before_anything_is_compiled(tmp_path, case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        setups.prepare(asking(tmp_path, **changes))
