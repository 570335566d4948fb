from __future__ import annotations

import jax
import numpy as np
import pytest

from robovlms_jax.envs import looks
from robovlms_jax.envs.calvin import initial_states, task_chains
from robovlms_jax.playtable import appearance, env
from robovlms_jax.playtable.pictures import render
from robovlms_jax.playtable.scene import SCENES, make_scene

SIZES = {"static": 40, "wrist": 24}


@pytest.fixture(scope="module")
def start():
    robot_obs, scene_obs = initial_states.initial_state(task_chains.initial_conditions()[5])
    return {"robot_obs": robot_obs, "scene_obs": scene_obs}


def seen(tables, starts):
    slots = range(len(starts))
    infos = tables.reset(slots, starts)
    return [seen.images for seen in tables.observe(slots)], infos


def test_a_look_changes_pictures_and_the_usual_one_nothing():
    """The fixed parts, which compile fast; see the slow test."""
    drawn = jax.jit(lambda scene: render.backdrop(scene, SIZES["static"]).color)

    def draw(scene):
        return np.asarray(drawn(scene)).view(np.uint8).astype(int)

    plain = draw(make_scene("D"))
    changed = {}
    for kind in (None, *looks.KINDS):
        look = looks.draw(kind, 0, (0.0, 0.35), appearance.button_x_m("D")) if kind else looks.Look()
        changed[kind] = np.abs(draw(appearance.looking("D", look)) - plain).mean()
    assert changed.pop(None) == 0
    assert changed.pop("distractors") > 0.1
    assert min(changed.values()) > 3


@pytest.mark.slow
def test_a_look_changes_pictures_alone_in_tables_side_by_side(start):
    drawn = [looks.draw(kind, 0, (0.0, 0.35), appearance.button_x_m("D")) for kind in looks.KINDS]
    tables = env.PlayTables("D", 5, image_sizes=SIZES, known_looks=[looks.Look(), *drawn])
    (plain,), (usual,) = seen(env.PlayTables("D", 1, image_sizes=SIZES), [start])
    images, infos = seen(tables, [start] + [{**start, "look": look} for look in drawn])
    for camera in SIZES:
        np.testing.assert_array_equal(images[0][camera], plain[camera])
    for kind, image, info in zip(looks.KINDS, images[1:], infos[1:]):
        changed = np.abs(image["static"].astype(int) - plain["static"]).mean()
        assert changed > (0.1 if kind == "distractors" else 5), kind
        same_wrist = np.array_equal(image["wrist"], plain["wrist"])
        assert same_wrist if kind == "camera" else kind == "distractors" or not same_wrist
        for name in usual:
            np.testing.assert_array_equal(info[name], usual[name])
    again, _ = seen(tables, [start] * 2)  # the next trial in this place looks as usual
    np.testing.assert_array_equal(again[1]["static"], plain["static"])


def test_a_look_that_tables_were_not_made_with_is_refused(start):
    tables = env.PlayTables("D", 1, image_sizes=SIZES)
    with pytest.raises(ValueError, match="none of the 0 that these tables were made with"):
        tables.reset([0], [{**start, "look": looks.Look()}])
    with pytest.raises(ValueError, match="known_looks are of one scene, and scenes names 2: A, B"):
        env.PlayTables(["A", "B"], known_looks=[looks.Look()])


@pytest.mark.parametrize("name", SCENES)
def test_training_places_blocks_where_resampling_does(name):
    area = np.asarray(make_scene(name).anchors.area)
    np.testing.assert_allclose(area, [initial_states.SCENES[name].table_x_m, initial_states.TABLE_Y_M], rtol=1e-6)
