"""The page's protocol over a real socket: what is asked, what is stored, who is kept out."""

from __future__ import annotations

import errno
import re

import numpy as np
import pytest

from robovlms_jax.labeling.answers import Answers, Pair
from robovlms_jax.labeling.server import PAGE, LabelServer, Work
from robovlms_jax.rl.segments import Segment
from robovlms_jax.web import pages
from robovlms_jax.web.access import LIVE, Access, page_headers
from robovlms_jax.web.messages import unpack
from tests.web.visiting import Serving, say, serving, told

from websockets.exceptions import InvalidStatus  # isort: skip

PAIRS = [Pair(Segment(0, i), Segment(1, i)) for i in range(3)]


def show(pair):
    clip = np.full((2, 8, 8, 3), 40 * pair.left.start, np.uint8)
    return {"instruction": f"pair {pair.left.start}", "rate_hz": 15}, {"left_static": clip, "right_static": clip}


class Running(Serving):
    def __init__(self, path, token="", pairs=PAIRS):
        self.answers = Answers(path, {"steps": 1})
        self._pairs = pairs
        super().__init__(lambda: LabelServer(Access(token=token), "<script>1</script>page"))

    def begun(self):
        self.server.open(Work(self.answers, self._pairs, show))


def asked(line):
    """The next pair that is shown."""
    while isinstance(message := line.recv(5), str):
        pass
    facts, pictures = unpack(message)
    assert set(pictures) == {f"{side}_static_{i}" for side in ("left", "right") for i in range(2)}
    return facts


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere():
    page = pages.read(PAGE)
    assert "://" not in re.sub(r'"wss?://"', "", page)
    assert not re.search(r"(src|href)=\"(?!data:,)", page) and "@import" not in page and "innerHTML" not in page
    assert "unsafe" not in page_headers(page)["Content-Security-Policy"]
    assert not re.search(r"\sstyle=|\son\w+=\"", page)


def test_every_pair_is_asked_once_and_stored_and_not_again_after_a_restart(tmp_path):
    path = tmp_path / "answers.jsonl"
    with serving(Running(path)) as it, it.connect() as line:
        first = asked(line)
        assert (first["instruction"], first["answered"], first["total"]) == ("pair 0", 0, 3)
        say(line, "answer", pair=first["pair"], answer="left")
        second = asked(line)
        assert second["instruction"] == "pair 1" and Answers(path, {"steps": 1}).given == it.answers.given
        say(line, "answer", pair=second["pair"], answer="equal")
        asked(line)
    with serving(Running(path)) as it, it.connect() as line:
        last = asked(line)
        assert (last["instruction"], last["answered"], last["total"]) == ("pair 2", 2, 3)
        say(line, "answer", pair=last["pair"], answer="skip")
        assert told(line, "done")["answered"] == 3
        assert [given.answer for given in it.answers.given] == ["left", "equal", "skip"]


def test_two_people_are_asked_about_different_pairs_and_who_leaves_hands_theirs_on(tmp_path):
    with serving(Running(tmp_path / "a.jsonl", pairs=PAIRS[:2])) as it, it.connect() as first:
        mine = asked(first)
        with it.connect() as second:
            assert asked(second)["instruction"] == "pair 1"
        say(first, "answer", pair=mine["pair"], answer="right")
        assert asked(first)["instruction"] == "pair 1"


def test_what_is_no_answer_to_what_was_asked_is_refused_and_not_stored(tmp_path):
    with serving(Running(tmp_path / "a.jsonl")) as it, it.connect() as line:
        number = asked(line)["pair"]
        for content, why in (
            ({"pair": number + 1, "answer": "left"}, "not asked about now"),
            ({"pair": [number], "answer": "left"}, "not asked about now"),
            ({"pair": number, "answer": "both"}, "none of left, right, equal, skip"),
            ({"pair": number}, "none of left"),
        ):
            say(line, "answer", **content)
            assert why in told(line, "refused")["why"]
        say(line, "delete", pair=number)
        assert "no command 'delete'" in told(line, "refused")["why"]
        assert not it.answers.given


def test_an_answer_that_cannot_be_written_is_not_counted_and_may_be_given_again(tmp_path, monkeypatch):
    with serving(Running(tmp_path / "a.jsonl")) as it, it.connect() as line:
        number = asked(line)["pair"]
        with monkeypatch.context() as full:

            def add(pair, answer):
                raise OSError(errno.ENOSPC, "No space left on device")

            full.setattr(it.answers, "add", add)
            say(line, "answer", pair=number, answer="left")
            assert "not stored (No space left on device)" in told(line, "refused")["why"]
        say(line, "answer", pair=number, answer="left")
        assert asked(line)["answered"] == 1


def test_other_sites_and_people_without_the_token_are_kept_out(tmp_path):
    with serving(Running(tmp_path / "a.jsonl", token="s3cret")) as it:
        assert it.get("/")[0] == 401 and it.get("/?token=s3cret")[0] == 200
        for path, origin in ((LIVE, True), (f"{LIVE}?token=s3cret", "http://evil.example")):
            with pytest.raises(InvalidStatus), it.connect(path=path, origin=origin):
                pass
        with it.connect(path=f"{LIVE}?token=s3cret") as line:
            asked(line)
