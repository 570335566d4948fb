"""The rollout loop."""

from __future__ import annotations

import numpy as np
import pytest

from robovlms_jax.control.execution import ExecutedBatch, Execution, Separate
from robovlms_jax.control.interface import ActionChunk
from robovlms_jax.envs.vector import EnvError, EnvPool
from robovlms_jax.evaluation import rollout
from robovlms_jax.evaluation.rollout import Films, SuccessCriterion, Trial, run
from tests.evaluation.toy_world import CRITERION, LineEnv, LinePolicy, moved, trial


def test_a_trial_goes_on_until_the_first_failure():
    env = LineEnv()
    (result,) = run(LinePolicy(), EnvPool([env]), [trial(4, 3, 2, 11, 1)], CRITERION)
    assert result.success == (True, True, False)
    assert result.steps == (3, 2, 10)
    assert (result.score, result.index, result.tasks) == (2, 4, ("3", "2", "11", "1"))
    assert env.x == 4 + 3 + 2 + 10  # the scene is not reset between tasks
    assert env.resets == 1


def test_all_tasks_done_ends_the_trial():
    (result,) = run(LinePolicy(), EnvPool([LineEnv()]), [trial(0, 1, 1)], CRITERION)
    assert result.success == (True, True)
    assert result.score == 2


def test_the_policy_forgets_between_tasks_and_hears_each_instruction_once():
    policy = LinePolicy()
    list(run(policy, EnvPool([LineEnv()]), [trial(0, 2, 3)], CRITERION))
    assert policy.resets == [(0, "go 2"), (0, "go 3")]


def test_success_is_measured_from_where_the_task_began():
    # moving by 3 twice needs 6 steps; were it measured from the reset, the second would be done at once
    (result,) = run(LinePolicy(), EnvPool([LineEnv()]), [trial(0, 3, 3)], CRITERION)
    assert result.steps == (3, 3)


@pytest.mark.parametrize(
    ("mode", "calls"), [(Execution("first"), 10), (Execution("chunk"), 3), (Execution("receding", 2), 5)]
)
def test_frames_are_rendered_and_the_policy_asked_only_when_actions_are_used_up(mode, calls):
    env, policy = LineEnv(), LinePolicy(chunk=4)
    (result,) = run(ExecutedBatch(policy, mode), EnvPool([env]), [trial(0, 5, instruction="stay")], CRITERION)
    assert result.steps == (10,)
    assert env.renders == len(policy.calls) == calls


def test_a_new_task_voids_what_was_planned_for_the_old_one():
    policy = LinePolicy(chunk=8)
    first, second = trial(0, 2), trial(0, 1, instruction="stay")
    both = Trial(0, {}, first.tasks + second.tasks, first.instructions + second.instructions)
    (result,) = run(policy, EnvPool([LineEnv()]), [both], CRITERION)
    assert result.success == (True, False)  # six more steps of "go" were planned


def test_many_environments_share_one_policy_call_per_step():
    policy = LinePolicy()
    envs = [LineEnv() for _ in range(3)]
    trials = [trial(index, 1 + index % 4) for index in range(8)]
    results = list(run(policy, EnvPool(envs), trials, CRITERION))
    assert sorted(result.index for result in results) == list(range(8))
    assert {result.index: result.steps for result in results} == {index: (1 + index % 4,) for index in range(8)}
    assert policy.calls[0] == [0, 1, 2]
    assert sum(map(len, policy.calls)) == sum(env.steps for env in envs)
    assert len(policy.calls) < sum(map(len, policy.calls))


def test_any_number_of_environments_gives_the_same_results():
    trials = [trial(index, 1 + index % 5, 12 if index % 3 == 0 else 2) for index in range(11)]
    outcomes = []
    for size in (1, 2, 5, 20):
        found = run(LinePolicy(chunk=2), EnvPool([LineEnv() for _ in range(size)]), trials, CRITERION)
        outcomes.append(sorted(found, key=lambda result: result.index))
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_single_policies_serve_as_a_batch():
    class Single:
        def reset(self, instruction):
            self.chunk = LinePolicy()._chunk(instruction)

        def act(self, observation):
            return self.chunk

    results = list(
        run(Separate([Single(), Single()]), EnvPool([LineEnv(), LineEnv()]), [trial(0, 2), trial(1, 3)], CRITERION)
    )
    assert [result.steps for result in results] == [(2,), (3,)]


def test_a_broken_environment_is_restarted_and_its_trial_repeated_from_the_start():
    broken = LineEnv(fail=lambda env: env.steps == 4)  # once, in the middle of its trial
    sound = LineEnv()
    results = list(run(LinePolicy(), EnvPool([broken, sound]), [trial(0, 2, 5), trial(1, 9), trial(2, 1)], CRITERION))
    by_index = {result.index: result for result in results}
    assert by_index[0].success == (True, True)
    assert by_index[0].steps == (2, 5)
    assert by_index[0].restarts == 1
    assert by_index[1].steps == (9,)
    assert by_index[1].restarts == 0
    assert (broken.restarts, sound.restarts) == (1, 0)


@pytest.mark.parametrize("method", ["reset", "observe"])
def test_an_environment_may_also_break_elsewhere(method, monkeypatch):
    env = LineEnv()
    real, calls = getattr(env, method), []

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("renderer lost")
        return real(*args, **kwargs)

    monkeypatch.setattr(env, method, once)
    results = list(run(LinePolicy(), EnvPool([env]), [trial(0, 2), trial(1, 2)], CRITERION))
    assert [result.success for result in results] == [(True,), (True,)]
    assert sum(result.restarts for result in results) == 1


