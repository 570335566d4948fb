"""Chains on tables side by side."""

from __future__ import annotations

import time
import types

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax.playtable import demonstrations, env, scene
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.playtable.pictures import tiles


def test_a_chain_begins_on_its_own_table():
    # Tables differ in how far the slider goes and which block is which: laid out on another one it is another start.
    names = ("A", "B", "D")
    every = demonstrations.Scenes(names)
    tables = demonstrations.Tables(DemonstrationConfig(tables=3), every, [1, 2, 0], 0, range(3))
    busy = {table: tables._begin() for table in range(3)}
    assert [names[chain.scene] for chain in busy.values()] == ["B", "D", "A"]
    states = tables._reset(busy, busy)
    found = np.asarray(env.info_batch(env.pick(every.stacked, np.array([1, 2, 0])), states)["scene_obs"])
    for row, chain in zip(found, busy.values(), strict=True):
        asked = scene.initial_obs(chain.condition, names[chain.scene])[1]
        np.testing.assert_allclose(row[[0, 1, 3, 5]], asked[[0, 1, 3, 5]], atol=1e-5)
        np.testing.assert_allclose(row[6:].reshape(3, 6)[:, :2], asked[6:].reshape(3, 6)[:, :2], atol=0.02)


def test_a_table_begins_its_chain_while_another_holds_a_block():
    # No chain begins so; a recording of several tasks in a row comes there after its first lift.
    tables = demonstrations.Tables(DemonstrationConfig(tables=2), demonstrations.Scenes(("A", "B")), [0, 1], 0, [0, 1])
    begins, holds = tables._begin(), tables._begin()
    holds.condition = holds.condition | {"pink_block": "grasped", "grasped": 1}
    states = tables._reset({0: begins, 1: holds}, {0: begins})
    found = np.asarray(env.info_batch(tables._scenes_of({0: begins, 1: holds}), states)["scene_obs"])[0]
    np.testing.assert_allclose(found[:2], scene.initial_obs(begins.condition, "A")[1][:2], atol=1e-5)


def test_a_recording_that_is_over_before_its_programs_are_made_waits_for_them():
    """Fails if the last pictures are made beside `compile`, where the same programs would be compiled twice at once."""
    said = []

    def compile_slowly() -> None:
        time.sleep(0.05)
        said.append("compiled")

    renderer = types.SimpleNamespace(
        scenes=types.SimpleNamespace(stacked=None),
        compile=compile_slowly,
        segments=lambda chains: said.append("drawn") or [(0, [], 1)],
    )
    assert list(demonstrations.rendered([types.SimpleNamespace(demos=[])], renderer)) == [(0, [], 1)]
    assert said == ["compiled", "drawn"]


def test_programs_for_pictures_are_made_ahead_for_what_a_recording_draws(monkeypatch):
    # Fails if a shape or type differs: then they would be compiled once more, by the first pictures.
    every, drawn = demonstrations.Scenes(("A", "B")), []
    tables = demonstrations.Tables(DemonstrationConfig(tables=2), every, [0, 1], 0, [0, 1])
    busy = {table: tables._begin() for table in range(2)}
    states = jax.device_get(tables._reset(busy, busy))
    steps = demonstrations.Steps(states, *np.zeros((2, 2, 15)), *np.zeros((2, 2, 7)))
    busy[0].demos = [demonstrations.Demo("open_drawer", steps)]

    def render_batch(*args):
        drawn.append(jax.tree.map(lambda x: x if isinstance(x, str) else (np.shape(x), np.result_type(x)), args))
        return np.zeros((len(args[1]), args[4], args[4], 3), np.uint8)

    monkeypatch.setattr(env, "render_batch", render_batch)
    renderer = demonstrations.Renderer(every.names, (16, 12))
    renderer.__dict__["_backdrops"] = tiles.Backdrop(*np.zeros((2, 2, 3)))
    renderer.compile()
    renderer.segments([busy[0]])
    assert len(drawn) >= 4 and set(map(str, drawn[2:])) == set(map(str, drawn[:2]))


@given(st.integers(1, 60), st.integers(2, 70), st.integers(0, 100))
def test_few_pictures_are_of_the_beginning_and_evenly_apart_of_all_that_is_learned_from(length, apart, seed):
    """Fails if the first frame has no picture, the last one, which nothing is learned from, has one beside it, or a
    stretch of `apart` learned frames has none."""
    shown = demonstrations.shown_frames(length, apart, np.random.default_rng(seed))
    assert shown[0] == 0 and (shown[1:] < length - 1).all()
    assert (np.diff(shown)[1:] == apart).all() and (np.diff(shown)[:1] <= apart).all()
    assert length - 1 - shown[-1] <= apart
    assert demonstrations.shown_frames(length, 1, None) is None


def test_pictures_are_of_the_frames_that_are_shown(monkeypatch):
    """Fails if frames of another demonstration or another time are rendered, or more of them than are shown."""
    drawn = []

    def pictures(scenes, which, states, sizes, backdrops):
        drawn.append(len(which))
        return {camera: states["time"][:, None, None, None] * np.ones((1, 2, 2, 3)) for camera in sizes}

    monkeypatch.setattr(env, "pictures", pictures)
    renderer = demonstrations.Renderer(("A",), (2, 2))
    renderer.__dict__["_backdrops"] = None
    chain = demonstrations.Chain(7, 0, np.random.default_rng(0), {}, np.zeros(3), attempted=2)
    for first, shown in ((0, np.array([0, 3])), (50, None), (90, np.array([0]))):
        steps = demonstrations.Steps({"time": first + np.arange(5)}, *np.zeros((2, 5, 15)), *np.zeros((2, 5, 7)))
        chain.demos.append(demonstrations.Demo("open_drawer", steps, shown))
    ((number, segments, attempted),) = renderer.segments([chain])
    assert (number, attempted) == (7, 2) and drawn == [8]
    seen = [segment.images["wrist"][:, 0, 0, 0].tolist() for segment in segments]
    assert seen == [[0, 3], [50, 51, 52, 53, 54], [90]]
    assert all(len(segment.arrays["rel_actions"]) == 5 for segment in segments)


def test_what_is_demonstrated_does_not_depend_on_how_much_of_it_is_seen():
    """Fails if which frames get pictures is drawn from the numbers that later tasks, plans and kicks are drawn from."""
    found = []
    for every in (1, 5):
        config = DemonstrationConfig(tables=1, picture_every=every)
        tables = demonstrations.Tables(config, demonstrations.Scenes(("A",)), [0], 0, [0])
        chain = tables._begin()
        done = np.arange(demonstrations.BLOCK * 3) == 20
        steps = demonstrations.Steps(np.arange(30), *np.zeros((2, 30, 15)), np.zeros((30, 7)), done)
        assert tables._book(chain, steps) == 23
        (demo,) = chain.demos
        assert demo.length == 23 and (demo.num_shown == 23 if every == 1 else 4 <= demo.num_shown <= 6)
        found.append((chain.task, chain.condition, chain.rng.integers(2**31)))
    assert found[0] == found[1]


def test_chains_of_which_none_can_begin_are_none(monkeypatch):
    """Fails if a recording whose few chains begin where no task of the list is possible ends in a StopIteration."""
    tables = demonstrations.Tables(DemonstrationConfig(tables=2), demonstrations.Scenes(("A",)), [0], 0, [0, 1])
    monkeypatch.setattr(tables, "_choose", lambda chain: False)
    assert list(tables) == []
