"""The mobile base's preset: from a recording to a report."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from experiments import navigation
from robovlms_jax import schema
from robovlms_jax.data import language
from robovlms_jax.driving import instructions, recording, scenarios, world
from robovlms_jax.driving.config import RecordingConfig
from robovlms_jax.runs import driving
from robovlms_jax.runs import setup as setups
from robovlms_jax.runs.config import ExperimentConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("drives")
    recording.record(RecordingConfig(episodes=8, validation_episodes=1), path)
    return path


def test_the_preset_learns_three_velocities_from_korean_and_its_tokenizer_keeps_instructions_apart(root):
    config = dataclasses.replace(
        navigation.SMALL, data=dataclasses.replace(navigation.SMALL.data, root=str(root), prefetch=1)
    )
    assert config.data.paraphrases == ""
    worded = navigation.worded(config)
    assert worded.data.paraphrases == str(root / language.PARAPHRASES)
    setup = setups.prepare(worded.experiment)
    assert setup.config.policy.robot == world.ROBOT and setup.config.policy.action_dim == 3
    assert setup.abstracts[0].trainable["head/arm/layer_2/kernel"].shape[-1] == 3 * setup.config.policy.chunk
    saved = json.loads(json.dumps(schema.to_dict(setup.config)))
    assert schema.from_dict(ExperimentConfig, saved, "") == setup.config

    encode = setup.backbone.encoder(setup.config.data.text_length)
    asked = [x for n in scenarios.SCENARIOS for h in (0, 1) for x in instructions.wordings(n, held_out=bool(h))[::25]]
    ids = [tuple(x[mask]) for x, mask in map(encode, asked)]
    assert all(left != right for left, right in itertools.combinations(ids, 2))
    assert setup.backbone.tokenizer.unk_token_id not in np.concatenate(ids)


@pytest.mark.slow
def test_one_command_records_trains_drives_and_reports(tmp_path):
    arguments = {
        "train.output": tmp_path / "run",
        "data.root": tmp_path / "data",
        "recording.episodes": 8,
        "recording.validation_episodes": 2,
        "train.steps": 3,
        "train.batch_size": 8,
        "drives.trials": 8,
        "drives.rooms": 4,
        "drives.max_steps": 6,
        "drives.films": 1,
    }
    navigation.main([word for flag, value in arguments.items() for word in (f"--{flag}", str(value))])
    report = (tmp_path / "run/report.md").read_text()
    assert report.count("## Drives") == 1 and report.count("| 2box_hori_right |") == 6
    navigation.main([f"--train.output={tmp_path / 'run'}", f"--data.root={tmp_path / 'data'}", "--train.resume"])
    assert (tmp_path / "run/report.md").read_text().count("## Drives") == 1
    assert (tmp_path / "run/report.html").read_text().count("<h2>Drives</h2>") == 1


def test_a_source_that_is_nowhere_is_refused_before_anything_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(driving, "ensure_recorded", lambda *_: pytest.fail("recorded"))
    with pytest.raises(SystemExit, match=r"train\.sources names \['web'\]"):
        navigation.main(["--train.output", str(tmp_path / "run"), "--train.sources", "robot", "1", "web", "1"])
