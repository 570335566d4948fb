"""The 34 task conditions and how tasks are asked for."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.envs.calvin import task_chains, tasks

ROWS = {"robot": 0, "red": 1, "blue": 2, "pink": 3}


def scene(**changes) -> tasks.SceneInfo:
    """Three blocks at rest on the table, drawer and door closed, lights off, the robot in the air."""
    info = {
        "slider": 0.0,
        "drawer": 0.0,
        "lightbulb": 0,
        "led": 0,
        "block_position": np.array([[0.0, -0.1, 0.46], [0.1, -0.1, 0.46], [0.2, -0.1, 0.46]]),
        "block_rotation": np.tile([0.0, 0.0, 0.0, 1.0], (3, 1)),
        "block_velocity": np.zeros((3, 6)),
        "contacts": np.zeros((4, len(tasks.BODIES)), bool),
    } | changes
    if "contacts" not in changes:
        info["contacts"][1:, tasks.BODIES.index("base")] = True
    return info


def touch(info, who: str, *what: str) -> None:
    """`who` touches exactly `what`, and blocks and robot are touched back."""
    row = ROWS[who]
    info["contacts"][row] = False
    if row:
        info["contacts"][:, row] = False
    else:
        info["contacts"][1:, 0] = False
    for body in what:
        info["contacts"][row, tasks.BODIES.index(body)] = True
        other = body.removesuffix("_block")
        if other in ROWS:
            info["contacts"][ROWS[other], row] = True


def move(info, color: str, dx=0.0, dy=0.0, dz=0.0, yaw=0.0, roll=0.0) -> None:
    index = tasks.BLOCKS.index(color)
    info["block_position"][index] += dx, dy, dz
    cx, sx, cz, sz = np.cos(roll / 2), np.sin(roll / 2), np.cos(yaw / 2), np.sin(yaw / 2)
    info["block_rotation"][index] = sx * cz, sx * sz, cx * sz, cx * cz  # roll about x, then yaw about z


def pair(name: str) -> tuple[tasks.SceneInfo, tasks.SceneInfo]:
    """A start and an end at which exactly `name` has just been done."""
    start = scene()
    words = name.split("_")
    color = words[1] if words[1] in tasks.BLOCKS else "red"
    if words[0] == "lift":
        surface = {"table": "base", "slider": "shelf", "drawer": "drawer"}[words[3]]
        touch(start, color, surface)
        end = copy.deepcopy(start)
        touch(end, color, "robot")
        move(end, color, dz=0.06 if words[3] != "slider" else 0.04)
    elif words[0] == "place":
        touch(start, color, "robot")
        end = copy.deepcopy(start)
        touch(end, color, {"slider": "shelf", "drawer": "drawer"}[words[2]])
    elif name == "stack_block":
        touch(start, color, "robot")
        end = copy.deepcopy(start)
        touch(end, color, "blue_block")
    elif name == "unstack_block":
        touch(start, color, "blue_block")
        end = copy.deepcopy(start)
        touch(end, color, "base")
    elif name == "push_into_drawer":
        end = copy.deepcopy(start)
        touch(end, color, "drawer")
    else:
        end = copy.deepcopy(start)
        if words[0] == "rotate":
            touch(end, color, "base", "robot")
            move(end, color, yaw=np.deg2rad({"right": -65, "left": 65}[words[3]]))
        elif words[0] == "push":
            touch(end, color, "base", "robot")
            move(end, color, dx={"right": 0.11, "left": -0.11}[words[3]])
        elif words[0] == "move":
            (end if words[2] == "left" else start)["slider"] = 0.16
        elif words[1] == "drawer":
            (end if words[0] == "open" else start)["drawer"] = 0.13
        else:
            (end if words[1] == "on" else start)[words[2]] = 1
    return start, end


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_is_recognised_and_only_it(name):
    assert tasks.completed_tasks(*pair(name)) == {name}
    start, _ = pair(name)
    assert tasks.completed_tasks(start, copy.deepcopy(start)) == set()


def spoil(name):
    """Changes to the positive example of `name` that each break one of its conditions."""

    def change(which, edit):
        start, end = pair(name)
        edit((start, end)[which])
        return start, end

    color = name.split("_")[1] if name.split("_")[1] in tasks.BLOCKS else "red"
    b = tasks.BLOCKS.index(color)
    fast = np.array([0, 0, 0, 0, 0, 1.2])
    if name.startswith("rotate"):
        sign = {"right": -1, "left": 1}[name.split("_")[3]]
        yield "turned too little", change(1, lambda i: move(i, color, yaw=sign * np.deg2rad(55)))
        yield "turned the other way", change(1, lambda i: move(i, color, yaw=-sign * np.deg2rad(65)))
        yield "tipped over", change(1, lambda i: move(i, color, yaw=sign * np.deg2rad(65), roll=np.deg2rad(35)))
        yield "dragged away", change(1, lambda i: i["block_position"].__setitem__((b, 0), 9.0))
        yield "held in the air", change(1, lambda i: touch(i, color, "robot"))
    elif name.startswith("push_into"):
        yield "robot still touches it", change(1, lambda i: touch(i, color, "drawer", "robot"))
        yield "robot touched it at the start", change(0, lambda i: touch(i, color, "base", "robot"))
        yield "started in the shelf", change(0, lambda i: touch(i, color, "shelf"))
        yield "leant on another block at the start", change(0, lambda i: touch(i, color, "base", "blue_block"))
        yield "never reached the drawer", change(1, lambda i: touch(i, color, "base"))
    elif name.startswith("push"):
        back = {"right": -0.02, "left": 0.02}[name.split("_")[3]]
        yield "moved too little", change(1, lambda i: move(i, color, dx=back))
        yield "lifted off", change(1, lambda i: touch(i, color, "robot"))
        yield "held at the start", change(0, lambda i: touch(i, color, "robot"))
        yield "lost what it leant on", change(0, lambda i: touch(i, color, "base", "door"))
    elif name.startswith("move"):
        yield "not far enough", change(1, lambda i: i.__setitem__("slider", 0.1 if i["slider"] else 0.02))
    elif name.endswith("drawer") and name.split("_")[0] in ("open", "close"):
        yield "not far enough", change(1, lambda i: i.__setitem__("drawer", 0.1 if i["drawer"] else 0.02))
    elif name.startswith("lift"):
        low = 0.025 if name.endswith("slider") else 0.045
        z = pair(name)[0]["block_position"][b, 2]
        yield "not high enough", change(1, lambda i: i["block_position"].__setitem__((b, 2), z + low))
        yield "still touches something", change(1, lambda i: touch(i, color, "robot", "door"))
        yield "thrown", change(1, lambda i: touch(i, color))
        yield "started elsewhere", change(0, lambda i: touch(i, color, "door"))
    elif name.startswith("place"):
        yield "still held", change(1, lambda i: touch(i, color, "robot", "shelf", "drawer"))
        yield "dropped elsewhere", change(1, lambda i: touch(i, color, "base"))
        yield "not held at the start", change(0, lambda i: touch(i, color, "shelf"))
        yield "held against something", change(0, lambda i: touch(i, color, "robot", "door"))
        yield "hand also touched the table", change(0, lambda i: touch(i, "robot", f"{color}_block", "base"))
        yield "hand also touched a block", change(0, lambda i: touch(i, "robot", f"{color}_block", "pink_block"))
    elif name == "stack_block":
        yield "still held", change(1, lambda i: touch(i, color, "blue_block", "robot"))
        yield "leans on the table too", change(1, lambda i: touch(i, color, "blue_block", "base"))
        yield "still falling", change(1, lambda i: i["block_velocity"].__setitem__(b, fast))
        yield "beside a block at the start", change(0, lambda i: touch(i, color, "base", "blue_block"))
    elif name == "unstack_block":
        yield "still touches a block", change(1, lambda i: touch(i, color, "base", "blue_block"))
        yield "only leant at the start", change(0, lambda i: touch(i, color, "base", "blue_block"))
        yield "was moving at the start", change(0, lambda i: i["block_velocity"].__setitem__(b, fast))
    else:
        light = name.split("_")[2]
        yield "already so", change(0, lambda i: i.__setitem__(light, 1 - i[light]))


NEGATIVES = [pytest.param(name, *infos, id=f"{name}: {why}") for name in tasks.TASKS for why, infos in spoil(name)]


@pytest.mark.parametrize(("name", "start", "end"), NEGATIVES)
def test_a_task_needs_each_of_its_conditions(name, start, end):
    assert name not in tasks.completed_tasks(start, end)


def test_every_task_has_a_negative_case():
    assert {case.values[0] for case in NEGATIVES} == set(tasks.TASKS)


def test_a_half_turn_is_no_rotation_task_at_all():
    start, end = pair("rotate_red_block_left")
    move(end, "red", yaw=np.pi)  # exactly 180 degrees: neither left nor right, by rounding on either side
    assert len(tasks.completed_tasks(start, end)) <= 1
    move(end, "red", yaw=np.deg2rad(190))
    assert tasks.completed_tasks(start, end) == {"rotate_red_block_right"}  # the shorter way round


def test_the_released_checker_lets_the_robot_touch_a_pushed_block():
    start, end = pair("push_into_drawer")
    touch(end, "red", "drawer", "robot")
    assert "push_into_drawer" not in tasks.completed_tasks(start, end)
    assert "push_into_drawer" in tasks.completed_tasks(start, end, as_released=True)


def test_conditions_are_the_same_in_a_jitted_batch():
    pairs = [pair(name) for name in tasks.TASKS]
    start, end = ({key: np.stack([p[i][key] for p in pairs]) for key in pairs[0][0]} for i in (0, 1))
    got = jax.jit(tasks.conditions)(jax.tree.map(jnp.asarray, start), jax.tree.map(jnp.asarray, end))
    np.testing.assert_array_equal(got, np.eye(34, dtype=bool))
    np.testing.assert_array_equal(tasks.conditions(start, end), np.eye(34, dtype=bool))
    assert tasks.completed_in_each(*zip(*pairs)) == [{name} for name in tasks.TASKS]


@given(st.lists(st.floats(-np.pi, np.pi), min_size=3, max_size=3), st.floats(-np.pi, np.pi))
@settings(max_examples=50, deadline=None)
def test_rotation_is_measured_in_the_world_frame(start_euler, yaw):
    """Turning an arbitrarily oriented block about the world's z axis is a pure yaw."""
    from scipy.spatial.transform import Rotation

    before = Rotation.from_euler("xyz", start_euler)
    after = Rotation.from_euler("z", yaw) * before
    roll, pitch, turned = tasks._turn(np, before.as_quat(), after.as_quat())
    assert abs(np.angle(np.exp(1j * (turned - yaw)))) < 1e-6
    assert max(abs(roll), abs(pitch)) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------


def test_phrasings_are_distinct_and_held_out_ones_are_new():
    trained = [text for task in tasks.TASKS.values() for text in task.phrasings]
    held_out = [text for task in tasks.TASKS.values() for text in task.held_out]
    assert len(set(trained + held_out)) == len(trained) + len(held_out)  # no two tasks are asked for alike
    assert not any("{" in text for text in trained + held_out)
    assert all(len(task.phrasings) >= 5 and len(task.held_out) >= 2 for task in tasks.TASKS.values())


def test_an_instruction_is_chosen_by_task_and_variant():
    red = tasks.TASKS["lift_red_block_table"]
    assert tasks.instruction(red.name, variant=len(red.phrasings) + 1) == red.phrasings[1]
    assert tasks.instruction(red.name, held_out=True) == red.held_out[0]
    with pytest.raises(ValueError, match="unknown task 'dance'"):
        tasks.instruction("dance")
    with pytest.raises(ValueError, match="unknown task 'dance'"):
        task_chains.successors({}, "dance")
