"""Looks of the real simulator's table, by a recording of what PyBullet is asked."""

from __future__ import annotations

import types
from unittest import mock

import pytest

from robovlms_jax.envs import looks
from robovlms_jax.envs.calvin import dressing

BROWN = (0.5, 0.4, 0.3, 1.0)


@pytest.fixture
def simulator():
    bullet = mock.MagicMock()
    bullet.createMultiBody.side_effect = range(100, 200)
    bullet.computeViewMatrix.side_effect = lambda **kwargs: kwargs
    bullet.getVisualShapeData.return_value = [(7, link, 0, 0, 0, 0, 0, BROWN) for link in range(-1, 4)]
    links = {"base_link": -1, "drawer_link": 0, "button_link": 1, "led_link": 2}
    table = {"uid": 7, "links": links}
    info = {"scene_info": {"fixed_objects": {"table": table}}}
    camera = types.SimpleNamespace(viewMatrix="usual", look_from=(1, 2, 3), look_at=(0, 0, 0), up_vector=(0, 0, 1))
    env = types.SimpleNamespace(p=bullet, cid=3, get_info=lambda: info)
    return bullet, camera, dressing.Dressing(env, [camera])


def test_camera_surfaces_and_things_change_and_are_put_back(simulator):
    bullet, camera, dress = simulator
    dress.wear(looks.Look(eye_shift_m=(0.1, 0.0, -0.1)))
    assert camera.viewMatrix["cameraEyePosition"] == pytest.approx([1.1, 2.0, 2.9])
    dress.wear(looks.Look(wood=(0.1, 0.2, 0.3)))
    assert camera.viewMatrix == "usual"
    painted = {call.args: call.kwargs["rgbaColor"] for call in bullet.changeVisualShape.call_args_list}
    assert painted == {(7, -1): [0.1, 0.2, 0.3, 1.0], (7, 0): [0.1, 0.2, 0.3, 1.0]}  # lamps and button as they were
    thing = looks.Thing((0.0, 0.0, 0.46), (0.02, 0.02, 0.02), (0.0, 1.0, 0.0))
    dress.wear(looks.Look(things=(thing, thing)))
    assert bullet.changeVisualShape.call_args.kwargs["rgbaColor"] == BROWN
    made = bullet.createMultiBody.call_args.kwargs
    assert made["baseMass"] == 0 and "baseCollisionShapeIndex" not in made  # nothing meets it
    dress.wear(looks.Look())
    assert [call.args[0] for call in bullet.removeBody.call_args_list] == [100, 101]


def test_another_light_is_refused_with_the_reason(simulator):
    with pytest.raises(ValueError, match="cannot be lit otherwise: calvin_env's cameras"):
        simulator[2].wear(looks.draw("lighting", 0, (0.0, 0.35), -0.12))
