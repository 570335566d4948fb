"""What is recorded of the experts in the real simulator. A made-up simulator stands in for it; the slow test at the end
plays in a real checkout where there is one."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from experiments import convert_data, pack_calvin
from robovlms_jax.control.interface import ActionChunk
from robovlms_jax.data import calvin, cutting, language, represented, samples
from robovlms_jax.envs import process
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks, walking
from robovlms_jax.playtable import splits
from robovlms_jax.playtable.real import experts, leading, recording
from tests.envs.calvin import fake_stage


@pytest.fixture
def fake(checkout, monkeypatch):
    """Simulators that are made up, and experts that pull the fake's drawer; the list of those that were started."""
    started: list[fake_stage.FakeProcess] = []

    def start(config, scene):
        started.append(fake_stage.FakeProcess())
        return started[-1]

    far = walking.Plan(np.tile([0.0, -0.4, 0.55], (2, 1)), np.zeros((2, 3)), -np.ones(2), np.zeros(2, int), np.ones(2))
    monkeypatch.setattr(recording, "_start", start)
    monkeypatch.setattr(experts, "plan", lambda geometry, situation, task, seed: far)
    for scene in "ABC":
        path = checkout / "conf" / "scene"
        shutil.copy(path / "calvin_scene_D.yaml", path / f"calvin_scene_{scene}.yaml")
    return started


def config(checkout, out, **changes):
    changes = {"episodes": 4, "validation_episodes": 2, "chain_length": 1, "tasks": ("open_drawer",)} | changes
    return recording.RealRecordConfig(calvin_root=str(checkout), out=str(out), **changes)


def test_a_recording_is_read_and_packed_as_calvins_own_data_are(checkout, fake, tmp_path):
    out = tmp_path / "recorded"
    counts = recording.record(config(checkout, out, start_spread=0.1, disturbance=0.3))
    assert counts["attempted"] == counts["recorded"] == 6 and all(each.closed for each in fake)
    dataset = calvin.open_dataset(out, "training")
    assert {(e.task, e.instruction) for e in dataset.episodes} <= {
        ("open_drawer", text) for text in tasks.TASKS["open_drawer"].phrasings
    }
    first = dataset.episodes[0]
    frames = np.arange(first.start, first.end + 1)
    drawer = dataset.array("scene_obs", frames)[:, 1]
    assert drawer[0] < 0.12 < drawer[-1] and np.abs(dataset.actions(frames)).max() <= 1.0
    assert dataset.images(frames[:1], ("static", "wrist"))["static"].shape == (1, 200, 200, 3)
    pack_calvin.main(pack_calvin.Args((out,), tmp_path / "packed", workers=1))
    packed = calvin.open_dataset(tmp_path / "packed", "training")
    assert [e.instruction for e in packed.episodes] == [e.instruction for e in dataset.episodes]


