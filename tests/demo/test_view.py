"""What people see of the table, and of its being made ready."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from robovlms_jax.demo.live import Live
from robovlms_jax.demo.world import project, starts
from robovlms_jax.envs.calvin import task_chains, tasks
from robovlms_jax.playtable.scene import BOX_BODY, SCENES, make_scene
from robovlms_jax.web.access import Access


@pytest.mark.parametrize("table", sorted(SCENES))
def test_both_lamps_of_every_table_are_whole_in_peoples_picture(table):
    boxes = make_scene(table).table
    for name in ("led", "lightbulb"):
        row = int(np.flatnonzero(tasks.BODIES.index(name) == BOX_BODY)[0])
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))
        corners = boxes.center[row] + signs * (boxes.half[row] + 0.01)  # a bulb is drawn larger than its box
        seen = np.asarray(project(corners))
        assert (seen > 0.01).all() and (seen < 0.99).all(), name


def test_the_first_scene_is_one_in_which_the_drawer_can_be_opened_and_tables_take_turns():
    names = ("turn_on_led", "close_drawer", "open_drawer")
    for seed in range(8):
        scenes = list(itertools.islice(starts(names, seed), 9))
        assert [scene.table for scene in scenes] == list("DABCDABCD")
        assert task_chains.successors(scenes[0].condition, "open_drawer")
    assert len({scene.condition["drawer"] for scene in scenes}) == 2  # only the first one is chosen


def test_what_is_ready_is_counted_and_what_is_missing_is_named():
    live, told, first = Live(Access(), "page"), [], threading.Event()
    live.server.prepare = lambda *said: told.append(said)
    made = live._compile([("the table", lambda: first.wait(5)), ("the policy", lambda: first.set() or "policy")])
    assert made == [True, "policy"] and told[0] == ("Compiling: the table, the policy", 0, 2)
    assert told[1][1:] == (1, 2) and told[2] == ("Making the table", 2, 2)
