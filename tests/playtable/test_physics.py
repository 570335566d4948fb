from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import starts as random_starts
from robovlms_jax.actions import rotations
from robovlms_jax.envs.calvin import initial_states, tasks
from robovlms_jax.playtable import kinematics
from robovlms_jax.playtable.mechanics import contacts, physics, pushing
from robovlms_jax.playtable.scene import BUTTON, DRAWER, SCENES, SLIDER, SWITCH, make_scene
from tests.playtable.conftest import action, depths, info, reset, reset_all, step

RED, BLUE, PINK = range(3)


def start(scene, **changes):
    """Scene D, hand above the table, blocks apart on it; `changes` replaces fields of the state."""
    scene_obs = np.zeros(24)
    for i, x in enumerate((0.05, 0.18, 0.31)):
        scene_obs[6 + 6 * i : 12 + 6 * i] = x, -0.10, 0.46, 0.0, 0.0, np.pi / 2
    state = reset(scene, initial_states.INITIAL_ROBOT_OBS, scene_obs)
    return dataclasses.replace(state, **{key: jnp.asarray(value, jnp.float32) for key, value in changes.items()})


def with_hand(state, scene, position, *, width=0.0, euler=(3.14159, 0.0, 1.5708)):
    """`state` with the hand elsewhere."""
    robot = np.array([*position, *euler, width, *state.joints, 1.0 if width > 0 else -1.0])
    return reset(scene, robot, physics.scene_obs(scene, state))


def run(scene, state, actions):
    for one in actions:
        state = step(scene, state, one)
    return state


