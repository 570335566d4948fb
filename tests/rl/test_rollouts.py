"""Tables inside one program play as the host's loop plays them."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.control.execution import ExecutedBatch, Execution
from robovlms_jax.control.interface import ActionChunk
from robovlms_jax.evaluation import chains, rollout
from robovlms_jax.playtable.env import PlayTables
from robovlms_jax.playtable.scene import make_scene
from robovlms_jax.policies import serving
from robovlms_jax.policies.config import ActionHistoryConfig, ProprioConfig
from robovlms_jax.rl import rollouts
from robovlms_jax.rl import tables as playing
from tests import processes, toy

SIZES = {"static": 20, "wrist": 12}


def encode(text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([5 + len(word) for word in text.split()], np.int32)[:6]
    return ids, np.ones(len(ids), bool)


def trials(names: tuple[str, ...], count: int, scene: str = "D") -> list[rollout.Trial]:
    return chains.chain_trials(chains.single_tasks(names, count), scene=scene)


def world_of(asked: list[rollout.Trial]) -> playing.World:
    return playing.make_world(asked, encode, SIZES["static"])


def idle_rollout(world: playing.World, how: playing.Play) -> playing.Outcome:
    """Six decisions of two tables to do nothing."""

    @jax.jit
    def run(world: playing.World) -> playing.Outcome:
        def step(tables, _):
            return playing.execute(world, how, tables, jnp.zeros((2, 4, 7)))

        return jax.lax.scan(step, playing.begin(world, 2), length=6)[1]

    return jax.device_get(run(world))


@pytest.mark.slow
def test_a_table_without_a_trial_stands_still():
    plain = idle_rollout(world_of(trials(("open_drawer",), 3)), playing.Play(actions=2, max_steps=3))
    np.testing.assert_array_equal(plain.trial.T, [[0, 0, 2, 2, -1, -1], [1, 1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(plain.steps.T, [[2, 1, 2, 1, 0, 0], [2, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(plain.over.T, [[0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]])
    assert not plain.success.any()
    assert not plain.looked.any()


@pytest.mark.slow
def test_a_table_takes_the_next_trial_when_its_time_is_up_after_a_last_look_if_that_is_asked_for():
    """Two tables, three trials of three steps, chunks of two: 2 + 1 steps, a look, then the next trial."""
    world = world_of(trials(("open_drawer",), 3))
    looking = idle_rollout(world, playing.Play(actions=2, max_steps=3, again=True, look_at_end=True))
    np.testing.assert_array_equal(looking.trial.T, [[0, 0, 0, 2, 2, 2], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(looking.steps.T, [[2, 1, 0] * 2] * 2)
    np.testing.assert_array_equal(looking.looked.T, [[0, 0, 1] * 2] * 2)


def test_a_world_without_trials_is_refused():
    with pytest.raises(ValueError, match="no trials"):
        playing.make_world([], encode, 20)


def test_what_tables_on_the_device_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"ensemble.*host's loop"):
        playing.executed(Execution("ensemble"), 10)
    assert [playing.executed(Execution(mode, horizon=30), 10) for mode in ("first", "chunk", "receding")] == [1, 10, 10]
    with pytest.raises(ValueError, match="action_history"):
        rollouts.require_playable(toy.make_model(action_history=ActionHistoryConfig(length=2)).config)
    model = toy.make_model()
    criterion = rollout.SuccessCriterion(stop_at_success=False)
    with pytest.raises(ValueError, match="stop at success"):
        rollouts.Player(model, encode, 2, SIZES, criterion=criterion)


def test_tables_whose_task_begins_forget_and_the_others_keep_everything():
    model = toy.make_model(history="interleaved", window=2, chunk=3)
    batch = toy.make_batch(np.random.default_rng(0), window=2, windows=1, chunk=3)
    carry = model.init_carry(3, toy.random_params(model, batch), 4)
    carry = jax.tree.map(lambda x: jnp.ones_like(x), carry)
    blank = model.init_head_carry(1)
    assert jax.tree.leaves(carry.head) and jax.tree.leaves(carry.history)
    for fresh in ((False, True, True), (False, False, False)):
        expected = carry
        for slot in np.flatnonzero(fresh):
            expected = model.reset_slot(expected, jnp.int32(slot), blank)
        jax.tree.map(np.testing.assert_array_equal, rollouts.forget(model, carry, jnp.array(fresh)), expected)


BUTTON = np.asarray(make_scene("D").anchors.button_top)


def press(position, xp):
    """float[..., 3] of the hand -> the action float[..., 7] that goes above the button, then down."""
    away = xp.asarray(BUTTON, dtype=xp.float32) + xp.asarray([0, 0, 0.06], dtype=xp.float32) - position
    near = xp.abs(away[..., :2]).max(-1) < 0.01
    down = xp.where(near, -1.0, xp.clip(away[..., 2] / 0.02, -1, 1))
    zeros = xp.zeros_like(down)
    sideways = xp.clip(away[..., :2] / 0.02, -1, 1)
    return xp.stack([sideways[..., 0], sideways[..., 1], down, zeros, zeros, zeros, zeros - 1], axis=-1)


@pytest.mark.slow
def test_a_scripted_policy_has_the_same_results_on_the_device_as_in_the_host_loop(monkeypatch):
    """Successes, failures, chains of tasks, tables that become free at different times."""
    model = toy.make_model(window=1, proprio=ProprioConfig(enabled=True))

    def act(params, seen, carry, active, key):
        hand = seen.sensors["proprio"][:, 0, :3]
        return jnp.repeat(press(hand, jnp)[:, None], 5, axis=1), carry, ()

    class Pressing:
        def reset(self, slots, instructions):
            pass

        def act(self, observations, slots):
            hands = [np.asarray(x.proprio[:3], np.float32) for x in observations]
            return [ActionChunk(np.repeat(press(hand, np)[None], 5, axis=0).astype(np.float32)) for hand in hands]

    monkeypatch.setattr(rollouts, "greedy", lambda model: act)
    asked = trials(("turn_on_led", "open_drawer", "turn_off_led"), 5)
    asked[0] = dataclasses.replace(asked[0], tasks=("turn_on_led", "close_drawer"), instructions=("on", "close it"))
    criterion, execution = rollout.SuccessCriterion(max_steps=60), Execution("receding", horizon=4)
    device = rollouts.Player(model, encode, 2, SIZES, execution, criterion)
    found = {result.index: result for result in device.results({}, asked)}
    assert device._run._cache_size() == 1  # compiled once, although tables were looked at several times
    host = rollout.run(ExecutedBatch(Pressing(), execution), PlayTables("D", 2, image_sizes=SIZES), asked, criterion)
    expected = {result.index: result for result in host}
    assert found == expected
    assert {True, False} == {done for result in found.values() for done in result.success}


@pytest.mark.slow
def test_tables_that_are_split_over_devices_have_the_results_of_one():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    said = processes.run_python("-m", "tests.rl.on_devices", XLA_FLAGS=flags).split("\n")
    assert said[:4] == ["1 5 1", "2 5 1", "True", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("history", ["policy_head", "interleaved"])
def test_a_policy_sees_and_does_the_same_on_the_device_as_in_the_host_loop(history):
    """Pictures are equal to the bit, what tables came to within rounding: XLA orders sums differently."""
    model = toy.make_model(history=history, window=2, chunk=3, proprio=ProprioConfig(enabled=True))
    batch = toy.make_batch(np.random.default_rng(0), window=2, windows=1, chunk=3)
    batch = batch.replace(inputs=batch.inputs.replace(sensors={"proprio": np.zeros((2, 2, 7), np.float32)}))
    params = toy.random_params(model, batch)
    asked = trials(("open_drawer", "turn_on_led"), 2)
    world = world_of(asked)
    how = playing.Play(tuple(SIZES.items()), actions=2, max_steps=40)
    game = rollouts.begin(model, params, world, 2, jax.random.key(0))
    images = jax.device_get(playing.look(world, how, game.tables)[0])
    tables = PlayTables("D", 2, image_sizes=SIZES)
    tables.reset([0, 1], [trial.start for trial in asked])
    seen = tables.observe([0, 1])
    for slot in (0, 1):
        for camera in SIZES:
            np.testing.assert_array_equal(images[camera][slot], seen[slot].images[camera])
    run = jax.jit(functools.partial(rollouts.play, model, rollouts.greedy(model), how, 4))
    game, (outcome, _) = run(params, world, game)
    policy = ExecutedBatch(serving.BatchedVLAPolicy(model, params, encode, 2), Execution("receding", horizon=2))
    policy.reset([0, 1], [trial.instructions[0] for trial in asked])
    for _ in range(4):
        chunks = policy.act(tables.observe([0, 1]), [0, 1])
        for step in range(2):
            tables.step([0, 1], np.stack([chunk.actions[step] for chunk in chunks]))
    assert outcome.steps.sum() == 16
    for a, b in zip(jax.tree.leaves(game.tables.states), jax.tree.leaves(tables.states), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
