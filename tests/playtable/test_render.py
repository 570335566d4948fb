from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from robovlms_jax.actions import rotations
from robovlms_jax.envs.calvin import initial_states, task_chains, tasks
from robovlms_jax.playtable.pictures import cameras, render
from robovlms_jax.playtable.scene import make_scene
from tests.playtable.conftest import reset

backdrop = jax.jit(render.backdrop, static_argnums=1)
picture = jax.jit(render.render, static_argnums=(2, 3), static_argnames="tiled")
SIZE = 96


def draw(scene, state, camera, size=SIZE, **kwargs):
    return np.asarray(picture(scene, state, camera, size, backdrop(scene, size), **kwargs)).astype(int)


def project(camera, points, size):
    """Where world points float[..., 3] (m) appear: float[..., 3], px to the right, px down, depth in m."""
    local = (points - camera.eye) @ camera.rotation
    slopes = cameras.focal(camera, size) * local[..., :2] / local[..., 2:]
    return jnp.concatenate([size / 2 + slopes, local[..., 2:]], axis=-1)


def mask(image, color):
    """Where the picture shows the red, blue or pink block."""
    red, green, blue = np.moveaxis(image, -1, 0)
    pure = green < 40  # wood is not
    return {
        "red": pure & (red > 130) & (blue < 40),
        "blue": pure & (red < 40) & (blue > 130),
        "pink": pure & (red > 130) & (blue > 130),
    }[color]


def middle(mask):
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5])


def initial(scene, index=0, **changes):
    state = reset(scene, *initial_states.initial_state(task_chains.initial_conditions()[index]))
    return dataclasses.replace(state, **changes)


def test_blocks_appear_where_their_centres_project(scene):
    state = initial(scene)
    image = draw(scene, state, "static", 200)
    view = cameras.camera(state, "static")
    seen = 0
    for color, position in zip(tasks.BLOCKS, state.block_position):
        shown = mask(image, color)
        if shown.sum() > 150:  # not hidden behind door or arm
            np.testing.assert_allclose(middle(shown), project(view, position, 200)[:2], atol=1.5)
            seen += 1
    assert seen


def test_the_static_camera_sees_blocks_where_calvins_does(recordings):
    """Same robot_obs, same scene_obs: block silhouettes in CALVIN's picture and in ours, 200 px."""
    compared = 0
    for recording in recordings:
        if recording.robot_obs[0, 6] < 0.06:
            continue  # a block in the hand: CALVIN's fingers hide other parts of it than ours
        theirs = np.asarray(PIL.Image.open(io.BytesIO(recording.static_jpeg))).astype(int)
        scene = make_scene(recording.scene)
        state = reset(scene, recording.robot_obs[0], recording.scene_obs[0])
        ours = draw(scene, state, "static", 200)
        for color in tasks.BLOCKS:
            a, b = mask(theirs, color), mask(ours, color)
            if a.sum() > 150 and b.sum() > 150:
                np.testing.assert_allclose(middle(a), middle(b), atol=2.0)
                assert b.sum() == pytest.approx(a.sum(), rel=0.2)
                compared += 1
        # the picture as a whole: same furniture in the same place
        assert np.abs(theirs - ours).mean() < 25, recording.scene
    assert compared >= 20


def test_the_wrist_camera_rides_on_the_hand(scene):
    state = initial(scene)
    view = cameras.camera(state, "wrist")
    tip = state.position + state.rotation @ jnp.array([0.0, 0.0, 0.0156])
    right, down, depth = project(view, tip, 84)
    assert right == pytest.approx(42, abs=0.5)
    assert down == pytest.approx(25.5, abs=1.5)  # where fingertips are in CALVIN's pictures
    assert 0.1 < depth < 0.25
    moved = dataclasses.replace(state, position=state.position + jnp.array([0.05, 0.0, 0.0]))
    assert np.abs(draw(scene, state, "wrist", 84) - draw(scene, moved, "wrist", 84)).mean() > 3


# 50 px: the last tiles hang over
@pytest.mark.parametrize(("camera", "size"), [("wrist", 50), pytest.param("static", 96, marks=pytest.mark.slow)])
def test_both_ways_of_drawing_give_the_same_picture(scene, camera, size):
    """Breaks when a screen box is too small, a tile's list lacks a solid, or tiles are put together wrongly."""
    edges = 0
    for index in (0, 77, 150):
        for tip in (0.0, 0.9):  # the second hand looks sideways: solids on either side of the eye's plane
            state = initial(scene, index)
            state = dataclasses.replace(
                state, rotation=rotations.from_axis_angle(jnp.array([0.0, tip, 0.0])) @ state.rotation
            )
            tiled, dense = (draw(scene, state, camera, size, tiled=tiled) for tiled in (True, False))
            assert tiled.std() > 20
            edges += (np.abs(tiled - dense).max(-1) > 1).sum()
    assert edges <= 6, "only rays that graze an edge may differ, by rounding"


def test_variants_look_different():
    images = []
    for name in "ABCD":
        scene = make_scene(name)
        images.append(draw(scene, reset(scene, initial_states.INITIAL_ROBOT_OBS, np.zeros(24)), "static"))
    for i, a in enumerate(images):
        for b in images[i + 1 :]:
            assert np.abs(a - b).mean() > 5


def test_lamps_show_their_state(scene):
    # hand and blocks out of the way of the comparison: only the lamps may change
    off = initial(scene, mechanisms=jnp.zeros(4), led=jnp.float32(0))
    lit = dataclasses.replace(off, led=jnp.float32(1))
    changed = np.abs(draw(scene, off, "static") - draw(scene, lit, "static")).max(-1) > 40
    assert 10 < changed.sum() < 400
    green = draw(scene, lit, "static")[changed]
    assert np.all(green[:, 1] > green[:, 0] + 50)
    on = dataclasses.replace(off, mechanisms=jnp.array([0.0, 0.0, 0.0, 0.088]))
    assert ((np.abs(draw(scene, on, "static") - [255, 242, 0]) < 110).all(-1)).sum() > 5


def test_moving_parts_move_in_the_picture(scene):
    state = initial(scene, mechanisms=jnp.zeros(4))
    before = draw(scene, state, "static")
    for joint in range(4):
        moved = dataclasses.replace(state, mechanisms=state.mechanisms.at[joint].set(scene.joint_range[joint]))
        changed = (np.abs(draw(scene, moved, "static") - before).max(-1) > 20).mean()
        assert 0.0003 < changed < 0.3


def test_pictures_have_any_size(scene):
    state = initial(scene)
    small, large = draw(scene, state, "static", 48), draw(scene, state, "static", 192)
    assert small.shape == (48, 48, 3)
    shrunk = large.reshape(48, 4, 48, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 16


def test_unknown_cameras_are_named(scene):
    with pytest.raises(ValueError, match=r"unknown camera 'top'.*static, wrist"):
        cameras.camera(initial(scene), "top")