def test_an_environment_that_keeps_breaking_ends_the_run_by_name():
    env = LineEnv(fail=lambda env: env.x >= 7)
    results = run(LinePolicy(), EnvPool([env]), [trial(0, 1), trial(5, 1, 4)], CRITERION, max_restarts=2)
    assert next(results).index == 0
    expected = r"broke 3 times in trial 5, last at trial 5, task 4 \(2 of 2\), step 1.*the line broke"
    with pytest.raises(EnvError, match=expected):
        list(results)


def test_an_environment_that_does_not_come_back_counts_as_broken_again():
    class Gone(LineEnv):
        def restart(self):
            raise EnvError("no such device")

    env = Gone(fail=lambda env: env.steps >= 2)
    with pytest.raises(EnvError, match="broke 2 times in trial 0"):
        list(run(LinePolicy(), EnvPool([env]), [trial(0, 5)], CRITERION, max_restarts=1))


def bad(actions: np.ndarray) -> LinePolicy:
    class Bad(LinePolicy):
        def act(self, observations, slots):
            good = super().act(observations, slots)
            return good if len(self.calls) < 3 else [ActionChunk(actions)] * len(slots)

    return Bad()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([[0, 0, np.nan, 0, 0, 0, 1.0]]), "action 0 has nan in column 2"),
        (np.array([[0, 0, 0, 0, 0, 0, 1], [0, np.inf, 0, 0, 0, 0, 1]]), "action 1 has inf in column 1"),
        (np.zeros((1, 6)), r"returned shape \(1, 6\), expected \[C, 7\]"),
        (np.zeros((0, 7)), r"returned shape \(0, 7\)"),
        (np.ones(7), r"returned shape \(7,\)"),
        (np.zeros((1, 7)), r"gripper commands \[0.0\] must be exactly -1 .* binarise"),
    ],
)
def test_an_unusable_action_is_named_with_trial_task_and_step(actions, message):
    with pytest.raises(ValueError, match=rf"trial 6, task 5 \(1 of 1\), step 2: the policy.*{message}"):
        list(run(bad(actions), EnvPool([LineEnv()]), [trial(6, 5)], CRITERION))


def test_a_policy_that_fails_says_where():
    class Failing(LinePolicy):
        def act(self, observations, slots):
            raise MemoryError("out of memory")

    with pytest.raises(MemoryError) as caught:
        list(run(Failing(), EnvPool([LineEnv()]), [trial(6, 5)], CRITERION))
    assert "trial 6, task 5 (1 of 1), step 0" in caught.value.__notes__[0]


def test_success_may_be_judged_at_the_last_step_only():
    class Passing(LineEnv):
        """Success while 3 <= x < 6, as info says it."""

        @property
        def info(self):
            return {"success": 3 <= self.x < 6, "partial": {"started": self.x > 0}}

    def judge(starts, nows):
        return [{"through"} if now["success"] else set() for now in nows]

    def outcome(max_steps: int, latched: bool):
        rules = SuccessCriterion(max_steps=max_steps, completed=judge, stop_at_success=latched)
        one = Trial(0, {}, ("through",), ("go",))
        (result,) = run(LinePolicy(), EnvPool([Passing()]), [one], rules)
        return result.success, result.steps, result.partial

    assert outcome(4, False) == ((True,), (4,), {"started": 1.0})
    assert outcome(8, False) == ((False,), (8,), {"started": 1.0})
    assert outcome(8, True) == ((True,), (3,), {"started": 1.0})


def test_an_environment_may_change_the_instruction_under_way():
    class Staged(LineEnv):
        @property
        def info(self):
            return {"x": self.x, "instruction": "go there" if self.x < 2 else "stay there"}

    policy, env = LinePolicy(chunk=5), Staged()
    (result,) = run(policy, EnvPool([env]), [trial(0, 9)], CRITERION)
    assert policy.resets == [(0, "go there"), (0, "stay there")]
    assert env.x == 2  # the rest of the first chunk was dropped
    assert result.success == (False,)


def test_filming_shows_every_third_step_and_the_end():
    env, films = LineEnv(), []
    trials = [trial(0, 4, 9), trial(1, 2)]
    results = list(run(LinePolicy(chunk=5), EnvPool([env]), trials, CRITERION, films=Films([0], films.append, every=3)))
    (film,) = films
    assert [(frame.task, frame.step) for frame in film.frames] == [(0, 0), (0, 3), (1, 0), (1, 3), (1, 6), (1, 9)]
    assert [frame.observation.proprio[0] for frame in film.frames] == [0, 3, 4, 7, 10, 13]
    assert film.frames[2].instruction == "go 9"
    assert film.result == results[0]
    assert film.env == "Line"


def test_filming_does_not_change_the_rollout():
    def play(film):
        envs = EnvPool([LineEnv(), LineEnv()])
        trials, films = [trial(i, 2, 7) for i in range(4)], Films(film, lambda recording: None)
        return list(run(LinePolicy(chunk=3), envs, trials, CRITERION, films=films))

    assert play([]) == play(range(4))


def test_trials_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="trial 3 has 2 tasks and 1 instructions"):
        Trial(3, {}, ("1", "2"), ("go",))
    with pytest.raises(ValueError, match="max_steps=0"):
        SuccessCriterion(max_steps=0, completed=moved)
    assert list(rollout.run(LinePolicy(), EnvPool([LineEnv()]), [], CRITERION)) == []
