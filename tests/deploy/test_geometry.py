"""Distances of capsules and boxes against values known by hand and against a search over both segments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.deploy import geometry

POINT = st.tuples(*[st.floats(-2, 2, allow_subnormal=False).map(lambda x: round(x, 3))] * 3)


def gap(one, other):
    """Distance between the surfaces of two capsules."""
    return float(geometry.Scene((other,)).clearance(np.zeros(3), (one,))[0])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (((-1, 0, 0), (1, 0, 0)), ((0, -1, 0.3), (0, 1, 0.3)), 0.2),  # crossing at a right angle
        (((0, 0, 0), (1, 0, 0)), ((2, 0, 0), (3, 0, 0)), 0.9),  # on one line
        (((0, 0, 0), (1, 0, 0)), ((0.5, 0.4, 0), (1.5, 0.4, 0)), 0.3),  # parallel
        (((0, 0, 0), (1, 0, 0)), ((0, 0, 0), (1, 0, 0)), -0.1),  # the same
        (((0, 0, 0), (0, 0, 0)), ((0, 0, 1), (0, 0, 1)), 0.9),  # balls
        (((0, 0, 0), (0, 0, 0)), ((-1, 0, 1), (1, 0, 1)), 0.9),  # a ball and a capsule
    ],
)
def test_capsules_at_known_distances(first, second, expected):
    one, other = geometry.Capsule("one", *first, 0.05), geometry.Capsule("other", *second, 0.05)
    assert gap(one, other) == pytest.approx(expected, abs=1e-12)
    assert gap(other, one) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(POINT, POINT, POINT, POINT)
def test_the_distance_of_segments_is_the_least_of_any_two_points_on_them(p1, q1, p2, q2):
    points = [np.array(x) for x in (p1, q1, p2, q2)]
    found = float(geometry.segment_distance(*points))
    t = np.linspace(0, 1, 41)[:, None]
    first, second = points[0] + t * (points[1] - points[0]), points[2] + t * (points[3] - points[2])
    searched = np.linalg.norm(first[:, None] - second, axis=-1).min()
    reach = (np.linalg.norm(points[1] - points[0]) + np.linalg.norm(points[3] - points[2])) / 80
    assert searched - reach - 1e-9 <= found <= searched + 1e-9


@settings(max_examples=100, deadline=None)
@given(POINT, POINT, POINT)
def test_the_distance_of_a_segment_and_a_box_is_never_too_large(p, q, center):
    p, q, center, half = np.array(p), np.array(q), np.array(center), np.array([0.3, 0.2, 0.1])
    found = float(geometry.segment_box_distance(p, q, center, half))
    points = p + np.linspace(0, 1, 401)[:, None] * (q - p)
    searched = np.linalg.norm(np.maximum(np.abs(points - center) - half, 0), axis=-1).min()
    assert searched - np.linalg.norm(q - p) / 800 - 1e-6 <= found <= searched + 1e-12


def test_what_may_be_touched_is_kept_at_no_distance():
    scene = geometry.Scene((geometry.ball("block", (0, 0, 0), 0.02, touchable=True),))
    assert scene.names == []


@pytest.mark.parametrize("radius", [-1.0, float("nan"), float("inf")])
def test_a_capsule_without_a_sensible_radius_is_refused_by_name(radius):
    with pytest.raises(ValueError, match="capsule 'link 4': radius"):
        geometry.ball("link 4", (0, 0, 0), radius)


def test_an_obstacle_made_of_an_array_stays_where_it_was_made():
    center = np.array([1.0, 0.0, 0.0])
    cup, box = geometry.ball("cup", center, 0.1), geometry.Box("box", center, [0.1, 0.1, 0.1])
    center[0] = 9.0
    assert cup.start == cup.end == box.center == (1.0, 0.0, 0.0) and box.half == (0.1, 0.1, 0.1)
    assert geometry.Scene((cup, box)).clearance(
        np.zeros(3), (geometry.ball("tool", np.zeros(3), 0.1),)
    ) == pytest.approx(0.8)
