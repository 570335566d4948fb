"""Rollouts that are kept, parts of them, and what a simulated person says of these."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from robovlms_jax import schema
from robovlms_jax.demo import twin
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable.scene import DRAWER, SLIDER, make_scene
from robovlms_jax.rl import progress, segments
from robovlms_jax.rl.segments import Rollouts, Segment
from robovlms_jax.runs import trying
from tests.labeling.made_up import rollouts, states


def test_rollouts_are_read_as_they_were_written_and_a_damaged_file_is_named(tmp_path):
    found = rollouts(success=(1,))
    path = tmp_path / "new" / segments.FILE
    found.save(path)
    again = segments.load(path.parent)
    assert again.tasks == found.tasks and again.scenes == found.scenes and again.instructions == found.instructions
    np.testing.assert_array_equal(again.success, found.success)
    jax.tree.map(np.testing.assert_array_equal, again.states, found.states)
    before = segments.identity(path)
    rollouts(success=(2,)).save(path)
    assert segments.identity(path) != before
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"rollouts.npz is no file of rollouts"):
        segments.load(path)
    with pytest.raises(FileNotFoundError, match=r"experiments\.label"):
        segments.load(tmp_path)
    for wrong in ({"success": found.success[1:]}, {"offsets": found.offsets[::-1]}, {"offsets": found.offsets + 1}):
        dataclasses.replace(found, **wrong).save(path)
        with pytest.raises(ValueError, match="states that do not fit"):
            segments.load(path)


def test_segments_end_where_a_rollout_is_decided_and_hold_one_state_more_than_steps():
    found = rollouts((12, 7), ("open_drawer",) * 2)
    assert found.segments(5, 5) == [Segment(0, 7), Segment(0, 2), Segment(1, 2)]
    cut = found.states_of(Segment(1, 2), 5)
    np.testing.assert_allclose(cut.position[:, 0], 0.01 * np.arange(2, 8), rtol=1e-5)
    assert len(found.states_of(Segment(0, 2), 10, every=5).led) == 3
    assert found.segments(13, 5) == []
    assert found.has(Segment(1, 2), 5) and not found.has(Segment(1, 3), 5)
    assert not found.has(Segment(2, 0), 5) and not found.has(Segment(-1, 0), 5) and not found.has(Segment(0, -1), 5)


def test_impossible_rollouts_are_refused():
    for field, value in (("count", 0), ("spread", -0.1), ("seed", -1), ("image_size", (0, 9))):
        with pytest.raises(ValueError, match=f"record.{field}="):
            trying.TryingConfig(**{field: value})


def test_rollouts_that_were_made_otherwise_than_is_asked_are_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trying.checkpoints, "locate", lambda path: path)
    monkeypatch.setattr(trying.seals, "identity", lambda path: types.SimpleNamespace(label=f"{path}-1"))
    made = {**schema.to_dict(trying.TryingConfig(count=8, horizon=5)), "checkpoint": "RUN-1"}
    path = tmp_path / segments.FILE
    dataclasses.replace(rollouts(), made=json.dumps(made)).save(path)
    found = segments.load(path)
    for checkpoint, asked in (("", {}), ("RUN", {"count": 8}), ("", {"horizon": 5})):
        trying.require_asked_for(found, path, checkpoint, trying.TryingConfig(**asked))
    for checkpoint, asked, message in (
        ("OTHER", {}, "checkpoint: 'RUN-1' there, 'OTHER-1' here"),
        ("", {"count": 99}, "count: 8 there, 99 here"),
        ("", {"tasks": ("open_drawer",)}, "tasks: .. there, .'open_drawer'. here"),
    ):
        with pytest.raises(ValueError, match=message):
            trying.require_asked_for(found, path, checkpoint, trying.TryingConfig(**asked))
    trying.require_asked_for(rollouts(), path, "", trying.TryingConfig(count=9))
    assert "does not say how its rollouts were made; count not compared" in caplog.text


def test_a_simulated_person_prefers_what_comes_nearer_moves_the_drawer_and_opens_it():
    """Three rollouts at table A's drawer: away from the handle, towards it, and pulling it open."""
    handle = np.asarray(make_scene("A").anchors.drawer_handle)
    far, near = (handle + np.array([0.0, 0.0, height]) for height in (0.3, 0.1))
    paths = [np.linspace(near, far, 6), np.linspace(far, near, 6), np.linspace(near, near, 6)]
    opened = np.zeros((18, 4))
    opened[12:, DRAWER] = np.linspace(0, 0.2, 6)
    parts = np.concatenate(paths)
    axis = np.asarray(make_scene("A").joint_axis[DRAWER])
    parts[12:] += opened[12:, DRAWER, None] * axis  # the hand goes with the handle
    success = np.array([False, False, True])
    found = Rollouts(
        ("A",) * 3, ("open_drawer",) * 3, ("open it",) * 3, success, np.array([0, 6, 12, 18]), states(parts, opened)
    )
    worth = progress.advance(found, [Segment(i, 0) for i in range(3)], 5)
    np.testing.assert_allclose(worth, [-0.2 / 0.3, 0.2 / 0.3, 0.2 / 0.22 + 2], atol=0.02)
    earlier = progress.advance(found, [Segment(2, 0)], 4)[0]
    np.testing.assert_allclose(earlier, 0.16 / 0.22, atol=0.02)  # it was not open yet
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(progress.answers(worth, worth[[1, 0, 2]], 0.0, rng), [0, 1, 0.5])
    turned = progress.answers(np.ones(4000), np.zeros(4000), 0.1, rng)
    np.testing.assert_allclose(turned.mean(), 0.9, atol=0.02)
    read = progress.frames(found, [Segment(2, 0)], 4, 2)
    assert read.shape == (1, 2, 60)
    np.testing.assert_allclose(read[0, :, 7 + 7 + DRAWER], 0.08, atol=1e-6)  # how far the drawer moved in each


