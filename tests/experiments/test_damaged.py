"""A run whose newest checkpoint is damaged: what acts, or is passed on, is never another policy than was asked for."""

from __future__ import annotations

import os

import pytest

from experiments import bundle, evaluate, evaluation_settings, export, export_backbone, serve
from robovlms_jax.deploy.config import ServerConfig
from robovlms_jax.playtable.real import recording as real_recording
from robovlms_jax.runs import correcting, model_card, sharing
from robovlms_jax.training import checkpoints, seals


@pytest.fixture
def run(tmp_path):
    for number in (1, 3):
        step = tmp_path / "run" / "checkpoints" / str(number)
        (step / "params").mkdir(parents=True)
        (step / "params" / "values").write_bytes(b"numbers")
        seals.seal(step)
    os.truncate(step / "params" / "values", 4)
    return str(tmp_path / "run")


PROGRAMS = {
    "serve": lambda run, out: serve.build(serve.ServeConfig(checkpoint=run, server=ServerConfig(port=0))),
    "evaluate": lambda run, out: evaluate.evaluate(evaluation_settings.EvaluateConfig(checkpoint=run, out=out)),
    "record_calvin": lambda run, out: correcting.record_real(
        real_recording.RealRecordConfig(calvin_root=out, checkpoint=run, out=out)
    ),
    "bundle": lambda run, out: bundle.bundle(bundle.BundleConfig(checkpoint=run, out=out)),
    "export": lambda run, out: export.export(export.ExportConfig(checkpoint=run, out=out)),
    "export_backbone": lambda run, out: export_backbone.main(
        export_backbone.ExportBackboneConfig(checkpoint=run, out=out)
    ),
    "push": lambda run, out: sharing.prepare(run, "me/policy", model_card.Words(licence="mit")),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_damaged_newest_checkpoint_is_refused_and_the_older_one_named(run, tmp_path, name):
    with pytest.raises(ValueError, match=r"params/values has 4 bytes of 7\. .*checkpoints/1 is whole, and another"):
        PROGRAMS[name](run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_older_one_is_taken_where_it_is_named(run):
    assert checkpoints.locate(f"{run}/checkpoints/1", strict=True).name == "1"
    assert checkpoints.locate(run).name == "1"  # for going on with training, the log says so
