from __future__ import annotations

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import expert_trials, simulator
from benchmarks import experts as experts_benchmark
from benchmarks import starts as random_starts
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.evaluation import rollout_metrics
from robovlms_jax.playtable import env
from robovlms_jax.playtable.experts import plans, waypoints
from robovlms_jax.playtable.mechanics import bodies, contacts, physics, pushing
from robovlms_jax.playtable.scene import SCENES, stack_scenes
from tests.playtable.conftest import reset, reset_all

FIXTURES = (
    "open_drawer",
    "close_drawer",
    "move_slider_left",
    "move_slider_right",
    "turn_on_lightbulb",
    "turn_off_lightbulb",
    "turn_on_led",
    "turn_off_led",
)


class Outcome(NamedTuple):
    """state: after the task, at the first step at which it was done. done: bool[]. steps: int32[]."""

    state: bodies.State
    done: jax.Array
    steps: jax.Array


def perform(scene, state, task, key, max_steps=plans.MAX_STEPS) -> Outcome:
    """Let the expert try a task until it is done."""
    route, start = plans.plan(scene, state, task, key), physics.info(scene, state)

    def advance(carry):
        state, progress, _, steps = carry
        action, progress = waypoints.act(route, progress, state)
        state = physics.step(scene, state, action)
        return state, progress, tasks.conditions(start, physics.info(scene, state))[task], steps + 1

    carry = (state, waypoints.begin(), jnp.bool_(False), jnp.int32(0))
    state, _, done, steps = jax.lax.while_loop(lambda carry: ~carry[2] & (carry[3] < max_steps), advance, carry)
    return Outcome(state, done, steps)


@jax.jit
def perform_all(scenes, which, states, task, keys, most):
    run = lambda i, *rest: perform(env.pick(scenes, i), *rest)  # noqa: E731
    return jax.vmap(run)(which, states, task, keys, most)


def number(task: str) -> int:
    return plans.TASKS.index(task)


def perform_chains(chains):
    return experts_benchmark.run(expert_trials.chain_trials(chains, "D"), plans.MAX_STEPS, tables=64, seed=0)


def covering_chains():
    """Official chains that between them ask for every task."""
    missing, chosen = set(plans.TASKS), []
    for chain in task_chains.official_chains():
        if missing & set(chain.tasks):
            missing -= set(chain.tasks)
            chosen.append(chain)
    return chosen


@pytest.mark.slow
def test_the_fixture_tasks_succeed_in_every_scene():
    scenes = stack_scenes(SCENES)
    copies = 3
    which = np.repeat(np.arange(4), len(FIXTURES) * copies)
    task = np.tile(np.repeat([number(name) for name in FIXTURES], copies), 4)
    keys = jax.random.split(jax.random.key(0), len(task))
    robot, table = jax.jit(jax.vmap(lambda i, key: random_starts.sample(env.pick(scenes, i), key)))(which, keys)
    table = np.array(table)
    for joint, (undone, done) in {0: FIXTURES[2:4], 1: FIXTURES[:2], 3: FIXTURES[4:6], 5: FIXTURES[6:8]}.items():
        end = np.asarray(scenes.joint_range)[which, joint] if joint < 4 else np.ones(len(which))
        table[:, joint] = np.where(task == number(undone), 0.0, np.where(task == number(done), end, table[:, joint]))
    states = env.reset_batch(env.pick(scenes, which), robot, table)
    outcome = perform_all(scenes, which, states, task, keys, np.full(len(task), 150))
    failed = [(SCENES[i], plans.TASKS[t]) for i, t, ok in zip(which, task, outcome.done) if not ok]
    assert len(failed) <= 0.03 * len(task), failed
    assert np.median(outcome.steps) < 60


@pytest.mark.slow
def test_every_task_can_be_done_and_chains_work():
    chains = covering_chains()
    results = perform_chains(chains)
    summary = rollout_metrics.summarize(results)
    assert set(summary.per_task) == set(plans.TASKS)
    assert not [task for task, rate in summary.per_task.items() if not rate.successes]
    assert summary.average_length.value > 4.3, [chains[r.index].index for r in results if r.score < 5]


@pytest.mark.slow
def test_the_first_chains_reach_the_aim():
    summary = rollout_metrics.summarize(perform_chains(task_chains.official_chains()[:200]))
    assert summary.average_length.value >= experts_benchmark.AIM_LENGTH
    weak = {task for task, rate in summary.per_task.items() if rate.value < 0.9}
    # a block that was just pushed or turned is still touched: CALVIN's condition cannot be met then
    assert weak <= {"push_into_drawer"}