def placed(state, block, position):
    return dataclasses.replace(
        state, block_position=state.block_position.at[block].set(jnp.array(position)), support=jnp.full(3, -1)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Readings


def test_reset_gives_back_what_it_was_given(scene, starts):
    states = reset_all(scene, *starts)
    np.testing.assert_allclose(jax.jit(jax.vmap(physics.robot_obs))(states), starts[0], atol=1e-5)
    read = jax.jit(jax.vmap(physics.scene_obs, (None, 0)))(scene, states)
    np.testing.assert_allclose(read, starts[1], atol=1e-5)


@pytest.mark.parametrize("name", SCENES)
def test_blocks_are_read_in_the_order_of_the_scene(name):
    scene, obs = make_scene(name), np.zeros(24)
    for i in range(3):
        obs[6 + 6 * i : 9 + 6 * i] = i, 10 + i, 20 + i
    state = reset(scene, initial_states.INITIAL_ROBOT_OBS, obs)
    for color, position in zip(tasks.BLOCKS, state.block_position):
        assert position[0] == initial_states.SCENES[name].block_order.index(color)
    np.testing.assert_allclose(physics.scene_obs(scene, state), obs, atol=1e-6)


def test_reset_bends_the_arm_to_the_tool_if_the_joints_do_not_fit(scene):
    robot = initial_states.INITIAL_ROBOT_OBS.copy()
    robot[:3] += 0.05
    state = reset(scene, robot, np.zeros(24))
    np.testing.assert_allclose(kinematics.forward(state.joints).origins[7], robot[:3], atol=1e-3)


def test_info_knows_what_touches_what(scene):
    state = placed(start(scene), BLUE, (0.05, -0.10, 0.50))  # on the red one
    state = placed(state, PINK, (0.07, 0.0924, 0.461))
    contacts = np.asarray(info(scene, state)["contacts"])
    touched = [{tasks.BODIES[i] for i in np.flatnonzero(row)} for row in contacts]
    assert touched == [set(), {"base", "blue_block"}, {"red_block"}, {"shelf"}]


# ---------------------------------------------------------------------------------------------------------------------
# The hand


def test_actions_accumulate_on_the_target(scene):
    state = run(scene, start(scene), [action(move=(0.5, 0.0, 0.25), turn=(0.0, 0.0, -1.0))] * 4)
    begin = start(scene)
    np.testing.assert_allclose(state.target_position - begin.target_position, [0.04, 0.0, 0.02], atol=1e-6)
    np.testing.assert_allclose(state.target_euler - begin.target_euler, [0.0, 0.0, -0.2], atol=1e-6)


def test_the_hand_lags_behind_and_arrives(scene):
    begin = start(scene)
    moving = run(scene, begin, [action(move=(0.8, 0.0, 0.0))] * 5)
    gap = np.linalg.norm(moving.target_position - moving.position)
    assert 0.008 < gap < 0.03
    arrived = run(scene, moving, [action()] * 12)
    np.testing.assert_allclose(arrived.position, moving.target_position, atol=1.5e-3)


def test_the_hand_cannot_go_through_the_table(scene):
    state = with_hand(start(scene), scene, (-0.02, -0.05, 0.52))
    state = run(scene, state, [action(move=(0.0, 0.0, -1.0))] * 15)
    assert state.target_position[2] < 0.3
    assert state.position[2] == pytest.approx(0.44 + 0.0156, abs=2e-3)


def test_joints_stay_true_to_the_tool(scene, starts):
    state = run(scene, start(scene), [action(move=(0.7, 0.3, -0.5), turn=(0.0, -0.3, 0.4))] * 8)
    arm = kinematics.forward(state.joints)
    np.testing.assert_allclose(arm.origins[7], state.position, atol=1.5e-3)
    np.testing.assert_allclose(arm.rotations[7], state.rotation, atol=3e-3)


def test_fingers_close_as_fast_as_in_calvin(scene):
    widths = []
    state = start(scene)
    for _ in range(8):
        state = step(scene, state, action(gripper=-1.0))
        widths.append(float(state.width))
    assert widths[0] < 0.05
    assert widths[-1] < 0.001
    assert run(scene, state, [action(gripper=1.0)] * 8).width > 0.079


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def grasp(scene, block=RED):
    """The red block in the hand, still on the table."""
    state = start(scene)
    x, y, z = state.block_position[block]
    state = with_hand(state, scene, (x, y, z - 0.002), width=0.08)
    return run(scene, state, [action(gripper=-1.0)] * 5)


def test_closing_fingers_take_the_block_between_them(scene):
    state = grasp(scene)
    assert state.held == RED
    assert state.width == pytest.approx(0.04, abs=3e-3)
    state = run(scene, state, [action(move=(0.0, 0.0, 1.0))] * 8)
    touched = np.asarray(info(scene, state)["contacts"])[1 + RED]
    assert {tasks.BODIES[i] for i in np.flatnonzero(touched)} == {"robot"}
    np.testing.assert_allclose(state.block_position[RED] - state.position, [0, 0, 0.002], atol=4e-3)


def test_opening_fingers_let_the_block_fall_upright(scene):
    state = grasp(scene)
    state = run(scene, state, [action(move=(0.0, 0.0, 1.0))] * 8 + [action(turn=(0.0, -1.0, 0.0))] * 8)
    tilted = state.block_rotation[RED]
    assert np.abs(np.asarray(tilted)[2]).max() < 0.97
    state = run(scene, state, [action(gripper=1.0)] * 25)
    assert state.held == -1
    assert state.block_position[RED, 2] == pytest.approx(0.46, abs=1e-4)
    assert np.abs(np.asarray(state.block_rotation[RED])[2]).max() > 0.9999


def test_a_pushed_block_goes_with_the_finger(scene):
    state = start(scene)
    state = with_hand(state, scene, (state.block_position[PINK, 0] - 0.08, -0.10, 0.46))
    before = state.block_position[PINK]
    state = run(scene, state, [action(move=(0.5, 0.0, 0.0))] * 10)
    moved = state.block_position[PINK] - before
    assert moved[0] > 0.03
    assert abs(moved[1]) < 0.01
    assert abs(moved[2]) < 1e-6


def test_a_push_beside_the_centre_turns_the_block(scene):
    state = start(scene)
    state = with_hand(state, scene, (state.block_position[PINK, 0] - 0.06, -0.10 + 0.025, 0.46))
    before = rotations.to_euler(state.block_rotation[PINK])[2]
    state = run(scene, state, [action(move=(0.5, 0.0, 0.0))] * 8)
    assert rotations.to_euler(state.block_rotation[PINK])[2] - before < -0.1


def test_a_pushed_block_pushes_the_next(scene):
    state = placed(start(scene), BLUE, (0.11, -0.10, 0.46))
    state = with_hand(state, scene, (0.05 - 0.07, -0.10, 0.46))
    state = run(scene, state, [action(move=(0.6, 0.0, 0.0))] * 12)
    assert state.block_position[BLUE, 0] > 0.13
    assert state.block_position[BLUE, 0] - state.block_position[RED, 0] > 0.039


def test_a_block_against_the_wall_stops_the_hand(scene):
    state = placed(start(scene), RED, (-0.38, 0.0, 0.46))
    state = with_hand(state, scene, (-0.38, -0.07, 0.46))
    state = run(scene, state, [action(move=(0.0, 0.5, 0.0))] * 20)
    assert state.target_position[1] > 0.1
    assert state.position[1] < state.block_position[RED, 1] - 0.025
    assert state.block_position[RED, 1] < 0.02
    assert depths(scene, state).max() <= contacts.TOLERANCE_M


def test_a_block_falls_onto_what_is_under_it(scene):
    state = placed(start(scene), RED, (0.18, -0.10, 0.60))
    state = run(scene, state, [action()] * 10)
    assert state.block_position[RED, 2] == pytest.approx(0.50, abs=1e-4)
    assert state.block_position[BLUE, 2] == pytest.approx(0.46, abs=1e-4)


@pytest.mark.parametrize(("x", "falls"), [(0.43, False), (0.445, True)])
def test_a_block_beyond_the_edge_falls(scene, x, falls):
    state = run(scene, placed(start(scene), BLUE, (x, -0.10, 0.46)), [action()] * 40)
    assert (state.block_position[BLUE, 2] < 0.1) == falls


def test_the_lower_block_carries_the_upper(scene):
    state = placed(start(scene), BLUE, (0.05, -0.10, 0.50))
    state = with_hand(state, scene, (-0.01, -0.10, 0.452))
    state = run(scene, state, [action(move=(0.5, 0.0, 0.0))] * 10)
    lower, upper = state.block_position[RED], state.block_position[BLUE]
    assert lower[0] > 0.07
    np.testing.assert_allclose(upper[:2], lower[:2], atol=6e-3)
    assert upper[2] == pytest.approx(0.50, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Mechanisms


def test_the_drawer_follows_its_handle_and_takes_a_block_along(scene):
    state = placed(start(scene), BLUE, (0.18, -0.12, 0.362))
    state = run(scene, state, [action()] * 2)
    state = with_hand(state, scene, (0.18, -0.216, 0.365))
    state = run(scene, state, [action(move=(0.0, -0.6, 0.0))] * 22)
    assert state.mechanisms[DRAWER] == pytest.approx(0.22)
    assert state.block_position[BLUE, 1] == pytest.approx(-0.12 - 0.22, abs=3e-3)
    assert state.position[1] > -0.50  # the drawer's stop holds the hand


@pytest.mark.parametrize("side", [1, -1])
def test_the_door_follows_its_handle_both_ways(scene, side):
    begin = 0.0 if side > 0 else 0.28
    state = start(scene, mechanisms=[begin, 0.0, 0.0, 0.0])
    state = with_hand(state, scene, (0.04 - begin + side * 0.06, -0.010, 0.525))
    state = run(scene, state, [action(move=(-0.7 * side, 0.0, 0.0))] * 22)
    assert abs(float(state.mechanisms[SLIDER]) - begin) > 0.15


def test_each_press_toggles_the_led_once_and_the_button_returns(scene):
    state = with_hand(start(scene), scene, (-0.12, -0.12, 0.53))
    seen = []
    for _ in range(2):
        state = run(scene, state, [action(move=(0.0, 0.0, -0.8))] * 5)
        assert state.mechanisms[BUTTON] > 0.01
        state = run(scene, state, [action(move=(0.0, 0.0, 0.8))] * 6)
        assert state.mechanisms[BUTTON] == 0.0
        seen.append(int(info(scene, state)["led"]))
    assert seen == [1, 0]


def test_the_bulb_is_on_while_the_lever_is_beyond_the_middle(scene):
    for lever, lit in ((0.04, 0), (0.05, 1)):
        state = start(scene, mechanisms=[0.0, 0.0, 0.0, lever])
        assert info(scene, state)["lightbulb"] == lit
        assert step(scene, state, action()).mechanisms[SWITCH] == pytest.approx(lever)


# ---------------------------------------------------------------------------------------------------------------------
# Properties


def random_actions(rng, steps, tables):
    """Pushy random motion: directions held for a while, drawn towards the table and the cabinet."""
    held = rng.uniform(-1, 1, (steps // 15 + 1, tables, 7)).repeat(15, axis=0)[:steps]
    actions = held + 0.3 * rng.normal(size=held.shape)
    actions[..., 3:6] *= 0.5
    actions[..., 2] -= 0.25
    actions[: steps // 3, :, 1] += 0.5
    actions[..., 6] = np.sign(held[..., 6])
    return np.clip(actions, -1, 1).astype(np.float32)


def rollout(scenes, states, actions):
    def one(states, actions):
        states = physics.step_tables(scenes, states, actions)
        return states, (states, jax.vmap(pushing.touching)(scenes, states).depth.max((1, 2)))

    return jax.lax.scan(one, states, actions)[1]


simulate = jax.jit(rollout)
TABLES, STEPS = 4, 12
"""Of each call of it in ordinary tests, so that they share one program."""


def in_parts(scenes, states, actions):
    """`rollout` of more tables and steps, by such calls."""
    groups = []
    for first in range(0, actions.shape[1], TABLES):
        own, found = slice(first, first + TABLES), []
        scene, state = (jax.tree.map(lambda x, own=own: x[own], tree) for tree in (scenes, states))
        for begin in range(0, len(actions), STEPS):
            found.append(jax.device_get(simulate(scene, state, actions[begin : begin + STEPS, own])))
            state = jax.tree.map(lambda x: x[-1], found[-1][0])
        groups.append(jax.tree.map(lambda *x: np.concatenate(x), *found))
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1), *groups)


@pytest.mark.parametrize(
    ("tables", "steps", "play"), [(16, 60, in_parts), pytest.param(100, 100, simulate, marks=pytest.mark.slow)]
)
def test_random_steps_keep_the_laws(stacked_scenes, tables, steps, play):
    rng = np.random.default_rng(0)
    scenes = jax.tree.map(lambda leaf: leaf[np.arange(tables) % 4], stacked_scenes)
    robot, table = jax.jit(jax.vmap(random_starts.sample))(scenes, jax.random.split(jax.random.key(0), tables))
    states = jax.jit(jax.vmap(physics.reset))(scenes, robot, table)
    history, depth = jax.device_get(play(scenes, states, random_actions(rng, steps, tables)))

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(history))
    # nothing is in anything
    assert depth.max() <= contacts.TOLERANCE_M * 1.01
    # joints stay in their ranges
    ranges = np.asarray(scenes.joint_range)
    assert np.all(history.mechanisms >= 0)
    assert np.all(history.mechanisms <= ranges + 1e-6)
    # no block is anywhere without a reason: it is held, it stands on something, or it is on its way down
    positions = np.concatenate([np.asarray(states.block_position)[None], history.block_position])
    rise = np.diff(positions[..., 2], axis=0)
    held = history.held[..., None] == np.arange(3)
    unsupported = (history.support == -1) & ~held
    still = np.abs(history.block_velocity).max(-1) < 1e-6
    touched_by_hand = np.asarray(
        jax.jit(jax.vmap(jax.vmap(physics.info), (None, 0)))(scenes, jax.tree.map(jnp.asarray, history))["contacts"]
    )[..., 0, 1:4]
    assert not np.any(unsupported & still & ~touched_by_hand), "a block floats"
    # no energy from nothing: a block that the hand does not touch never rises, unless what carries it does; pushed by
    # another block it may climb the edge of the shelf's board, 1 mm
    on_block = history.support >= 32
    was_touched = np.concatenate([touched_by_hand[:1], touched_by_hand[:-1]]) | touched_by_hand
    assert rise[~held & ~was_touched & ~on_block].max() < 1.1e-3
    assert positions[..., 2].min() > 0.0195, "a block sinks into the floor"
    # the run was worth it: doors moved, blocks were pushed and held
    moved = np.ptp(history.mechanisms, axis=0).max(0) > 0.01
    assert moved.all() if tables >= 100 else moved.any()
    assert held.any()  # fewer blocks in the shorter run
    assert (np.linalg.norm(positions[-1] - positions[0], axis=-1) > 0.02).mean() > (0.05 if tables >= 100 else 0.03)


def test_a_batch_does_what_single_tables_do_and_twice_the_same(stacked_scenes, starts):
    tables, run_batch = TABLES, simulate
    actions = random_actions(np.random.default_rng(1), STEPS, tables)
    states = jax.jit(jax.vmap(physics.reset))(stacked_scenes, starts[0][:tables], starts[1][:tables])
    batch, _ = run_batch(stacked_scenes, states, actions)
    again, _ = run_batch(stacked_scenes, states, actions)
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)
    # Rounds end when no table has an overlap left: which tables are beside one must not matter to it.
    beside = jax.tree.map(lambda leaf: leaf[np.array([0, 0, 2, 1])], states)
    alone = np.where(np.arange(tables)[:, None] == 0, actions, np.float32(0.3))
    other, _ = run_batch(stacked_scenes, beside, alone)
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(other)):
        np.testing.assert_array_equal(a[:, 0], b[:, 0])
    for i in range(tables):
        scene = jax.tree.map(lambda leaf, i=i: leaf[i], stacked_scenes)
        state = run(scene, jax.tree.map(lambda leaf, i=i: leaf[i], states), actions[:, i])
        for field in dataclasses.fields(state):
            # The two programs round differently; the arm's spare angle feels it most (3e-4 rad, the tool 2e-6 m).
            atol = 1e-3 if field.name == "joints" else 1e-5
            many = getattr(batch, field.name)[-1, i]
            np.testing.assert_allclose(getattr(state, field.name), many, atol=atol, err_msg=field.name)


def test_recorded_demonstrations_of_calvin_do_their_task_here(recordings):
    """Open loop: the actions recorded in CALVIN's simulator, replayed on this table from the recorded start."""
    for recording in recordings:
        scene = make_scene(recording.scene)
        state = reset(scene, recording.robot_obs[0], recording.scene_obs[0])
        if recording.robot_obs[0, 6] < 0.06:  # the recording starts with a block in the hand
            state = run(scene, state, [action(gripper=-1.0)] * 2)
        begin = jax.device_get(info(scene, state))
        rest = [action(gripper=recording.rel_actions[-1, 6])] * 10
        done = set()
        for command in [*recording.rel_actions, *rest]:
            state = step(scene, state, command)
            done |= tasks.completed_tasks(begin, jax.device_get(info(scene, state)))
        assert recording.task in done, f"{recording.task} in {recording.scene}"
