"""The RLDS experiments on the bundled episodes: a mixture trains and reports, and another run starts from it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import bridge, google_robot, oxe_pretrain
from robovlms_jax import cli
from robovlms_jax.data import opening
from robovlms_jax.data.config import DataConfig
from robovlms_jax.load import load_config, load_policy
from robovlms_jax.runs import build, chaining, run
from robovlms_jax.runs import setup as setups
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.runs.load import open_model
from tests import toy
from tests.conftest import shorten_runs
from tests.data import toy_rlds

TINY = {
    "policy.head.hidden_size": 16,
    "policy.head.trunk": (16,),
    "data.windows_per_segment": 2,
    "train.batch_size": 4,
    "train.steps": 2,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.checkpoint_every": 2,
    "evaluation.batches": 1,
    "evaluation.episodes": 0,
    "optimizer.warmup_steps": 0,
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> pathlib.Path:
    """The bundled episodes, copied so that their index stays out of the repository."""
    root = tmp_path_factory.mktemp("data") / "sample"
    return shutil.copytree(bridge.SAMPLE, root, ignore=shutil.ignore_patterns(".frame_index"))


def tiny(config: ExperimentConfig, sample: pathlib.Path, output: pathlib.Path, **changes) -> ExperimentConfig:
    moved = config.data.dataset.replace(str(bridge.SAMPLE), str(sample))
    return cli.override(
        config,
        **TINY,
        **{"data.root": str(sample), "data.dataset": moved, "data.index_workers": 1, "train.output": str(output)},
        **changes,
    )


@pytest.fixture(scope="module")
def pretrained(sample, tmp_path_factory) -> pathlib.Path:
    config = tiny(oxe_pretrain.PRESETS["sample"], sample, tmp_path_factory.mktemp("runs") / "oxe")
    with pytest.MonkeyPatch.context() as patch:
        shorten_runs(patch, evaluated=True)
        return run.train("sample", config, title="Open X-Embodiment", closing=oxe_pretrain.REAL_THING)


def test_a_mixture_trains_checkpoints_and_reports_in_its_references_units(pretrained, sample):
    assert "Open X-Embodiment: sample" in (pretrained / "report.md").read_text()
    config = load_config(pretrained)
    statistics = [json.loads(p.read_text())["action"] for p in sample.rglob("train/prepared-*/dataset_statistics.json")]
    assert any(np.allclose(s["q99"][:6], config.policy.action_high) for s in statistics)
    report = json.loads((pretrained / "report.json").read_text())
    assert report  # validation ran
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)


def test_another_run_starts_from_it_and_keeps_what_fits(pretrained, sample, tmp_path, caplog):
    caplog.set_level("INFO")
    config = tiny(bridge.PRESETS["sample"], sample, tmp_path / "bridge", **{"policy.chunk": 3})
    config = cli.override(config, **{"train.init_from": str(pretrained)})
    setup = setups.prepare(config)
    shapes, places = build.abstract_params(setup.model, setup.mesh)
    fresh = jax.device_put(toy.random_like(shapes), places)
    taken = flatten_dict(chaining.take_over(fresh, str(pretrained)), sep="/")
    before = flatten_dict(open_model(pretrained)[1], sep="/")
    fresh = flatten_dict(fresh, sep="/")
    assert taken.keys() == fresh.keys()
    started_anew = {path for path, x in taken.items() if before.get(path, np.zeros(0)).shape != x.shape}
    assert started_anew and all(path.startswith("head/") for path in started_anew)  # another chunk: other outputs
    for path, x in taken.items():
        source = fresh if path in started_anew else before
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(source[path], np.float32), err_msg=path)
    for path in started_anew:
        assert f"{path}: there {before[path].shape}, here {taken[path].shape}" in caplog.text
    # The vocabulary is the first run's, so that words keep their meaning.
    assert setup.backbone.tokenizer.get_vocab() == load_policy_tokenizer(pretrained)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        setups.prepare(cli.override(config, **{"train.init_from": "/nowhere"}))


def load_policy_tokenizer(path):
    from robovlms_jax.training import checkpoints, items

    assets = items.read_serving(checkpoints.locate(path))["assets"]
    return build.backbone_from_assets(load_config(path).backbone, assets).tokenizer.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [bridge, google_robot])
def test_each_experiment_runs_on_the_bundled_episodes(experiment, pretrained, sample, tmp_path):
    config = tiny(experiment.PRESETS["sample"], sample, tmp_path / "run")
    output = run.train("sample", cli.override(config, **{"train.init_from": str(pretrained)}))
    assert (output / "report.md").exists() and (output / "checkpoints" / "2").is_dir()
    assert load_policy(output).act is not None


@pytest.mark.parametrize("experiment", [bridge, google_robot, oxe_pretrain])
def test_presets_are_complete(experiment):
    for name, config in experiment.PRESETS.items():
        config.validate(jax.device_count())
        assert config.policy.action_scaling == "quantile" and config.policy.cameras == ("static",), name
    released, paper = (experiment.PRESETS[name] for name in ("kosmos_lstm", "kosmos_lstm_paper"))
    assert (released.optimizer.learning_rate, released.optimizer.weight_decay) == (2e-5, 0.0)
    assert (paper.optimizer.learning_rate, paper.optimizer.weight_decay, paper.optimizer.warmup_steps) == (
        1e-4,
        0.01,
        5_000,
    )
    assert all(x.train.steps == 50_000 and x.train.batch_size == 128 for x in (released, paper))
    assert released.policy.window == 16 and released.policy.chunk == 10
    assert not released.data.compat_goal_relabelling and not released.data.compat_second_norm


def test_the_parts_of_a_mixture_are_checked_each_in_its_own_units(tmp_path):
    # Breaks when a mixture is checked as one: openings of two robots do not compare, one is inverted.
    for name, is_open in (("right", 1.0), ("inverted", 0.0)):
        episodes = [toy_rlds.episode(seed, 8) for seed in range(4)]
        for episode in episodes:
            gripper = episode["steps/action"][:, 6]
            episode["steps/observation/state"][:, 6] = np.where(gripper == is_open, 40.0, 0.0)
        toy_rlds.write(tmp_path, episodes, name=name)
    (tmp_path / "mine.yaml").write_text("mixture: {right: 1.0, inverted: 1.0}\n")
    data = DataConfig(dataset=str(tmp_path / "mine.yaml"), root=str(tmp_path), index_workers=1)
    config = dataclasses.replace(oxe_pretrain.PRESETS["sample"], data=data)
    mixture = opening.open_split(data, "training")
    with pytest.raises(ValueError, match=r"inverted/1\.0\.0: .*gripper: means the opposite"):
        setups.training_actions(config, mixture)
