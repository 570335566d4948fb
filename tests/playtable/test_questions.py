"""Questions about PlayTable: answers are what the state says, and the same settings give the same files."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from robovlms_jax.data.vl import opening
from robovlms_jax.playtable import questions

RANGE = np.array([0.28, 0.22, 0.02, 0.088])
INFO = {
    "slider": 0.28,
    "drawer": 0.0,
    "lightbulb": 1,
    "led": 0,
    "block_position": np.array([[-0.2, 0.09, 0.46], [0.1, -0.1, 0.46], [0.0, -0.12, 0.46]]),  # red, blue, pink
}
BUNDLED = pathlib.Path(__file__).resolve().parents[2] / "data" / "playtable_questions"


def test_answers_follow_from_the_state():
    found = dict(questions.questions(INFO, RANGE))
    assert found == {
        "Is the drawer open or closed?": "closed",
        "Is the sliding door on the left or on the right?": "left",
        "Is the lightbulb on or off?": "on",
        "Is the green light on or off?": "off",
        "Where is the red block?": "on the shelf",
        "Where is the blue block?": "on the table",
        "Where is the pink block?": "on the table",
        "Which block is furthest to the left?": "red",
        "Which block is furthest to the right?": "blue",
    }


def test_blocks_side_by_side_are_not_asked_about_by_their_order():
    near = {**INFO, "block_position": INFO["block_position"] * np.array([0.1, 1, 1])}
    assert not any("furthest" in question for question, _ in questions.questions(near, RANGE))


def test_the_bundled_set_is_small_and_can_be_opened():
    sizes = [path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(sizes) < 300_000
    counts = [len(opening.open_pairs(str(BUNDLED / f"{split}.jsonl"))) for split in ("train", "validation")]
    assert counts == [50, 16]
    answers = {
        turn["value"]
        for line in (BUNDLED / "train.jsonl").read_text().splitlines()
        for turn in json.loads(line)["conversations"]
        if turn["from"] == "gpt"
    }
    assert {"open", "closed", "on", "off", "left", "right", "red", "blue", "pink"} < answers