@pytest.mark.parametrize("tables", [("A", "C"), ("random-1", "A")])
def test_a_simulated_person_finds_half_of_a_doors_way_worth_as_much_on_every_table(tables):
    """The hand goes with the handle, so that only the door counts."""
    moved, paths, ranges = np.zeros((12, 4)), [], [float(make_scene(name).joint_range[SLIDER]) for name in tables]
    assert ranges[0] != ranges[1]
    for number, (name, way) in enumerate(zip(tables, ranges)):
        moved[6 * number :][:6, SLIDER] = np.linspace(0, way / 2, 6)
        scene = make_scene(name)
        paths.append(scene.anchors.slider_handle + moved[6 * number :][:6, SLIDER, None] * scene.joint_axis[SLIDER])
    found = Rollouts(
        tables, ("move_slider_left",) * 2, ("x",) * 2, np.zeros(2, bool), np.array([0, 6, 12]),
        states(np.concatenate(paths), moved),
    )  # fmt: skip
    worth = progress.advance(found, [Segment(0, 0), Segment(1, 0)], 5)
    np.testing.assert_allclose(worth, [0.5, 0.5], atol=1e-5)


def test_tasks_that_the_simulated_person_cannot_judge_are_named():
    found = rollouts((6, 6), ("open_drawer", "lift_red_block_table"))
    with pytest.raises(ValueError, match=r"have \['lift_red_block_table'\], too. Ask a person"):
        progress.advance(found, [Segment(0, 0), Segment(1, 0)], 5)


@pytest.mark.slow
def test_recorded_rollouts_are_those_that_the_checker_judged():
    how = trying.TryingConfig(tasks=("turn_on_led", "open_drawer"), count=6, tables=4, max_steps=90)
    found = trying.record(twin.DIRECTORY, how)
    assert found.scenes == ("A", "B", "C") * 2 and found.success.any()
    for number in range(6):
        steps = found.steps(number)
        assert found.success[number] or steps == 90
        ends = found.states_of(Segment(number, 0), steps, every=steps)
        lit, drawer = ends.led, ends.mechanisms[:, DRAWER]
        done = lit[1] > lit[0] if found.tasks[number] == "turn_on_led" else drawer[1] - drawer[0] > tasks._DRAWER_M
        assert done == found.success[number]
        path = found.states_of(Segment(number, 0), steps).position
        moves = np.linalg.norm(np.diff(path, axis=0), axis=1)
        # A step is at most 2 cm along each axis: none is missing, and none comes twice.
        assert moves.max() < 0.035 and (moves > 0).mean() > 0.9