def test_with_pictures_of_few_frames_training_sees_these_and_all_actions_that_follow(checkout, fake, tmp_path):
    """Fails if a picture is another frame's, a window begins where there is none, a chunk is cut short where pictures
    are missing, the beginning of a task has no picture, or validation loses any."""
    with pytest.raises(ValueError, match=r"picture_every=5 leaves frames without pictures.*add --pack"):
        config(checkout, tmp_path / "npz", picture_every=5)
    recording.record(config(checkout, tmp_path / "all", pack=True))
    every = calvin.open_dataset(tmp_path / "all", "training")
    out = tmp_path / "few"
    recording.record(config(checkout, out, pack=True, picture_every=5))
    few = calvin.open_dataset(out, "training")
    assert every.shows_all and not few.shows_all
    assert calvin.open_dataset(out, "validation").shows_all
    assert few.episodes == every.episodes
    windows = []
    for episode in few.episodes:
        frames = np.arange(episode.start, episode.end + 1)
        shown = few.shown(frames)
        places = np.flatnonzero(shown)
        assert places[0] == 0 and set(np.diff(places)[1:]) == {5} and places[1] <= 5 and places[-1] >= len(frames) - 6
        pictures = few.images(frames[shown], ("static",))["static"][:, 0, 0, 0]
        drawer = few.array("scene_obs", frames[shown])[:, 1]
        assert np.abs(pictures - 1000 * drawer).max() < 3
        windows += frames[:-1][shown[:-1]].tolist()
    sources = [_source(dataset) for dataset in (few, every)]
    assert len(sources[0]) == len(_source(represented.represented(few, "absolute"))) == len(windows)
    at = {int(sources[1].segments[index].step_ids[0]): index for index in range(len(sources[1]))}
    for index, frame in enumerate(windows):
        mine, full = sources[0][index], sources[1][at[frame]]
        np.testing.assert_array_equal(mine.actions, full.actions)
        np.testing.assert_array_equal(mine.action_mask, full.action_mask)
        np.testing.assert_array_equal(mine.inputs.images["wrist"], full.inputs.images["wrist"])
    with pytest.raises(ValueError, match=r"few.training has frames without pictures: .*set policy\.window=1"):
        _source(few, window=2)
    with pytest.raises(ValueError, match=r"set data\.windows_per_segment=1"):
        _source(few, windows_per_segment=4)
    with pytest.raises(ValueError, match=r"policy\.auxiliary\.forward predicts those that follow"):
        _source(few, future_frames=3)
    with pytest.raises(ValueError, match=r"begun with other settings .*picture_every"):
        recording.record(config(checkout, out, pack=True, picture_every=6))
    joined = tmp_path / "joined"
    pack_calvin.main(pack_calvin.Args((out, tmp_path / "all"), joined, workers=1))
    both = calvin.open_dataset(joined, "training")
    expected = np.concatenate([dataset.shown(dataset.frame_ids) for dataset in (few, every)])
    np.testing.assert_array_equal(both.shown(both.frame_ids), expected)
    with pytest.raises(ValueError, match=r"pictures of some frames alone .*for which RLDS has no place"):
        convert_data.main(convert_data.Args("calvin", out, tmp_path / "rlds"))
    with pytest.raises(ValueError, match=r"frames without pictures.*keep how they are: jpeg of quality 95"):
        pack_calvin.main(pack_calvin.Args((out, tmp_path / "all"), tmp_path / "png", codec="png", workers=1))


def _source(dataset, window=1, windows_per_segment=1, future_frames=0):
    cut = cutting.Cut(window, 4, windows_per_segment, future_frames=future_frames)
    encode = lambda text: (np.zeros(3, np.int32), np.ones(3, bool))  # noqa: E731
    return samples.SegmentSource(dataset, cut, cameras=("static", "wrist"), encode_text=encode)


def test_demonstrations_are_annotated_in_calvins_own_sentences_where_the_checkout_has_them(checkout, fake, tmp_path):
    folder = checkout / "calvin_models" / "conf" / "annotations"
    folder.mkdir(parents=True)
    for name, words in (("new_playtable", "[do {0}, now do {0}]"), ("new_playtable_validation", "[please {0}]")):
        (folder / f"{name}.yaml").write_text("\n".join(f"{task}: {words.format(task)}" for task in tasks.TASKS))
    recording.record(config(checkout, tmp_path / "recorded"))
    texts = {
        split: {episode.instruction for episode in calvin.open_dataset(tmp_path / "recorded", split).episodes}
        for split in ("training", "validation")
    }
    assert texts == {"training": {"do open_drawer", "now do open_drawer"}, "validation": {"please open_drawer"}}
    words = language.read(str(tmp_path / "recorded" / "paraphrases.json"))
    assert words.sentences["now do open_drawer"] == tasks.TASKS["open_drawer"].phrasings
    assert set(words.never) == {f"please {task}" for task in tasks.TASKS}


