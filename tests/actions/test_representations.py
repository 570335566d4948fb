"""Actions as policies predict them and as robots are sent them: both ways, against SciPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from robovlms_jax.actions import representations, rotations
from robovlms_jax.control import robot

NAMES = ("relative", "absolute", "absolute_6d", "velocity", "tcp", "tcp_upstream")
seeds = st.integers(0, 2**31)


def trajectory(seed: int, steps: int = 5):
    """CALVIN's actions float[C, 7], and the states float[C, 7] that those before each lead to."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (steps, 7))
    actions[:, 6] = np.sign(actions[:, 6])
    pose = np.concatenate([rng.uniform(-1, 1, 3), rng.uniform(-1.2, 1.2, 3)])
    poses = [pose]
    for action in actions[:-1]:
        poses.append(poses[-1] + action[:6] * ([0.02] * 3 + [0.05] * 3))
    return actions, np.concatenate([poses, np.ones((steps, 1))], axis=1)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_a_chunk_that_was_encoded_step_by_step_is_decoded_from_its_first_state_alone(name, seed):
    actions, states = trajectory(seed)
    made = representations.make(name, robot.CALVIN)
    encoded = made.encode(actions, states)
    assert encoded.shape[1] == len(made.robot.action) and encoded.dtype == np.float32
    np.testing.assert_allclose(made.decode(encoded, states[0]), actions, atol=2e-3)
    assert made.robot.binary == (len(made.robot.action) - 1,)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_absolute_poses_are_where_the_motion_leads_to(seed):
    actions, states = trajectory(seed)
    poses = representations.make("absolute", robot.CALVIN).encode(actions, states)
    np.testing.assert_allclose(poses[:, :3], states[:, :3] + 0.02 * actions[:, :3], atol=1e-6)
    columns = representations.make("absolute_6d", robot.CALVIN).encode(actions, states)[:, 3:9]
    matrices = Rotation.from_euler("xyz", poses[:, 3:6]).as_matrix()
    np.testing.assert_allclose(columns, np.concatenate([matrices[..., 0], matrices[..., 1]], axis=1), atol=1e-6)
    tool = representations.make("tcp", robot.CALVIN).encode(actions, states)
    turned = Rotation.from_euler("xyz", states[:, 3:6])
    np.testing.assert_allclose(turned.apply(tool[:, :3]), actions[:, :3], atol=1e-5)
    np.testing.assert_allclose(
        (turned * Rotation.from_euler("xyz", 0.05 * tool[:, 3:6])).as_matrix(), matrices, atol=1e-5
    )


