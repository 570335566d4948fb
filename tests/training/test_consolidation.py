"""EWC: the term's gradient against its closed form, its file, and what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robovlms_jax.training import consolidation
from robovlms_jax.training import optimizer as optimizers
from robovlms_jax.training.config import OptimizerConfig

PARAMS = {"head/a": jnp.array([1.0, 2.0]), "backbone/b": jnp.array([[3.0]])}
FISHER = {"head/a": np.array([0.5, 0.0], np.float32), "backbone/b": np.array([[2.0]], np.float32)}


def test_the_gradient_is_that_of_the_loss_with_its_penalty():
    tx = consolidation.held(optax.sgd(0.1), 10.0)
    state = consolidation.with_fisher(tx.init(PARAMS), FISHER)
    moved = {path: x + 0.2 for path, x in PARAMS.items()}
    grads = {path: jnp.full_like(x, 3.0) for path, x in PARAMS.items()}
    updates, _ = tx.update(grads, state, moved)
    for path, x in updates.items():
        np.testing.assert_allclose(x, -0.1 * (3.0 + 10.0 * FISHER[path] * 0.2), rtol=1e-5)


def test_a_weight_of_zero_and_no_fisher_are_the_plain_optimizer():
    assert optimizers.make_optimizer(OptimizerConfig(), 5).init(PARAMS) is not None
    plain, held = (optimizers.make_optimizer(OptimizerConfig(ewc=ewc, ema=0.9), 5) for ewc in (0.0, 7.0))
    grads = {path: jnp.ones_like(x) for path, x in PARAMS.items()}
    first, second = (tx.update(grads, tx.init(PARAMS), PARAMS)[0] for tx in (plain, held))
    for path in PARAMS:
        np.testing.assert_array_equal(first[path], second[path])


def test_what_was_not_measured_is_not_held_and_another_models_file_is_refused():
    tx = optimizers.make_optimizer(OptimizerConfig(ewc=1.0, ema=0.9), 5)
    state = consolidation.with_fisher(tx.init(PARAMS), {"head/a": FISHER["head/a"], "lora_a": np.ones(3)})
    np.testing.assert_array_equal(state.optimizer.fisher["backbone/b"], 0)
    np.testing.assert_array_equal(state.optimizer.fisher["head/a"], FISHER["head/a"])
    for other in ({"neck": np.ones(2)}, {"head/a": np.ones(3)}):
        with pytest.raises(ValueError, match=r"fisher.npz is of another model: \['(neck|head/a)'\]"):
            consolidation.with_fisher(tx.init(PARAMS), other)


def test_a_floor_holds_what_had_no_information_and_leaves_the_rest():
    mean = (0.5 + 0.0 + 2.0) / 3
    floored = consolidation.floored(FISHER, 0.3)
    np.testing.assert_allclose(floored["head/a"], [0.5, 0.3 * mean], rtol=1e-6)
    np.testing.assert_array_equal(floored["backbone/b"], FISHER["backbone/b"])
    for path, x in consolidation.floored(FISHER, 0.0).items():
        np.testing.assert_array_equal(x, FISHER[path])
    with pytest.raises(ValueError, match=r"ewc_floor=0.3 has no effect while optimizer.ewc is 0"):
        OptimizerConfig(ewc_floor=0.3)


def test_clipping_is_switched_around_what_is_held():
    params = {"head/a": jnp.ones(2)}
    old, new = OptimizerConfig(ewc=1.0, clip_norm=0.0), OptimizerConfig(ewc=1.0, clip_norm=1.0, ema=0.5)
    before = optimizers.make_optimizer(old, 5).init(params)
    switched = optimizers.rewrap(before, params, before=old, now=new)
    expected = optimizers.make_optimizer(new, 5).init(params)
    assert str(switched) == str(expected)


def test_information_of_earlier_tasks_decays_and_is_read_back(tmp_path):
    total = consolidation.added({"a": np.array([2.0])}, {"a": np.array([1.0]), "b": np.array([4.0])}, 0.5)
    consolidation.write(tmp_path, total)
    found = consolidation.read(tmp_path)
    assert found["a"] == [2.0] and found["b"] == [4.0]
    with pytest.raises(FileNotFoundError, match=r"there is no .*fisher\.npz: experiments\.continual measures it"):
        consolidation.read(tmp_path / "other")