def test_a_stopped_recording_goes_on_and_other_settings_are_refused(checkout, fake, tmp_path, monkeypatch):
    out, rendered = tmp_path / "recorded", recording._rendered
    calls = iter(range(100))

    def stop(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return rendered(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "_rendered", stop)
        with pytest.raises(KeyboardInterrupt):
            recording.record(config(checkout, out, processes=1))
    assert recording.record(config(checkout, out, processes=1))["recorded"] == 6
    assert len(calvin.open_dataset(out, "training").episodes) == 4
    with pytest.raises(ValueError, match="begun with other settings"):
        recording.record(config(checkout, out, start_spread=0.1))


def test_a_simulator_that_dies_is_started_again_and_one_that_keeps_dying_ends_the_recording(
    checkout, fake, tmp_path, monkeypatch
):
    healthy, deaths = fake_stage.FakeProcess.send, iter([True, False] + [True] * 9)

    def send(env, method, *args):
        if method == "play" and next(deaths):
            raise process.EnvError("the process died during play")
        healthy(env, method, *args)

    asked = config(checkout, tmp_path / "recorded", processes=1, scenes=("A",))
    with monkeypatch.context() as patch:
        patch.setattr(fake_stage.FakeProcess, "send", send)
        with pytest.raises(process.EnvError, match="died during play"):
            recording.record(asked)
    journal = tmp_path / "recorded" / "journal" / "training" / "recording.jsonl"
    assert len(journal.read_text().splitlines()) == 2 and len(fake) >= 4  # the settings, and the first chain
    assert recording.record(asked)["recorded"] == 6


def test_a_task_is_planned_again_while_a_block_still_moves(checkout, fake, tmp_path, monkeypatch):
    planned = []
    far = experts.plan(None, None, "open_drawer", 0)

    def plan(geometry, situation, task, seed):
        planned.append(situation["block_velocity"][0, 0])
        return far

    monkeypatch.setattr(experts, "plan", plan)
    asked = config(checkout, tmp_path, scenes=("D",), processes=1)
    with recording.stages(asked, ["D"]) as every:
        now = every.with_stage("D", lambda env: fake_begin(env, falling=1))
        played, _ = every.with_stage(
            "D", lambda env: every.attempt(env, "D", now, "open_drawer", np.random.default_rng(0))
        )
    assert planned == [1.0, 0.0] and played.done  # fell at first, lay still the second time
    assert len(played.wanted) == len(played.bodies) == played.steps > 12


def test_chains_with_resampled_blocks_begin_elsewhere_than_the_benchmarks_evaluation(
    checkout, fake, tmp_path, monkeypatch
):
    begun, send = [], fake_stage.FakeProcess.send

    def listen(env, method, *args):
        begun.extend([args[1]] if method == "begin" else [])
        send(env, method, *args)

    monkeypatch.setattr(fake_stage.FakeProcess, "send", listen)
    official = [initial_states.initial_state(condition, "D")[1] for condition in task_chains.initial_conditions()]
    for resample in (False, True):
        begun.clear()
        asked = config(checkout, tmp_path / str(resample), scenes=("D",), resample_blocks=resample)
        recording.record(asked)
        evaluated = [any(np.array_equal(start, state) for state in official) for start in begun]
        assert len(begun) == 6 and all(evaluated) == (not resample) and any(evaluated) == (not resample)
    with pytest.raises(ValueError, match="begun with other settings"):
        recording.record(config(checkout, tmp_path / "True", scenes=("D",)))


class Pulls:
    """A policy of two slots that moves the made-up hand by so many metres a step towards where the drawer is pulled;
    three actions for each look."""

    def __init__(self, metres: float):
        self.metres, self.told, self.looks = metres, [], 0

    def reset(self, slots, instructions):
        self.told += zip(slots, instructions, strict=True)

    def act(self, observations, slots):
        assert len(observations) == len(slots) == 1 and observations[0].images["static"].shape == (200, 200, 3)
        self.looks += 1
        return [ActionChunk(np.tile([0.0, -self.metres / 0.02, 0.0, 0.0, 0.0, 0.0, -1.0], (3, 1)))]


def test_an_expert_takes_over_where_a_policy_has_got_to(checkout, fake, tmp_path):
    """10 to 20 steps of 3 mm, where the drawer counts as open after 12 cm."""
    policy, out = Pulls(0.003), tmp_path / "led"
    leader = leading.Leader(lambda: policy, slots=2, steps=20, label="this one")
    asked = config(checkout, out, checkpoint="runs/this", policy_steps=20, scenes=("D",))
    with pytest.raises(ValueError, match="no policy was made of checkpoint=runs/this"):
        recording.record(asked)
    counts = recording.record(asked, leader)
    assert (leader.asked, leader.done) == (6, 0)
    assert counts["recorded"] == counts["attempted"] == 6
    assert {slot for slot, _ in policy.told} <= {0, 1} and len(policy.told) == 6
    told = {text for _, text in policy.told}
    own = [set(splits.own_sentences(held_out=held_out)["open_drawer"]) for held_out in (False, True)]
    assert told <= own[0] | own[1] and told & own[0] and told & own[1]
    assert 6 * 4 <= policy.looks <= 6 * 7  # three steps for each look
    dataset = calvin.open_dataset(out, "training")
    begun = [dataset.array("robot_obs", np.array([e.start]))[0, 1] for e in dataset.episodes]
    rest = initial_states.INITIAL_ROBOT_OBS[1]
    assert all(rest - 0.0601 <= y <= rest - 0.0299 for y in begun) and len(set(begun)) > 1
    with pytest.raises(ValueError, match="begun with other settings"):
        recording.record(asked, leading.Leader(lambda: policy, slots=2, steps=20, label="another"))


def test_what_a_policy_does_itself_is_not_recorded(checkout, fake, tmp_path):
    leader = leading.Leader(lambda: Pulls(0.02), slots=2, steps=60, label="good")
    asked = config(checkout, tmp_path / "led", checkpoint="runs/good")
    with pytest.raises(RuntimeError, match="training: the policy did every task"):
        recording.record(asked, leader)
    assert leader.asked == leader.done == 4


def test_a_policy_that_fails_and_a_simulator_that_dies_meanwhile(checkout, fake, tmp_path, monkeypatch):
    def fails(observations, slots):
        raise ValueError("actions are not finite")

    policy, asked = Pulls(0.003), config(checkout, tmp_path / "led", checkpoint="runs/this", processes=1)
    leader = leading.Leader(lambda: policy, slots=1, steps=20, label="this one")
    with monkeypatch.context() as patch:
        patch.setattr(policy, "act", fails)
        with pytest.raises(RuntimeError, match="the policy failed at open_drawer: actions are not finite"):
            recording.record(asked, leader)
    healthy, deaths = fake_stage.FakeProcess.send, iter([True, False, False, True] + [False] * 1000)

    def send(env, method, *args):
        if method == "observe" and next(deaths):
            raise process.EnvError("the process died during observe")
        healthy(env, method, *args)

    monkeypatch.setattr(fake_stage.FakeProcess, "send", send)
    assert recording.record(asked, leader)["recorded"] == 6  # its slot was given back


def fake_begin(env, *, falling):
    now = recording.ask(env, "begin", fake_stage.ROBOT_OBS, fake_stage.SCENE_OBS, np.zeros(3))
    return {**now, "block_velocity": np.full((3, 6), float(falling))}


def test_settings_that_cannot_work_are_refused(checkout, tmp_path):
    for changes, message in (
        ({"scenes": ("A", "E")}, "unknown scenes \\['E'\\]"),
        ({"scenes": ()}, "scenes is empty"),
        ({"tasks": ("open_door",)}, "tasks has unknown \\['open_door'\\]"),
        ({"tasks": ("place_in_slider",), "chain_length": 1}, "tasks: none of place_in_slider is possible"),
        ({"processes": 0}, "processes=0 must be at least 1"),
        ({"start_spread": 1.0}, "start_spread=1.0 must lie in"),
        ({"policy_steps": 0, "checkpoint": "run"}, "policy_steps=0 must be at least 1"),
        ({"policy_steps": 60}, "policy_steps is about a policy that acts first; name its checkpoint"),
        ({"weights": "int8"}, "weights is about a policy that acts first"),
    ):
        with pytest.raises(ValueError, match=message):
            config(checkout, tmp_path, **changes)


CALVIN_ROOT = os.environ.get("ROBOVLMS_CALVIN_ROOT", "")
CALVIN_PYTHON = os.environ.get("ROBOVLMS_CALVIN_PYTHON", "")


@pytest.mark.slow
@pytest.mark.skipif(not CALVIN_ROOT, reason="ROBOVLMS_CALVIN_ROOT names no checkout of mees/calvin (docs/calvin.md)")
@pytest.mark.parametrize("scene", "ABCD")
def test_the_real_simulators_fixtures_obey_the_experts_and_are_recorded(scene, tmp_path):
    fixtures = ("open_drawer", "move_slider_left", "turn_on_lightbulb", "turn_off_lightbulb", "turn_on_led")
    python = {"simulator_python": CALVIN_PYTHON} if CALVIN_PYTHON else {}
    asked = config(CALVIN_ROOT, tmp_path / "out", tasks=fixtures, scenes=(scene,), validation_scene=scene, **python)
    counts = recording.record(asked)
    assert counts["recorded"] == counts["attempted"] == 6
    dataset = calvin.open_dataset(tmp_path / "out", "training")
    pictures = dataset.images(np.array([0, dataset.episodes[0].end]), ("static", "wrist"))
    assert all(picture.std() > 20 for camera in pictures.values() for picture in camera)
