"""Answers are on the disk before anybody is told so, and none is asked for twice."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from experiments import label
from robovlms_jax.labeling.answers import Answers, Given, Pair, read, require_within
from robovlms_jax.rl.segments import Segment
from robovlms_jax.training import directory
from tests.labeling.made_up import rollouts

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


@pytest.mark.parametrize("pair", [((0, 0), (9, 0)), ((0, 0), (2, 8)), ((0, -1), (2, 0)), ((0, 0), (1, 0))])
def test_an_answer_about_clips_that_there_are_not_or_of_two_tasks_is_named(tmp_path, pair):
    given = [Given(Pair(Segment(0, 3), Segment(2, 0)), "left"), Given(Pair(*(Segment(*side) for side in pair)), "left")]
    path = tmp_path / "answers.jsonl"
    require_within(rollouts(), given[:1], 5, path)
    with pytest.raises(ValueError, match=r"answers.jsonl, line 3 is about .*no two clips of 5 steps of one task in 4"):
        require_within(rollouts(), given, 5, path)


def test_impossible_questions_are_refused():
    for field, value in (("pairs", 0), ("seed", -1), ("steps", 7), ("picture_size", 9)):
        with pytest.raises(ValueError, match=f"{field}={value}"):
            label.LabelConfig(**{field: value})


def test_two_programs_do_not_write_to_the_same_answers(tmp_path):
    with directory.claim(tmp_path), pytest.raises(ValueError, match="is being written by process"):
        asyncio.run(label.run(label.LabelConfig(out=str(tmp_path), port=0)))


def test_what_is_no_answer_is_not_stored(tmp_path):
    kept = Answers(tmp_path / "answers.jsonl", ABOUT)
    with pytest.raises(ValueError, match="'maybe' is none of left, right, equal, skip"):
        kept.add(PAIRS[0], "maybe")
    assert not kept.given and json.loads(kept.path.read_text()) == {"version": 1, **ABOUT}
