"""The presets of other backbones on weight directories as they are published, with tiny models in them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import calvin_abcd
from robovlms_jax import cli
from robovlms_jax.control.interface import Observation
from robovlms_jax.load import load_policy
from robovlms_jax.runs import run
from robovlms_jax.runs.load import open_model
from robovlms_jax.training import trainable
from tests.backbones import families

ORDINARY = "qwen_vl_lstm"  # a part stays frozen, and the files hold a head for words


@pytest.mark.parametrize(
    "preset", [pytest.param(x, marks=() if x == ORDINARY else pytest.mark.slow) for x in calvin_abcd.OTHERS]
)
def test_published_weights_are_trained_and_served(tmp_path, preset, short_runs):
    # Fails if the files hold more than the policy asks for and that is refused, if weights are not those of the files,
    # if a frozen parameter moves or a trained one stays, or if the run directory needs the published one to be served.
    name = calvin_abcd.OTHERS[preset][0]
    weights, published = families.publish(name, tmp_path / "published")
    config = cli.override(
        calvin_abcd.PRESETS[preset],
        **{
            "backbone.weights": weights,
            "backbone.dtype": "float32",
            "backbone.remat": False,
            "data.root": str(calvin_abcd.SAMPLE),
            "data.windows_per_segment": 2,
            "data.num_threads": 1,
            "policy.window": 2,
            "policy.chunk": 2,
            "policy.head.hidden_size": 16,
            "policy.head.num_layers": 1,
            "policy.head.trunk": (16,),
            "optimizer.warmup_epochs": 0.0,
            "optimizer.learning_rate": 1e-3,
            "train.batch_size": 2,
            "train.epochs": 0,
            "train.steps": 1,
            "train.checkpoint_every": 1,
            "train.output": str(tmp_path / "run"),
        },
    )
    output = run.train(preset, config)
    for directory in (tmp_path / "published").iterdir():
        directory.rename(tmp_path / f"{directory.name}_is_gone")
    policy = load_policy(output)
    policy.reset("open the drawer")
    chunk = policy.act(Observation({"static": np.zeros((200, 200, 3), np.uint8)}))
    assert chunk.actions.shape == (2, 7) and np.isfinite(chunk.actions).all()
    params = flatten_dict(jax.device_get(open_model(output)[1]), sep="/")
    found = {path[len("backbone/") :]: value for path, value in params.items() if path.startswith("backbone/")}
    spare = {path for path in published if path not in found}
    added = {path for path in found if path not in published}
    # A policy that says no words has no head for them; MoonDream's last norm is a part of that head.
    assert all(path.startswith(("text/head/", "text/final_norm/")) for path in spare)
    assert all(path.startswith("resampler/") for path in added) and bool(added) == (preset == "moondream_lstm")
    for path in spare:
        del published[path]
    trained, frozen = trainable.split({f"backbone/{path}": path for path in published}, config.train.trainable)
    moved = {path: np.abs(found[path] - published[path]).max() for path in published}
    assert not any(moved[path] for path in frozen.values())
    moved = {path: moved[path] for path in trained.values()}
    # AdamW moves by the learning rate at first. What no gradient reaches stays: the last image token's block, say.
    assert max(moved.values()) < 2e-3 and sum(x > 0 for x in moved.values()) > 0.8 * len(moved), moved
