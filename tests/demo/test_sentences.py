"""The nearest known sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.calvin_abcd import FIXTURE_TASKS
from robovlms_jax.demo.sentences import MAX_LENGTH, Sentences, clean
from robovlms_jax.envs.calvin import tasks


def of(names):
    return Sentences({name: tasks.TASKS[name].phrasings for name in names})


EIGHT, ALL = of(FIXTURE_TASKS), of(tasks.TASKS)


@pytest.mark.parametrize("known", [EIGHT, ALL], ids=["eight", "all"])
def test_every_known_sentence_is_its_own_nearest_one(known):
    for task, texts in known.known.items():
        for text in texts:
            for typed in (text, text.upper(), f"  {text}!\n"):
                match = known.nearest(typed)
                assert (match.sentence, match.similarity) == (text, 1.0) and task in (match.task, task)


@pytest.mark.parametrize(("known", "right", "wrong"), [(EIGHT, 22, 0), (ALL, 60, 10)], ids=["eight", "all"])
def test_wordings_that_nobody_trained_on_mostly_find_their_task(known, right, wrong):
    # Of 24 and 102 held-out wordings; the others are answered with "I know nothing like that".
    matches = [(task, known.nearest(text)) for task in known.known for text in tasks.TASKS[task].held_out]
    understood = [(task, match) for task, match in matches if match.understood]
    assert sum(task == match.task for task, match in understood) >= right
    assert sum(task != match.task for task, match in understood) <= wrong


@pytest.mark.parametrize(
    ("typed", "task"),
    [
        ("opn the drawr", "open_drawer"),
        ("Please, open the drawer for me?", "open_drawer"),
        ("shut the drawer", "close_drawer"),
        ("led on", "turn_on_led"),
        ("bulb off", "turn_off_lightbulb"),
        ("the door goes right", "move_slider_right"),
        ("take the door handle leftwards", "move_slider_left"),
    ],
)
def test_short_polite_and_misspelt_sentences_are_understood(typed, task):
    match = EIGHT.nearest(typed)
    assert match.task == task and match.understood and match.similarity < 1


@pytest.mark.parametrize(
    "typed",
    [
        *("what is the weather tomorrow", "lift the red block", "push the blue block left", "kill all humans"),
        *("Öffne die Tür", "hello robot", "12345", "?!", "<b>bold</b>", "x" * 500),
    ],
)
def test_what_is_unlike_every_known_sentence_is_not_understood(typed):
    assert not EIGHT.nearest(typed).understood


@given(st.text(max_size=400))
def test_any_text_has_a_nearest_sentence_and_prints_on_one_line(text):
    match = EIGHT.nearest(text)
    assert 0 <= match.similarity <= 1 and match.sentence in EIGHT.known[match.task]
    cleaned = clean(text)
    assert len(cleaned) <= MAX_LENGTH and cleaned == clean(cleaned)
    assert not any(x in cleaned for x in "\n\r\t\x00\x1b")


@pytest.mark.parametrize("value", [None, 3, ["open"], {"text": 1}, b"open"])
def test_what_is_no_text_is_empty(value):
    assert clean(value) == ""


def test_a_list_without_sentences_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Sentences({"open_drawer": ()})