def test_what_a_robot_cannot_do_in_a_step_is_cut_and_the_next_action_begins_there():
    # CALVIN's factors are 50 and 20, clipped to 1: a target 0.1 m away is 5 units, of which one is made per step.
    far = np.array([[0.1, 0, 0, 0, 0, 0, 1.0]] * 3)
    own = representations.make("absolute", robot.CALVIN).decode(far, np.zeros(7))
    np.testing.assert_allclose(own[:, 0], 1)
    near = np.array([[0.03, 0, 0, 0.07, 0, 0, 1.0]] * 3)
    own = representations.make("absolute", robot.CALVIN).decode(near, np.zeros(7))
    np.testing.assert_allclose(own[:, [0, 3]], [[1, 1], [0.5, 0.4], [0, 0]], atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_a_robot_that_is_sent_poses_may_be_taught_motions(seed):
    pose = robot.CALVIN.state[:6]
    sent = dataclasses.replace(robot.CALVIN, name="poses", action=(robot.GRIPPER, *pose), state=(*pose, robot.GRIPPER))
    rng = np.random.default_rng(seed)
    targets = rng.uniform(-1, 1, (4, 7))
    states = np.concatenate([rng.uniform(-1, 1, (1, 6)), targets[:-1, 1:]])
    for name in ("relative", "tcp", "velocity"):
        made = representations.make(name, sent)
        encoded = made.encode(targets, states)
        np.testing.assert_array_equal(encoded[:, 0], np.float32(targets[:, 0]))
        np.testing.assert_allclose(made.decode(encoded, states[0]), targets, atol=1e-4)
    assert {d.kind for d in representations.make("relative", sent).robot.action[1:]} == {"delta"}


FORMS = {"euler_xyz": "rad", "quaternion_xyzw": "1", "axis_angle": "rad", "rotation_6d": ""}


def hand(side: str, kind: str, form: str, unit: float = 1.0) -> tuple[robot.Dimension, ...]:
    """xyz and rotation of an arm; `unit` is what 1.0 is of metres and of radians."""
    turned = FORMS[form] if unit == 1 or FORMS[form] != "rad" else f"{unit} rad"
    xyz = tuple(robot.Dimension(f"{side}{name}", f"{unit} m", kind, "position") for name in "xyz")
    names = [f"{side}r{i}" for i in range(robot.GROUP_SIZES[form])]
    return xyz + tuple(robot.Dimension(name, turned, kind, form) for name in names)


def numbers(xyz, turns, form: str, unit: float = 1.0) -> np.ndarray:
    """float[n, 3 + size] as `hand` describes them, from SciPy's rotations."""
    matrices = turns.as_matrix()
    made = {
        "euler_xyz": lambda: turns.as_euler("xyz") / unit,
        "quaternion_xyzw": turns.as_quat,
        "axis_angle": lambda: turns.as_rotvec() / unit,
        "rotation_6d": lambda: np.concatenate([matrices[..., 0], matrices[..., 1]], axis=1),
    }
    return np.concatenate([xyz / unit, made[form]()], axis=1)


def turns_of(values, form: str, unit: float = 1.0) -> Rotation:
    """Inverse of `numbers` for the rotation's columns."""
    if form == "euler_xyz":
        return Rotation.from_euler("xyz", values * unit)
    if form == "axis_angle":
        return Rotation.from_rotvec(values * unit)
    return Rotation.from_quat(values) if form == "quaternion_xyzw" else Rotation.from_matrix(rotations.from_6d(values))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        [name for name in NAMES if name != "tcp_upstream"] + ["absolute_quaternion", "absolute_axis_angle"]
    ),
    st.lists(st.tuples(st.sampled_from(list(FORMS)), st.sampled_from(list(FORMS))), min_size=1, max_size=2),
    st.sampled_from(["absolute", "delta"]),
    seeds,
)
def test_one_or_two_arms_of_any_rotation_come_back_each_by_its_own_dimensions(name, forms, kind, seed):
    # Two arms stand in another order in the state, a gripper stands between their actions, and their forms may differ.
    rng, steps, unit = np.random.default_rng(seed), 4, 0.5 if kind == "delta" else 1.0
    sides = ("left_", "right_")[: len(forms)]
    action, state, own, states, xyzs, targets = [], [], [], [], [], []
    for side, (sent, told) in zip(sides, forms, strict=True):
        xyz = rng.uniform(-1, 1, (steps + 1, 3))
        euler = rng.uniform(-1, 1, (steps + 1, 3)).cumsum(axis=0) * 0.3  # away from where Euler angles jump
        turns = Rotation.from_euler("xyz", euler)
        if kind == "absolute":
            own.append(numbers(xyz[1:], turns[1:], sent))
        elif sent == "euler_xyz":
            own.append(np.concatenate([np.diff(xyz, axis=0), np.diff(euler, axis=0)], axis=1) / unit)
        else:
            own.append(numbers(np.diff(xyz, axis=0), turns[1:] * turns[:-1].inv(), sent, unit))
        action.append(hand(side, kind, sent, unit))
        states.append(numbers(xyz[:-1], turns[:-1], told))
        state.append(hand(side, "absolute", told))
        xyzs.append(xyz[1:])
        targets.append(turns[1:])
    grip = np.sign(rng.normal(size=(steps, 1)))
    spec = robot.RobotSpec(
        "arms", 5.0, (), (*action[0], robot.GRIPPER, *(d for x in action[1:] for d in x)), sum(state[::-1], ())
    )
    recorded = np.concatenate([own[0], grip, *own[1:]], axis=1)
    seen = np.concatenate(states[::-1], axis=1)
    made = representations.make(name, spec)
    encoded = made.encode(recorded, seen)
    assert encoded.shape == (steps, len(made.robot.action)) and made.robot.binary == (made.robot.grippers[0],)
    np.testing.assert_array_equal(encoded[:, made.robot.binary[0]], grip[:, 0])
    found, at = made.decode(encoded, seen[0]), 0
    for index, (sent, _) in enumerate(forms):
        end = at + own[index].shape[1]
        np.testing.assert_allclose(found[:, at : at + 3], own[index][:, :3], atol=1e-4)
        turned = (turns_of(x[:, at + 3 : end], sent, unit) for x in (found, recorded))
        assert np.abs((next(turned) * next(turned).inv()).magnitude()).max() < 1e-4
        at = end + 1
    if name.startswith("absolute"):  # where the hands go to, whatever the robot is sent
        form = made.robot.action[3].quantity
        size = robot.GROUP_SIZES[form]
        for index, first in enumerate((0, 3 + size + 1)[: len(forms)]):
            np.testing.assert_allclose(encoded[:, first : first + 3], xyzs[index], atol=1e-5)
            error = turns_of(encoded[:, first + 3 : first + 3 + size], form) * targets[index].inv()
            assert error.magnitude().max() < 1e-4


