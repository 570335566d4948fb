"""What the experts read of the real simulator's files and of its state."""

from __future__ import annotations

import numpy as np
import pytest

from robovlms_jax.envs.calvin import initial_states, tasks
from robovlms_jax.playtable import scene as scenes
from robovlms_jax.playtable.experts import cases
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.playtable.real import experts, geometry


def test_the_files_of_scene_d_describe_what_playtable_measured(checkout):
    found, measured = geometry.read(str(checkout), "D"), scenes.make_scene("D")
    np.testing.assert_allclose(found.joint_range, measured.joint_range, atol=1e-6)
    np.testing.assert_allclose(found.block_half, measured.block_half, atol=1e-6)
    np.testing.assert_array_equal(found.block_slot, measured.block_slot)
    for name in ("slider_handle", "drawer_handle", "button_top", "switch_handle", "area"):
        np.testing.assert_allclose(getattr(found.anchors, name), getattr(measured.anchors, name), atol=3e-3)
    np.testing.assert_allclose(found.anchors.shelf, measured.anchors.shelf, atol=0.06)
    assert float(found.anchors.switch_half) == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("conf/scene/calvin_scene_D.yaml", "global_scaling: 0.8", "", "calvin_scene_D.yaml lacks 'global_scaling'"),
        ("conf/scene/calvin_scene_D.yaml", "block_pink", "block_green", "blocks .*green.*expected one of each of red"),
        ("data/table/urdf/table.urdf", "base__slide", "other", "table.urdf has no joint 'base__slide'"),
        ("data/blocks/pink.urdf", "box", "sphere", "pink.urdf has no link whose collision shape is a box"),
        ("data/table/urdf/table.urdf", "</robot>", "", "table.urdf is not XML"),
    ],
)
def test_a_scene_file_that_lacks_something_is_named(checkout, file, old, new, message):
    path = checkout / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        geometry.read(str(checkout), "D")


def test_a_scene_whose_files_are_missing_is_named(checkout):
    (checkout / "data" / "blocks" / "red.urdf").unlink()
    with pytest.raises(FileNotFoundError, match=r"red\.urdf is missing"):
        geometry.read(str(checkout), "D")
    (checkout / "data" / "table" / "lever.obj").unlink()
    with pytest.raises(FileNotFoundError, match=r"mesh of 'switch_link' is not at .*lever\.obj"):
        geometry.read(str(checkout), "D")
    with pytest.raises(ValueError, match="unknown scene 'E'; known scenes: A, B, C, D"):
        geometry.read(str(checkout), "E")


def situation(**changes):
    robot, scene = initial_states.INITIAL_ROBOT_OBS.copy(), np.zeros(24)
    robot[:6] = 0.1, -0.1, 0.46, np.pi, 0.0, 1.5
    contacts = np.zeros((4, len(tasks.BODIES)), bool)
    contacts[1:, tasks.BODIES.index("base")] = True
    blocks = np.array([[0.1, -0.1, 0.46], [0.2, -0.1, 0.46], [0.2, -0.1, 0.50]])
    found = {"robot_obs": robot, "scene_obs": scene, "contacts": contacts, "block_position": blocks}
    found |= {"block_rotation": np.tile([0.0, 0.0, 0.0, 1.0], (3, 1))}
    return found | {"target_position": robot[:3], "target_euler": robot[3:6]} | changes


def test_contacts_tell_what_the_hand_holds_and_what_blocks_stand_on(checkout):
    table = geometry.read(str(checkout), "D")
    now = situation()
    robot, contacts = now["robot_obs"], now["contacts"]
    robot[14], contacts[1, 0] = -1.0, True  # the closed hand touches the red block in it
    pink, blue = tasks.BODIES.index("pink_block"), tasks.BODIES.index("blue_block")
    contacts[3, tasks.BODIES.index("base")], contacts[3, blue], contacts[2, pink] = False, True, True
    state = experts.state_of(table, now)
    assert state.held == 0 and state.support[0] == bodies.FREE
    assert state.support[2] == cases.BLOCK_SUPPORT + 1  # pink on blue
    assert cases.stands_on_table(state).tolist() == [False, True, False]
    robot[14] = 1.0  # an open hand holds nothing, and one that touches a block beside it does not either
    assert experts.state_of(table, now).held == bodies.FREE
    robot[14] = -1.0
    now["block_position"][0, 0] += 0.06
    assert experts.state_of(table, now).held == bodies.FREE
