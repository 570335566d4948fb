"""What is to be seen."""

from __future__ import annotations

import numpy as np

from robovlms_jax.driving import camera, scenarios


def empty():
    layout = scenarios.draw("1box_vert_left", 2)
    return layout._replace(present=np.zeros((1, 2), bool), cup=np.array([[2.5, 0.0]]))


def red(picture):
    """Columns with red in them."""
    x = picture.astype(int)
    return np.flatnonzero(((x[..., 0] > 120) & (x[..., 1] < 90) & (x[..., 2] < 90)).any(axis=0))


def test_the_cup_is_where_the_base_looks_and_on_the_left_when_it_is_on_the_left():
    layout = empty()
    ahead = red(camera.render(layout, np.array([1.0, 0.0, 0.0]), (60, 96)))
    left = red(camera.render(layout, np.array([1.0, 0.0, -0.6]), (60, 96)))
    behind = red(camera.render(layout, np.array([1.0, 0.0, np.pi]), (60, 96)))
    assert abs(ahead.mean() - 47.5) < 1 and len(behind) == 0
    per_column = camera.FIELD_RAD / 96
    np.testing.assert_allclose(left.mean(), 47.5 - 0.6 / per_column, atol=1)


def test_an_upright_box_hides_the_cup_and_a_lying_one_does_not():
    layout = empty()._replace(present=np.array([[True, False]]))
    boxes = layout.boxes.copy()
    for height, hidden in ((0.7, True), (0.2, False)):
        boxes[0, 0] = (1.6, 0.0, 0.15, 0.15, height)
        picture = camera.render(layout._replace(boxes=boxes), np.array([0.5, 0.0, 0.0]))
        assert (len(red(picture)) == 0) == hidden


def test_pictures_are_bytes_of_the_size_asked_for_and_smoothing_keeps_the_picture():
    layout, pose = scenarios.draw("2box_hori_left", 3), np.array([0.1, 0.1, 0.2])
    plain, smooth = camera.render(layout, pose, (50, 70)), camera.render(layout, pose, (50, 70), smooth=3)
    assert plain.shape == smooth.shape == (50, 70, 3) and plain.dtype == np.uint8
    assert np.abs(plain.astype(int) - smooth).mean() < 6


def test_the_map_shows_base_cup_and_trail():
    layout = empty()
    trail = np.array([[x, 0.5, 0.0] for x in np.linspace(0, 1, 30)])
    drawn = camera.draw_map(layout, np.array([1.0, 0.5, 0.0]), trail)
    assert drawn.shape == (*camera.MAP_SIZE, 3) and len(red(drawn))
    assert (drawn != camera.draw_map(layout, np.array([1.0, 0.5, 0.0]))).any()
