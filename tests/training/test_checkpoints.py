"""Which checkpoint a run directory stands for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.training import checkpoints
from robovlms_jax.training import state as states


def at_step(state, step):
    return state.replace(step=jnp.int32(step), trainable={"head/kernel": jnp.full((2, 3), float(step))})


def test_best_outlives_newer_and_is_what_the_run_stands_for(tmp_path):
    # Fails if the best is deleted with the old ones, a worse one replaces it, or `locate` prefers the newest.
    mesh = meshes.make_mesh((1, 1, 1))
    params = {"head": {"kernel": jax.device_put(np.zeros((2, 3), np.float32), meshes.replicated(mesh))}}
    state = states.create(params, (".*",), optax.sgd(0.1), 0, mesh)
    saver = checkpoints.Checkpointer(tmp_path, keep=1, serving={"config": {}})
    kept = [saver.offer_best(at_step(state, step), {}, score) for step, score in ((1, 0.2), (2, 0.5), (3, 0.4))]
    assert kept == [True, True, False]
    saver.save(at_step(state, 4), {})
    saver.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["4"]
    assert checkpoints.locate(tmp_path) == tmp_path / "best" / "2"
    assert checkpoints.locate(tmp_path / "checkpoints").name == "4"
    np.testing.assert_array_equal(saver.restore_best(state).trainable["head/kernel"], 2.0)
    assert saver.offer_best(at_step(state, 5), {}, 0.5)  # of equals the later
    saver.close()
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["5", "score.json"]
    assert checkpoints.locate(tmp_path).name == "5"
