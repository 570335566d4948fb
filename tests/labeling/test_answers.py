"""Answers are on the disk before anybody is told so, and none is asked for twice."""

from __future__ import annotations

import json
import os

import pytest

from robovlms_jax.labeling.answers import Answers, Given, Pair, read
from robovlms_jax.rl.segments import Segment

ABOUT = {"rollouts": "abc", "steps": 50, "every": 5}
PAIRS = [Pair(Segment(0, 0), Segment(2, 5)), Pair(Segment(1, 3), Segment(3, 0))]


def test_answers_are_synced_to_the_disk_one_by_one_and_found_again(tmp_path, monkeypatch):
    path, synced = tmp_path / "new" / "answers.jsonl", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), sync(handle))[1])
    kept = Answers(path, ABOUT)
    before = len(synced)
    kept.add(PAIRS[0], "left")
    assert len(synced) == before + 1
    kept.add(PAIRS[1], "skip")
    again = Answers(path, ABOUT)
    assert again.given == [Given(PAIRS[0], "left"), Given(PAIRS[1], "skip")]
    assert Pair(*reversed(PAIRS[0])).key in again.asked  # whichever stands left


def test_a_last_line_that_was_cut_off_is_reported_and_only_that_pair_is_open_again(tmp_path, caplog):
    path = tmp_path / "answers.jsonl"
    kept = Answers(path, ABOUT)
    kept.add(PAIRS[0], "equal")
    whole = path.read_bytes()
    kept.add(PAIRS[1], "right")
    path.write_bytes(path.read_bytes()[:-9])  # as a killed process leaves it
    again = Answers(path, ABOUT)
    assert "ends in an unfinished line" in caplog.text and str(path) in caplog.text
    assert again.asked == {PAIRS[0].key}
    again.add(PAIRS[1], "left")
    assert path.read_bytes().startswith(whole) and read(path)[1][1] == Given(PAIRS[1], "left")


def test_answers_about_other_segments_are_not_mixed(tmp_path):
    path = tmp_path / "answers.jsonl"
    Answers(path, ABOUT).add(PAIRS[0], "left")
    with pytest.raises(ValueError, match=r"answers about other segments \(steps: 50 there, 25 here"):
        Answers(path, {**ABOUT, "steps": 25})


@pytest.mark.parametrize("line", ["[]", '{"left": [0, 0], "right": [1], "answer": "left"}', '{"answer": "both"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    Answers(path, ABOUT)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"answers.jsonl, line 2 is not an answer"):
        Answers(path, ABOUT)


def test_what_is_no_answer_is_not_stored(tmp_path):
    kept = Answers(tmp_path / "answers.jsonl", ABOUT)
    with pytest.raises(ValueError, match="'maybe' is none of left, right, equal, skip"):
        kept.add(PAIRS[0], "maybe")
    assert not kept.given and json.loads(kept.path.read_text()) == {"version": 1, **ABOUT}
