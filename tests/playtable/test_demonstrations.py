"""Chains on tables side by side."""

from __future__ import annotations

import time
import types

import jax
import numpy as np

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