def test_a_tools_motion_is_the_same_whatever_the_rotation_is_declared_as():
    # Turned a quarter about z, the tool's x is the world's y.
    start, turn = Rotation.from_euler("z", 90, degrees=True), Rotation.from_rotvec([[0.3, 0, 0]])
    after = start * turn
    for form in ("quaternion_xyzw", "axis_angle", "rotation_6d"):
        spec = robot.RobotSpec("arm", 5.0, (), hand("", "absolute", form), hand("", "absolute", form))
        at = numbers(np.zeros((1, 3)), Rotation.concatenate([start]), form)
        values = representations.make("tcp", spec).encode(numbers(np.array([[0, 0.1, 0]]), after, form), at)
        np.testing.assert_allclose(values, [[0.1, 0, 0, 0.3, 0, 0]], atol=1e-6)
        world = representations.make("velocity", spec).encode(numbers(np.array([[0, 0.1, 0]]), after, form), at)
        np.testing.assert_allclose(world, [[0, 0.5, 0, 0, 1.5, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("action", "state", "message"),
    [
        ((("", "axis_angle"),), (), r"has \['an arm'\] in the action and \[\] in the state"),
        ((("left_", "axis_angle"), ("right_", "axis_angle")), (("left_", "axis_angle"),), r"the same arms"),
        ((("a", "axis_angle"), ("b", "axis_angle")), (), r"2 positions of \[''\] and 2 rotations"),
        ((("", "quaternion_xyzw"),), (("", "euler_xyz"),), "tcp_upstream' is about Euler angles; .*quaternion_xyzw"),
    ],
)
def test_arms_that_cannot_be_told_apart_or_do_not_fit_are_refused(action, state, message):
    action, state = (sum((hand(side, "absolute", form) for side, form in arms), ()) for arms in (action, state))
    with pytest.raises(ValueError, match=message):
        representations.make("tcp_upstream", robot.RobotSpec("arms", 5.0, (), action, state))


def test_degrees_and_motions_along_the_tools_own_axes_are_refused():
    degrees = [dataclasses.replace(d, unit="deg") if d.quantity == "euler_xyz" else d for d in robot.CALVIN.state]
    with pytest.raises(ValueError, match=r"needs the arm's state in m and rad; robot 'calvin' has .*'deg'"):
        representations.make("absolute", dataclasses.replace(robot.CALVIN, state=tuple(degrees)))
    tool = tuple(dataclasses.replace(d, frame="tcp") for d in robot.CALVIN.action)
    with pytest.raises(ValueError, match=r"in one frame, not in the tool's.*'tcp'"):
        representations.make("absolute", dataclasses.replace(robot.CALVIN, action=tool))


@given(seeds)
def test_six_numbers_turn_into_the_rotation_they_came_from_even_when_they_are_scaled(seed):
    rng = np.random.default_rng(seed)
    matrices = Rotation.random(4, random_state=seed).as_matrix()
    values = rotations.to_6d(matrices) * rng.uniform(0.5, 2)
    np.testing.assert_allclose(rotations.from_6d(values), matrices, atol=1e-9)


def test_a_robot_without_an_arm_is_told_what_it_lacks():
    base = robot.RobotSpec("base", 10.0, (), (robot.Dimension("v", "m/s", "velocity", "base"),))
    with pytest.raises(ValueError, match=r"needs the same arms .*robot 'base' has \[\] in the action"):
        representations.make("tcp", base)
    with pytest.raises(ValueError, match="rate_hz=0"):
        representations.make("velocity", dataclasses.replace(robot.CALVIN, rate_hz=0.0))


@pytest.mark.parametrize(
    ("action", "state", "message"),
    [
        (("base", "base"), ("world", "world"), r"'action position': \['base'\].*'state position': \['world'\]"),
        (("world", "tcp"), ("world", "world"), r"'action rotation': \['tcp'\]"),
        (("tcp", "tcp"), ("tcp", "tcp"), "not in the tool's"),
    ],
)
@pytest.mark.parametrize("kind", ["absolute", "delta"])
def test_poses_and_motions_of_other_frames_are_not_added_up(action, state, message, kind):
    def dimensions(frames, kind):
        return tuple(
            robot.Dimension(name, unit, kind, quantity, frame)
            for quantity, unit, frame in zip(("position", "axis_angle"), ("m", "rad"), frames)
            for name in (f"{quantity}_{i}" for i in range(3))
        )

    spec = robot.RobotSpec("arm", 5.0, (), dimensions(action, kind), dimensions(state, "absolute"))
    with pytest.raises(ValueError, match=message):
        representations.make("relative", spec)
    unknown = robot.RobotSpec("arm", 5.0, (), dimensions(("", ""), kind), dimensions(("base", "base"), "absolute"))
    assert representations.make("relative", unknown)


@pytest.mark.parametrize(("form", "size"), [("quaternion_xyzw", 4), ("rotation_6d", 6)])
def test_what_is_no_rotation_becomes_nan_and_nothing_else(form, size):
    def arm(kind):
        xyz = [robot.Dimension(f"x{i}", "m", kind, "position") for i in range(3)]
        return (*xyz, *(robot.Dimension(f"r{i}", "1", kind, form) for i in range(size)))

    made = representations.make("relative", robot.RobotSpec("arm", 5.0, (), arm("absolute"), arm("absolute")))
    good = np.concatenate([np.zeros(3), np.eye(1, size)[0] if size == 4 else [1, 0, 0, 0, 1, 0]])
    states = np.stack([good, np.zeros(3 + size), good])
    encoded = made.encode(np.stack([good] * 3), states)
    assert np.isfinite(encoded[[0, 2]]).all() and np.isnan(encoded[1]).any()
    assert np.isfinite(made.decode(encoded[:1], good)).all() and np.isnan(made.decode(encoded[:1], states[1])).any()
