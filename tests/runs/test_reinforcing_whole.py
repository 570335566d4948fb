"""A run of reinforcement from the first line to its report, with the bundled twin: stopped, gone on with, the same."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import calvin_abcd, reinforce
from robovlms_jax.demo import twin
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.rl import starts, tables
from robovlms_jax.rl.config import BehaviourConfig, ReinforceConfig, UpdateConfig
from robovlms_jax.runs import build, load, reinforcing
from robovlms_jax.training import memory


def config(out, **changes):
    small = {"tables": 4, "decisions": 4, "trials": 2, "pool": 8, "max_steps": 20, "iterations": 3}
    small["update"] = UpdateConfig(minibatches=2, divergence_stop=0.0)
    return ReinforceConfig(checkpoint=str(twin.DIRECTORY), out=str(out), tasks=("turn_on_led",), **{**small, **changes})


def curve(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "time")} for row in rows]


BY_ANSWERS = {
    "update": UpdateConfig(method="dpo", minibatches=2),
    "trainable": ("^head/",),
    "optimizer": reinforce.PRESETS["dpo"].optimizer,
    "pool": 3,
    "held_out": 0.3,
    "decisions": 32,
    "behaviour": BehaviourConfig(spread=(0.4,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, BY_ANSWERS], ids=["ppo", "dpo"])
def test_a_run_that_was_stopped_by_a_signal_ends_as_one_that_was_not_to_the_bit(tmp_path, monkeypatch, changes):
    reinforcing.run(config(tmp_path / "whole", **changes))
    say = reinforcing._Say.after

    def interrupted(self, step, metrics):
        say(self, step, metrics)
        if step.number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as once:
        once.setattr(reinforcing._Say, "after", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reinforcing.run(config(tmp_path / "stopped", **changes))
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    assert 1 <= len(curve(tmp_path / "stopped")) < 3
    reinforcing.run(config(tmp_path / "stopped", resume=True, **changes))
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    policies = [flatten_dict(load.open_model(tmp_path / name)[1], sep="/") for name in ("whole", "stopped")]
    began = flatten_dict(load.open_model(twin.DIRECTORY)[1], sep="/")
    assert policies[0].keys() == policies[1].keys()
    for path, x in policies[0].items():
        np.testing.assert_array_equal(x, policies[1][path], err_msg=path)
    assert any((np.asarray(x) != np.asarray(began[path])).any() for path, x in policies[0].items())
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("whole", "stopped")]
    assert results[0] == results[1]
    by_answers = curve(tmp_path / "whole")[0].keys() >= {"preferred", "margin", "loss_held_out"}
    assert (
        by_answers == bool(changes) == ("Answers: of a simulated person" in (tmp_path / "whole/report.md").read_text())
    )


@pytest.mark.slow
def test_the_presets_of_many_tables_run_at_a_reduced_size(tmp_path):
    """`playtable_full` as it is for a GPU but for its numbers; the twin stands for that run's policy."""
    less = {"tables": 2, "decisions": 2, "trials": 2, "iterations": 1, "max_steps": 10, "unseen_random_scenes": 2}
    full = reinforce.PRESETS["playtable_full"]
    small = dataclasses.replace(
        full,
        **{"checkpoint": str(twin.DIRECTORY), "out": str(tmp_path / "full"), "pool": 8, "random_scenes": 2, **less},
        update=dataclasses.replace(full.update, minibatches=2),
    )
    text = reinforcing.run(small).read_text()
    assert "unseen_random_tables" in text and curve(tmp_path / "full")[0]["updates"] >= 1


def sized(world, trials, kinds):
    """The shapes of a world with so many trials and kinds of tables."""

    def leaf(x, count):
        return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)

    counts = {field.name: trials if field.name in world.OF_TRIALS else kinds for field in dataclasses.fields(world)}
    parts = {name: jax.tree.map(lambda x, n=n: leaf(x, n), getattr(world, name)) for name, n in counts.items()}
    return type(world)(**parts)


@pytest.mark.slow
def test_the_preset_for_one_gpu_needs_the_memory_that_its_page_says():
    """Traced at its full size, drawn as on a GPU, with random parameters: nothing is computed."""
    full, trained = reinforce.PRESETS["playtable_full"], calvin_abcd.FULL
    words = [text for task in tasks.TASKS.values() for text in (*task.phrasings, *task.held_out)]
    backbone = build.open_backbone(trained.backbone, words)
    model = build.make_model(trained, backbone.vlm)
    params = build.init_params(model, meshes.make_mesh((1, 1, 1), jax.devices()[:1]), 0, backbone)
    horizon, sizes = trained.rollouts.execution.horizon, trained.rollouts.image_size
    full = dataclasses.replace(full, horizon=horizon, image_size=sizes, max_steps=trained.rollouts.max_steps)
    learner = reinforcing._learner(full, model, params)
    learner._play = dataclasses.replace(learner._play, platform="gpu")
    trials = starts.draw(("open_drawer",), ("A", "D"), 2, 0)
    small = tables.make_world(trials, backbone.encoder(backbone.longest(words)), sizes[0])
    world = sized(small, full.pool, len(full.tables_to_learn_on))
    arguments = learner.state.params, learner.reference, world, jax.random.key(0)
    alive = memory.alive(jax.make_jaxpr(learner._collected)(*arguments))
    kept, state = jax.eval_shape(learner._collected, *arguments)[0], learner.state
    lying = jax.tree.leaves((kept, world, state.trainable, state.opt_state, state.frozen))
    beside = sum(math.prod(x.shape) * x.dtype.itemsize for x in lying)
    text = (pathlib.Path(__file__).parents[2] / "docs" / "reinforcement.md").read_text()
    assert f"{alive / 2**30:.1f} GiB are alive at most while they are made, beside {beside / 2**30:.1f} GiB" in text
