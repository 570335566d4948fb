"""Parameters that are split over a mesh learn as whole ones do, in all methods."""

from __future__ import annotations

import os

import jax
import pytest
from flax.traverse_util import flatten_dict

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.rl import behaviours, learning, objective
from robovlms_jax.rl.config import BehaviourConfig
from robovlms_jax.runs import build
from robovlms_jax.training import stages
from robovlms_jax.training.config import OptimizerConfig, TrainConfig
from tests import processes
from tests.rl.test_learning import policy


def test_parameters_that_lie_on_the_mesh_stay_where_they_lie_with_their_optimizer_state():
    """An axis of length 1 is named all the same. Fails if everything is laid out whole, as it was before."""
    model, params = policy("adapters")
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    places = build.abstract_params(model, mesh)[1]
    (stage,) = stages.plan(TrainConfig(steps=8, trainable=("lora_", "^rl/")), OptimizerConfig())
    own = objective.Learner(model, behaviours.make(model.config, BehaviourConfig()), (8,))
    state, _ = learning.begin(own, jax.device_put(params, places), stage, mesh, 0)
    expected = flatten_dict(places, sep="/")
    kept = {**state.frozen, **state.trainable}
    assert all(kept[path].sharding == place for path, place in expected.items())
    split = {path for path in state.trainable if "fsdp" in str(kept[path].sharding.spec)}
    assert split and all("lora_" in path for path in split)
    moments = [x for x in jax.tree.leaves(state.opt_state) if "fsdp" in str(x.sharding.spec)]
    assert len(moments) >= 2 * len(split)  # Adam's two


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fsdp", ["iteration True True True", "bytes True", "restored True True"]),
        ("tensor", ["iteration True True True", "bytes True"]),
        ("answers", ["(1, 1, 1) True True False", "(1, 2, 1) True True True", "(1, 1, 2) True True True"]),
    ],
)
def test_parameters_that_are_split_over_a_mesh_learn_as_whole_ones(kind, expected):
    """Those of fsdp go on elsewhere, too."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    said = processes.run_python("-m", "tests.rl.learning_on_meshes", kind, XLA_FLAGS=flags).split("\n")
    assert said[:-1] == expected
