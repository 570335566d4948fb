"""Mirrored samples: signs of a robot's numbers against reflected matrices, words, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import bridge
from robovlms_jax import cli
from robovlms_jax.actions import rotations, statistics
from robovlms_jax.control.robot import CALVIN, GRIPPER, Camera, Dimension, RobotSpec
from robovlms_jax.data import mirror
from robovlms_jax.driving import expert, instructions, scenarios, world
from robovlms_jax.runs import setup as setups
from tests.experiments.test_calvin_abcd import small


def arm(frame="base", rotation="euler_xyz", **camera):
    xyz = tuple(Dimension(n, "m", "delta", "position", frame) for n in "xyz")
    turn = tuple(Dimension(n, "rad", "delta", rotation, frame) for n in ("roll", "pitch", "yaw"))
    return RobotSpec("arm", 5.0, (Camera(**{"name": "front"} | camera),), (*xyz, *turn, GRIPPER), xyz)


@pytest.mark.parametrize(("axis", "reflect"), [("y", np.diag([1.0, -1, 1])), ("x", np.diag([-1.0, 1, 1]))])
@given(angles=st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3))
def test_signs_are_those_of_the_reflected_motion(axis, reflect, angles):
    found = mirror.of_robot(arm(frame="world"), 0.5, axis, state=range(99))
    np.testing.assert_array_equal(found.action[:3], np.diag(reflect))
    np.testing.assert_array_equal(found.state, np.diag(reflect))
    assert found.action[6] == 1
    turned = rotations.from_euler(np.array(angles) * found.action[3:6])
    np.testing.assert_allclose(turned, reflect @ rotations.from_euler(np.array(angles)) @ reflect, atol=1e-6)


def test_a_bases_turn_and_sideways_motion_change_sign():
    names = ("v_x", "v_y", "yaw_rate")
    base = RobotSpec("base", 5.0, (), tuple(Dimension(n, "m/s", "velocity", "base", "base") for n in names))
    np.testing.assert_array_equal(mirror.of_robot(base, 1.0, "", state=range(99)).action, [1, -1, -1])


@pytest.mark.parametrize(
    ("robot", "axis", "message"),
    [
        (CALVIN, "x", "static camera looks at 36 degrees"),
        (arm(frame=""), "", "'x' is in axes that nobody names: say with data.augment.mirror_axis"),
        (arm(frame="world"), "", "'x' is in frame 'world'"),
        (arm(frame="tcp"), "y", "in the tool's own axes"),
        (arm(name="cam_left"), "y", r"cameras \['cam_left'\] would show what another one sees"),
        (RobotSpec("j", action=(Dimension("joint_1", "rad", "absolute", "joint"),)), "y", r"'joint_1' \(joint\)"),
    ],
)
def test_what_has_no_known_mirror_image_is_refused_with_the_reason(robot, axis, message):
    with pytest.raises(ValueError, match=message):
        mirror.of_robot(robot, 0.5, axis, state=range(99))


@pytest.mark.parametrize(
    ("sentence", "other"),
    [
        ("Push the LEFT block to the right.", "Push the RIGHT block to the left."),
        ("turn it counter-clockwise, then leftwards", "turn it clockwise, then rightwards"),
        ("leftover bright plate", "leftover bright plate"),
        ("the left_arm and the lefthand drawer", "the right_arm and the righthand drawer"),
        ("오른팔로 왼 손 쪽 좌상단", "왼팔로 오른 손 쪽 우상단"),
        ("경우로 우수한", "경우로 우수한"),
        ("왼쪽 서랍을 오른쪽으로 반시계 방향", "오른쪽 서랍을 왼쪽으로 시계 방향"),
        ("좌측으로 시계방향", "우측으로 반시계방향"),
        ("박스를 좌 측으로, 새우 측정", "박스를 우 측으로, 새우 측정"),
    ],
)
def test_words_change_sides_and_back(sentence, other):
    assert mirror.words(sentence) == other
    assert mirror.words(other).replace("counterclockwise", "counter-clockwise") == sentence


@pytest.mark.parametrize("kind", sorted({name.rpartition("_")[0] for name in scenarios.SCENARIOS}))
def test_what_a_base_is_told_and_what_its_expert_does_are_mirrored_alike(kind):
    turned = mirror.of_robot(world.ROBOT, 1.0, "", state=())
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        left, right = (instructions.wordings(f"{kind}_{side}", held_out=held_out) for side in ("left", "right"))
        assert set(map(mirror.words, left)) == set(right)
        for sentence in left[:: 1 + len(left) // 200]:
            there = mirror.words(instructions.mistyped(sentence, rng))
            assert there.replace(" ", "") == mirror.words(sentence).replace(" ", "")
    layout = scenarios.draw(f"{kind}_left", 0)
    over = layout._replace(
        boxes=layout.boxes * [1, -1, 1, 1, 1],
        signs=-layout.signs,
        cup=layout.cup * [1, -1],
        start=layout.start * [1, -1, -1],
    )
    states = [world.reset(layout), world.reset(over)]
    for _ in range(40):
        first, second = (expert.act(room, state) for room, state in zip((layout, over), states))
        np.testing.assert_allclose(first * turned.action, second, atol=1e-9)
        states = [world.step(room, state, x) for room, state, x in zip((layout, over), states, (first, second))]


def test_odometry_has_no_known_mirror_image_and_may_be_left_out():
    with pytest.raises(ValueError, match=r"'x' \(other\). That is its state, which policy.proprio.enabled=False and"):
        mirror.of_robot(world.ROBOT, 0.5, "", state=range(99))


@pytest.mark.parametrize("turn", ["anticlockwise", "anti-clockwise", "counter clockwise"])
def test_every_spelling_of_the_other_turn_is_known(turn):
    assert mirror.words(f"Turn it {turn}") == "Turn it clockwise"


def test_a_training_sample_is_mirrored_as_a_whole_and_an_evaluations_never(tmp_path):
    config = cli.override(
        bridge.PRESETS["sample"],
        **{"train.output": str(tmp_path), "data.augment.mirror": 1.0, "data.augment.mirror_axis": "y"},
        **{"policy.auxiliary.ahead.loss_weight": 0.1},
    )
    source, index = setups.prepare(config).train, np.array([6])
    turned, straight = source.training_batch(index, np.array([7], np.uint32)), source.evaluation_batch(index)
    for camera, x in turned.inputs.images.items():
        np.testing.assert_array_equal(x, straight.inputs.images[camera][..., ::-1, :])
    signs = np.array([1, -1, 1, -1, 1, -1, 1], np.float32)
    np.testing.assert_array_equal(turned.actions, straight.actions * signs)
    np.testing.assert_array_equal(turned.ahead, straight.ahead * signs[:3])
    assert np.abs(straight.ahead[..., 1]).max() > 0
    (told,), (recorded,) = source.sentences(index, np.array([7], np.uint32)), source.sentences(index)
    assert told == mirror.words(recorded) and source.content()["mirrored"] == 1.0


def test_a_motion_is_as_large_to_both_sides_in_statistics_of_mirrored_samples():
    values = np.random.default_rng(0).normal([0.3, 0.3], [1.0, 2.0], size=(20_000, 2))
    found = mirror.Mirror(0.5, np.array([-1.0, 1.0]), np.ones(1)).statistics(statistics.summarize(values))
    both = np.concatenate([values, values * [-1, 1]])
    for name in ("mean", "std"):
        np.testing.assert_allclose(found[name], getattr(both, name)(axis=0), atol=1e-9)
    assert found["q01"][0] == -found["q99"][0] and found["q99"][0] >= np.quantile(both[:, 0], 0.99)
    assert found["q01"][1] == np.quantile(values[:, 1], 0.01)


def test_half_of_the_samples_are_mirrored_whatever_sentence_is_drawn():
    draws = np.random.default_rng(0).integers(2**32, size=20_000, dtype=np.uint32)
    chosen = mirror.Mirror(0.5, np.ones(1), np.ones(1)).chosen(draws)
    assert abs(chosen.mean() - 0.5) < 0.02 and all(abs(chosen[draws % 5 == k].mean() - 0.5) < 0.03 for k in range(5))


def test_calvins_samples_are_not_mirrored(tmp_path):
    with pytest.raises(ValueError, match="no axis points to the side in its pictures"):
        setups.prepare(small(tmp_path, **{"data.augment.mirror": 0.5}))


def test_of_a_state_only_what_is_learned_from_need_have_a_mirror_image(tmp_path):
    """Fails if a joint that nobody uses refuses the mirror, or `ahead` is mirrored without knowing how."""
    spec = dataclasses.replace(
        arm(frame="base"), state=(*arm(frame="base").state, Dimension("elbow", "rad", quantity="joint"))
    )
    assert mirror.of_robot(spec, 0.5, "", state=(0, 1, 2)).state.tolist()[:3] == [1, -1, 1]
    with pytest.raises(ValueError, match=r"'elbow' .*policy\.auxiliary\.ahead\.loss_weight=0 leave out"):
        mirror.of_robot(spec, 0.5, "", state=(3,))
    changes = {"train.output": str(tmp_path), "data.augment.mirror": 1.0, "data.augment.mirror_axis": "y"}
    config = cli.override(bridge.PRESETS["sample"], **changes, **{"policy.auxiliary.scene.loss_weight": 0.1})
    with pytest.raises(ValueError, match=r"'policy\.auxiliary\.scene': \['scene_obs'\]. no mirror image is known"):
        setups.prepare(config)