def test_demonstrations_are_legal_varied_and_repeatable(scene):
    start = reset(scene, *initial_states.initial_state(task_chains.initial_conditions()[0]))
    task = number("open_drawer")
    before = physics.info(scene, start)

    @jax.jit
    def run(key):
        """80 steps: actions [80, 7], and after which of them the drawer is open."""
        plan = plans.plan(scene, start, task, key)

        def advance(carry, _):
            state, progress = carry
            action, progress = waypoints.act(plan, progress, state)
            state = physics.step(scene, state, action)
            return (state, progress), (action, tasks.conditions(before, physics.info(scene, state))[task])

        return jax.lax.scan(advance, (start, waypoints.begin()), length=80)[1]

    (one, done), (two, _), (again, _) = run(jax.random.key(0)), run(jax.random.key(1)), run(jax.random.key(0))
    assert done.any()
    assert np.all(np.abs(one[:, :6]) <= 1.0 + 1e-6)
    assert set(np.unique(one[:, 6])) <= {-1.0, 1.0}
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 0.05


def test_what_the_chains_ask_for_is_possible(scene, starts):
    possible = np.asarray(jax.jit(jax.vmap(random_starts.possible, (None, 0)))(scene, reset_all(scene, *starts)))
    for condition, row in zip(task_chains.initial_conditions(), possible):
        for task, ok in zip(plans.TASKS, row):
            asked = bool(task_chains.successors(condition, task))
            assert ok or not asked, (task, condition)
            if not task.startswith(("lift", "push_into")):  # experts move the door, and push one of two blocks
                assert ok == asked, (task, condition)


@pytest.mark.slow
def test_a_held_block_is_put_down_before_another_task(scene):
    start = reset(scene, *initial_states.initial_state(task_chains.official_chains()[0].condition))
    lift = jax.jit(perform)(scene, start, number("lift_blue_block_table"), jax.random.key(0))
    assert lift.done
    assert lift.state.held == tasks.BLOCKS.index("blue")
    then = jax.jit(perform)(scene, lift.state, number("turn_off_led"), jax.random.key(0))
    assert then.done
    assert then.state.held == -1


@pytest.mark.slow
def test_random_starts_stand_firmly(stacked_scenes):
    scenes = jax.tree.map(lambda leaf: leaf[np.arange(64) % 4], stacked_scenes)
    robot, table = jax.jit(jax.vmap(random_starts.sample))(scenes, jax.random.split(jax.random.key(3), 64))
    states = jax.jit(jax.vmap(physics.reset))(scenes, robot, table)
    assert jax.jit(jax.vmap(pushing.touching))(scenes, states).depth.max() <= contacts.TOLERANCE_M
    assert np.all(states.support >= 0)
    assert jnp.ptp(table[:, 0]) > 0.2
    assert jnp.ptp(table[:, 1]) > 0.2


@pytest.mark.slow
def test_the_benchmark_reports(tmp_path, capsys):
    out = tmp_path / "simulator.json"
    simulator.main(simulator.Args(tables=(2,), sizes=((32, 24),), seconds=0.05, out=out))
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    steps, rendered = (result["tables"]["2"][name] for name in ("steps", "rendered_steps_32_24"))
    for unit in ("per_s", "per_cpu_s"):
        assert steps[unit] > 0 and rendered[unit] > 0


@pytest.mark.slow
def test_a_lift_comes_before_what_begins_with_a_block_in_the_hand(tmp_path, capsys):
    names, out, table = ("stack_block", "turn_on_led"), tmp_path / "experts.json", tmp_path / "experts.md"
    args = experts_benchmark.Args(trials=4, chains=0, tasks=names, out=out, markdown=table, max_steps=120)
    trials = expert_trials.random_trials(names, args.scenes, args.trials, args.seed)
    assert [trial.scene for trial in trials] == 2 * [0, 1, 2, 3]
    for trial, name in zip(trials, 4 * names[:1] + 4 * names[1:]):
        *lead, last = (plans.TASKS[i] for i in trial.tasks)
        assert last == name
        assert [task.split("_")[0] for task in lead] == (["lift"] if name == "stack_block" else [])
    experts_benchmark.main(args)
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    for name in names:
        assert result["tasks"][name]["attempts"] >= 3
        assert result["tasks"][name]["successes"] >= 3
        assert f"| `{name}` |" in table.read_text()


def test_impossible_expert_runs_are_refused():
    with pytest.raises(ValueError, match="fly"):
        experts_benchmark.Args(tasks=("fly",))
    with pytest.raises(ValueError, match="tables=0"):
        experts_benchmark.Args(tables=0)
