"""The page's commands over a real socket: who may drive, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from robovlms_jax.control.execution import Execution
from robovlms_jax.demo import loop as loops
from robovlms_jax.teaching import show
from robovlms_jax.web import pages
from robovlms_jax.web.access import LIVE, Access, page_headers
from tests.teaching.test_lesson import make
from tests.web.visiting import Serving, eventually, say, serving, told

from websockets.exceptions import InvalidStatus  # isort: skip


class Shown(Serving):
    """The page of a lesson without physics or policy."""

    def __init__(self, lesson, token=""):
        self.page, self._lesson = show.Teaching(Access(token=token)), lesson
        super().__init__(lambda: self.page.server)

    def begun(self):
        sizes = {"static": 8, "wrist": 8}
        self.page.show(self._lesson, show.TeachingConfig("a test", sizes, sizes, Execution(), 60))


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setattr(loops.Painter, "draw", lambda self, moment, camera: np.zeros((8, 8, 3), np.uint8))
    lesson, world, _, shelf = make()
    it = Shown(lesson)
    it.lesson, it.world, it.shelf = lesson, world, shelf
    with serving(it):
        yield it
        it.page.close()


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere():
    page = pages.read(show.PAGE)
    assert "://" not in re.sub(r'"wss?://"', "", page)
    assert not re.search(r"(src|href)=\"(?!data:,)", page) and "@import" not in page and "innerHTML" not in page
    policy = page_headers(page)["Content-Security-Policy"]
    assert "unsafe" not in policy and len(re.findall(r"'sha256-", policy)) == 3
    assert not re.search(r"\sstyle=|\son\w+=\"", page)


def test_one_visitor_drives_others_watch_and_who_leaves_lets_the_hand_stand_still(shown):
    with shown.connect() as first:
        assert told(first, "hello")["about"] == "a test"
        say(first, "begin")
        eventually(lambda: shown.lesson.phase == "policy")
        say(first, "drive", x=0, y=0, z=0.1, turn=0)
        eventually(lambda: shown.lesson.phase == "person")
        with shown.connect() as second:
            told(second, "you", controls=False)
            say(second, "drive", x=0, y=1, z=0, turn=0)
            assert "watching" in told(second, "refused")["why"]
            say(second, "stop")  # anybody may
            eventually(lambda: shown.lesson.phase == "paused")
        assert not any(step[1] for step in shown.world.steps)
        say(first, "take")
        eventually(lambda: shown.lesson.phase == "person")
        say(first, "grip", value=-1)
        eventually(lambda: shown.world.robot_obs[14] == -1)
    eventually(lambda: shown.lesson.phase == "paused")
    assert not shown.shelf.trials


def test_numbers_that_are_none_and_commands_that_there_are_not_are_refused(shown):
    with shown.connect() as line:
        told(line, "you", controls=True)
        for kind, values, why in (
            ("drive", {"x": 0, "y": 0, "z": "up", "turn": 0}, "z='up'"),
            ("drive", {"x": 0, "y": 0, "turn": 0}, "z='None'"),
            ("drive", {"x": True, "y": 0, "z": 0, "turn": 0}, "x='True'"),
            ("grip", {}, "value='None'"),
            ("speed", {"value": 3}, "none of"),
            ("delete", {}, "no command 'delete'"),
        ):
            say(line, kind, **values)
            assert why in told(line, "refused")["why"]
        say(line, "drive", x=1e9, y=0, z=0, turn=-7)  # however much is asked for, an action has its bounds
        eventually(lambda: shown.world.steps)
        np.testing.assert_array_equal(shown.world.steps[0], [1, 0, 0, 0, 0, -1, shown.world.steps[0][6]])


def test_other_sites_and_people_without_the_token_are_kept_out():
    with serving(Shown(make()[0], token="s3cret")) as it:
        try:
            assert it.get("/")[0] == 401 and it.get("/?token=s3cret")[0] == 200
            for path, origin in ((LIVE, True), (f"{LIVE}?token=s3cret", "http://evil.example")):
                with pytest.raises(InvalidStatus), it.connect(path=path, origin=origin):
                    pass
        finally:
            it.page.close()
