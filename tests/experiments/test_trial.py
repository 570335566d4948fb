"""The operator's form, with PlayTable as the robot and somebody who types what is written here."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from experiments import trial
from robovlms_jax.control.execution import Execution
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.control.retrying import Retry
from robovlms_jax.control.robot import CALVIN, end_effector
from robovlms_jax.evaluation import blind
from robovlms_jax.playtable.env import PlayTable

for package in ("av", "pyarrow"):
    pytest.importorskip(package, reason="recordings need the extra `lerobot`")


class Moving:
    """Moves along x by its own step; the hand is open."""

    def __init__(self, step):
        self.step = step

    def reset(self, instruction):
        self.instruction = instruction

    def act(self, observation):
        return ActionChunk(np.tile(np.float32([self.step, 0, 0, 0, 0, 0, 1]), (2, 1)))


class Broken(Moving):
    def act(self, observation):
        raise ValueError("no camera")


def typed(*answers):
    """An operator; a second after the last answer the power fails."""
    left = list(answers)

    def ask(question):
        if not left:
            raise SystemExit("power failure")
        return left.pop(0)

    return ask


class Toy:
    """A robot without a world; PlayTable compiles for longer than all these tests run."""

    def reset(self):
        self.state = np.zeros(7, np.float32)

    def observe(self):
        images = {"static": np.full((32, 32, 3), 90, np.uint8), "wrist": np.full((16, 15, 3), 30, np.uint8)}
        return Observation(images, self.state)

    def step(self, action):
        self.state = self.state + action


@pytest.fixture(params=["toy", pytest.param("playtable", marks=pytest.mark.slow)], scope="module")
def robot(request):
    return Toy() if request.param == "toy" else PlayTable(image_sizes={"static": 32, "wrist": 16})


def session(out, robot, answers, said=None, policies=None, **changes):
    config = trial.TrialConfig(
        **{
            **{"checkpoints": ("a", "b"), "out": str(out), "instructions": ("open the drawer",), "max_steps": 3},
            **{"settings": ("seen",), "rollouts": 2, **changes},
        }
    )
    say = [].append if said is None else said.append
    policies = policies or (Moving(0.5), Moving(-0.5))
    return trial.Session(config, robot, policies, CALVIN, ask=typed(*answers), say=say)


def test_a_session_goes_on_after_a_power_failure_and_its_recording_opens(tmp_path, robot):
    from robovlms_jax.data.lerobot import dataset

    said = []
    with pytest.raises(SystemExit):  # in the second rollout, before its answer
        session(tmp_path, robot, ["maybe", "g", "y", "fine", "g"], said).run()
    assert any("'maybe' is none of g, q" in line for line in said)
    assert not any(word in line for line in said for word in (" a,", " b,", "policy 0", "policy 1"))
    # Void once, then: no, yes, and goodbye before the last one.
    assert not session(tmp_path, robot, ["g", "v", "g", "n", "", "g", "y", "", "q"], said).run()
    stopped = session(tmp_path, robot, ["g", "n", ""])
    assert [x.number for x in stopped.left] == [3] and "1 of 4 rollouts are left" in stopped.report()
    assert stopped.run()

    answers = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [(x["rollout"], x["episode"], x["success"]) for x in answers] == [
        (0, 0, True),
        (1, 1, False),
        (2, 2, True),
        (3, 3, False),
    ]
    assert all("policy" not in answer for answer in answers)
    parquet = pytest.importorskip("pyarrow.parquet")
    index = json.loads(parquet.read_schema(tmp_path / "dataset/meta/tasks.parquet").metadata[b"pandas"])
    assert index["index_columns"] == ["task"]  # LeRobot 0.4.4's own reader needs it, and the columns' types
    assert {column["field_name"] for column in index["columns"]} == {"task", "task_index"}
    found = dataset.open_dataset(tmp_path / "dataset", "training", success_only=False)
    assert [(x.end - x.start, x.instruction) for x in found.episodes] == [(3, "open the drawer")] * len(found.episodes)
    moved = [found.actions([span.start])[0][0] for span in found.episodes]
    order = [(0.5, -0.5)[x.policy] for x in stopped.rollouts]
    np.testing.assert_allclose(moved, order[: len(moved)])
    assert found.images([0], ["static"])["static"].shape == (1, 32, 32, 3)
    assert len(dataset.open_dataset(tmp_path / "dataset", "training").episodes) < len(found.episodes)
    assert "both solved 0" in stopped.report() and "| seen | " in stopped.report()
    with pytest.raises(ValueError, match=r"another session's \(max_steps: 3 there, 9 now\); name another --out"):
        session(tmp_path, robot, [], max_steps=9)


def test_a_session_begun_before_policies_tried_again_goes_on(tmp_path, robot):
    assert not session(tmp_path, robot, ["q"]).run()
    path = tmp_path / "session.json"
    known = json.loads(path.read_text())
    del known["execution"]["retry"]
    path.write_text(json.dumps(known))
    assert not session(tmp_path, robot, ["q"]).run()
    with pytest.raises(ValueError, match=r"another session's \(execution: .*'after': 0.*'after': 9"):
        session(tmp_path, robot, [], execution=Execution("first", retry=Retry(after=9)))


def test_a_robot_whose_hand_cannot_be_moved_ends_it_before_policies_are_read(monkeypatch, tmp_path):
    policy = types.SimpleNamespace(robot=end_effector("nameless", "ticks"))
    monkeypatch.setattr(trial, "load_config", lambda path: types.SimpleNamespace(policy=policy))
    monkeypatch.setattr(trial, "load_policy", lambda path: pytest.fail("read"))
    monkeypatch.setattr(trial.logs, "to_stderr", lambda **_: None)
    asked = ["--checkpoints", "x", "--out", str(tmp_path), "--instructions", "go", "--execution.retry.after", "9"]
    monkeypatch.setattr(trial.sys, "argv", ["trial", *asked])
    with pytest.raises(SystemExit, match="error: dimension 'x' has unit 'ticks'"):
        trial.main()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rollout_that_breaks_off_does_not_count_and_is_asked_again(tmp_path, robot):
    said = []
    assert not session(tmp_path, robot, ["g", "q"], said, policies=(Broken(0), Broken(0))).run()
    assert any("broke off: ValueError: no camera" in line for line in said)
    assert not (tmp_path / "trials.jsonl").exists()


@pytest.mark.parametrize("kind", [TypeError, KeyError, AttributeError, AssertionError, ZeroDivisionError])
def test_whatever_a_robot_raises_makes_the_rollout_void_and_is_kept(kind, tmp_path):
    class Failing(Toy):
        fails = True

        def step(self, action):
            if self.fails:
                self.fails = False
                raise kind("the bus is silent")
            super().step(action)

    assert not session(tmp_path, Failing(), ["g", "g", "v", "g", "y", "", "q"]).run()
    failed, void = lines(tmp_path / "voids.jsonl")
    assert failed["rollout"] == 0 and kind.__name__ in failed["reason"] and "the bus is silent" in failed["traceback"]
    assert void == {"rollout": 0, "reason": "by the operator", "traceback": ""}
    assert [line["rollout"] for line in lines(tmp_path / "trials.jsonl")] == [0]


def test_a_robot_that_reuses_its_buffers_and_scales_actions_in_place_is_recorded_as_it_was(tmp_path):
    class Reusing:
        def __init__(self):
            self.picture, self.proprio = np.zeros((8, 8, 3), np.uint8), np.zeros(7, np.float32)

        def reset(self):
            self.picture[:], self.proprio[:] = 0, 0

        def observe(self):
            return Observation({"static": self.picture, "wrist": self.picture}, self.proprio)

        def step(self, action):
            self.picture += 50
            self.proprio += 1
            action *= 1000

    one = session(tmp_path, Reusing(), [])
    steps = one._act(one.rollouts[0])
    assert [int(step.images["static"][0, 0, 0]) for step in steps[:3]] == [0, 50, 100]
    assert [float(step.state[0]) for step in steps[:3]] == [0, 1, 2]
    assert all(abs(step.action).max() < 10 for step in steps)


def test_a_rollout_that_cannot_be_recorded_is_void(tmp_path):
    class Blinking(Toy):
        def step(self, action):
            super().step(action)
            self.observe = lambda: Observation({"wrist": np.zeros((16, 15, 3), np.uint8)}, self.state)

    assert not session(tmp_path, Blinking(), ["g", "y", "", "q"]).run()
    assert "cannot be recorded: KeyError: 'static'" in lines(tmp_path / "voids.jsonl")[0]["reason"]
    assert not (tmp_path / "trials.jsonl").exists()


def test_a_damaged_answer_is_asked_again_and_no_recording_is_written_over(tmp_path, caplog):
    from robovlms_jax.data.lerobot import dataset

    policies, path = (Moving(0.5), Moving(0.25)), tmp_path / "trials.jsonl"
    assert not session(tmp_path, Toy(), [*["g", "y", ""] * 3, "q"], policies=policies).run()
    kept = path.read_text().splitlines()
    path.write_text("\n".join([kept[0], kept[1][:20], kept[2], ""]))
    with pytest.raises(ValueError, match=r"trials\.jsonl, line 2 .*Remove the line; its rollout is asked for again"):
        session(tmp_path, Toy(), [])
    path.write_text("\n".join([kept[0], kept[2], ""]))
    again = session(tmp_path, Toy(), ["g", "n", "", "q"], policies=policies)
    assert [rollout.number for rollout in again.left] == [1, 3]
    assert "holds 1 recorded rollouts without an answer" in caplog.text
    again.run()
    assert [(line["rollout"], line["episode"]) for line in lines(path)] == [(0, 0), (2, 2), (1, 3)]
    found = dataset.open_dataset(tmp_path / "dataset", "training", success_only=False)
    moved = [float(found.actions([span.start])[0][0]) for span in found.episodes]
    expected = [(0.5, 0.25)[again.rollouts[number].policy] for number in (0, 1, 2, 1)]
    assert moved == expected[: len(moved)] and len(moved) >= 3
    # The last line removed as well: what was recorded of its rollout stays, too.
    path.write_text(path.read_text().rsplit("\n", 2)[0] + "\n")
    session(tmp_path, Toy(), ["g", "n", "", "q"], policies=policies).run()
    assert lines(path)[-1]["episode"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"success": "no"}, "success is 'no', not of type bool"),
        ({"success": 1}, "success is 1, not of type bool"),
        ({"rollout": True}, "rollout is True, not of type int"),
        ({"rollout": 77}, "rollout 77 is none of this session's 0 to 3"),
        ({"episode": 9}, "episode 9 is none of the 2"),
        ({"rollout": 0}, "an earlier line has rollout 0, too"),
        ({"episode": 0}, "an earlier line has episode 0, too"),
        ({"operator": "me"}, "operator"),
    ],
)
def test_an_answer_that_no_operator_gave_is_refused(change, message, tmp_path):
    session(tmp_path, Toy(), [*["g", "y", ""] * 2, "q"]).run()
    first, second = lines(tmp_path / "trials.jsonl")
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, second | change)))
    with pytest.raises(ValueError, match=rf"line 2 is not an operator's answer .*{message}.*Remove the line"):
        session(tmp_path, Toy(), [])


def test_every_policy_acts_once_on_every_scene_in_an_order_that_says_nothing():
    rollouts = blind.schedule(["a", "b"], ["c", "d"], list(blind.SETTINGS), 5, 2, seed=3)
    assert len(rollouts) == 5 * 5 * 2 * 2
    scenes = {}
    for rollout in rollouts:
        scenes.setdefault(rollout.scene, []).append(rollout)
    assert all(
        {x.policy for x in pair} == {0, 1} and pair[0].instruction == pair[1].instruction for pair in scenes.values()
    )
    first = [pair[0].policy for pair in scenes.values()]
    assert 0.2 < np.mean(first) < 0.8
    assert {x.instruction for x in rollouts if x.setting == "instruction"} == {"c", "d"}
    assert rollouts == blind.schedule(["a", "b"], ["c", "d"], list(blind.SETTINGS), 5, 2, seed=3)


def test_pairs_are_compared_by_the_scenes_that_tell_them_apart():
    rollouts = blind.schedule(["a"], [], ["seen"], 8, 2, seed=0)
    # The first policy solves all scenes, the second none but one.
    success = {x.number: x.policy == 0 or x.scene == 7 for x in rollouts}
    found = blind.compare(rollouts, success, 0, 1)
    assert (found.both, found.first, found.second, found.neither) == (1, 7, 0, 0)
    assert found.p == pytest.approx(2 * 0.5**7)
    assert blind.rates(rollouts, success)["seen", 1].successes == 1
    assert blind.compare(rollouts, {}, 0, 1).p == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": ("sunny",)}, "expected some of seen"),
        ({"settings": ("instruction",)}, "reworded has 0 sentences for 1 tasks"),
        ({"instructions": (" ",)}, "no empty sentence"),
        ({"rollouts": 0}, "rollouts=0"),
        ({"max_steps": 0}, "max_steps=0: a rollout needs 1 control step at least"),
        ({"checkpoints": ()}, "checkpoints is empty"),
    ],
)
def test_a_plan_that_is_none_is_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        session(tmp_path, None, [], **change)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "expected MODULE:FUNCTION, or playtable"),
        ("", "expected MODULE:FUNCTION, or playtable"),
        (":f", "expected MODULE:FUNCTION, or playtable"),
        ("json:", "expected MODULE:FUNCTION, or playtable"),
        ("json:nothing", "cannot be imported: AttributeError"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        (".json:f", "cannot be imported: TypeError"),
        ("json:loads", "a function without arguments that returns a robot; called, it raised TypeError"),
        ("builtins:dict", r"returned dict, which has no reset, observe, step\(\)"),
    ],
)
def test_a_robot_that_cannot_be_opened_is_named(name, message):
    with pytest.raises(ValueError, match=f"robot='{name}'.*{message}"):
        trial.open_robot(name)


def test_every_policy_acts_once_before_the_first_rollout_and_nothing_of_that_is_executed(tmp_path):
    class Counting(Moving):
        asked = 0

        def act(self, observation):
            self.asked += 1
            return super().act(observation)

    class Resting(Toy):
        steps = 0

        def step(self, action):
            self.steps += 1
            super().step(action)

    robot, policies = Resting(), (Counting(0.5), Counting(-0.5))
    assert not session(tmp_path, robot, ["g", "y", "", "q"], policies=policies, max_steps=1).run()
    assert sorted(policy.asked for policy in policies) == [1, 2] and robot.steps == 1
