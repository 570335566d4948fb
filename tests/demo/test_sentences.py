"""What is typed, and what it is taken for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.scripted_presets import FIXTURE_TASKS
from robovlms_jax.demo.sentences import MAX_LENGTH, Sentences, clean
from robovlms_jax.envs.calvin import tasks


def of(names):
    return Sentences({name: tasks.TASKS[name].phrasings for name in names})


EIGHT, ALL = of(FIXTURE_TASKS), of(tasks.TASKS)


@pytest.mark.parametrize("known", [EIGHT, ALL], ids=["eight", "all"])
def test_every_known_sentence_is_its_own_task(known):
    for task, texts in known.known.items():
        for text in texts:
            for typed in (text, text.upper(), f"  {text}!\n"):
                reading = known.read(typed)
                assert reading.kind == "known" and [(x.task, x.sentence) for x in reading.matches] == [(task, text)]


@settings(max_examples=40)
@given(st.data())
def test_a_known_sentence_that_is_said_politely_is_never_another_task(data):
    task = data.draw(st.sampled_from(sorted(EIGHT.known)))
    text = data.draw(st.sampled_from(EIGHT.known[task]))
    before = data.draw(st.sampled_from(["", "please ", "could you ", "now, robot, ", "I want you to "]))
    after = data.draw(st.sampled_from(["", " please", " now", " for me", "!", "?"]))
    reading = EIGHT.read(before + text + after)
    assert reading.understood and reading.matches[0].task == task


@settings(max_examples=40)
@given(st.data())
def test_no_known_sentence_is_obeyed_when_it_is_forbidden_or_asked(data):
    text = data.draw(st.sampled_from([text for texts in ALL.known.values() for text in texts]))
    before = data.draw(
        st.sampled_from(
            [
                "do not",
                "don't",
                "don\u2019t",
                "DONT",
                "never",
                "please do not",
                "you must not",
                "why did you",
                "is it ok to",
            ]
        )
    )
    assert not ALL.read(f"{before} {text}").understood
    assert not EIGHT.read(f"{before} {text}").understood


@pytest.mark.parametrize(("known", "right", "wrong"), [(EIGHT, 22, 0), (ALL, 51, 2)], ids=["eight", "all"])
def test_wordings_that_nobody_trained_on_find_their_task_or_are_asked_about(known, right, wrong):
    # Of 24 and 102 held-out wordings; most of the others are asked about.
    readings = [(task, known.read(text)) for task in known.known for text in tasks.TASKS[task].held_out]
    understood = [(task, reading.matches[0]) for task, reading in readings if reading.understood]
    assert sum(task == match.task for task, match in understood) >= right
    assert sum(task != match.task for task, match in understood) <= wrong


@pytest.mark.parametrize(
    ("typed", "task"),
    [
        ("opn the drawr", "open_drawer"),
        ("Please, open the drawer for me?", "open_drawer"),
        ("could you open the drawer?", "open_drawer"),
        ("shut the drawer", "close_drawer"),
        ("led on", "turn_on_led"),
        ("turn on the green lamp", "turn_on_led"),
        ("bulb off", "turn_off_lightbulb"),
        ("switch off the lamp", "turn_off_lightbulb"),
        ("the yellow one off", "turn_off_lightbulb"),
        ("the door goes right", "move_slider_right"),
        ("take the door handle leftwards", "move_slider_left"),
    ],
)
def test_short_polite_and_misspelt_sentences_are_understood(typed, task):
    reading = EIGHT.read(typed)
    assert reading.kind == "meant" and [match.task for match in reading.matches] == [task]


LIGHTS_ON, LIGHTS_OFF = {"turn_on_led", "turn_on_lightbulb"}, {"turn_off_led", "turn_off_lightbulb"}
DOOR, DRAWER = {"move_slider_left", "move_slider_right"}, {"open_drawer", "close_drawer"}


@pytest.mark.parametrize(
    ("typed", "choices"),
    [
        *(("turn on the light", LIGHTS_ON), ("turn off everything", LIGHTS_OFF), ("turn off all lights", LIGHTS_OFF)),
        *(("open the door", DOOR), ("close the door", DOOR), ("slide the door", DOOR), ("open the cabinet", DOOR)),
        *(("drawer", DRAWER), ("open and close the drawer", DRAWER), ("kick the drawer", DRAWER)),
        ("press the button", {"turn_on_led", "turn_off_led"}),
        ("flip the lever", {"turn_on_lightbulb", "turn_off_lightbulb"}),
        ("open the drawer and turn on the green light", {"open_drawer", "turn_on_led"}),
        ("open the drawer, then turn on the light", {"open_drawer"}),  # which light is another question
        *(("open", {"open_drawer"}), ("open the fridge", {"open_drawer"}), ("move left", {"move_slider_left"})),
    ],
)
def test_what_may_mean_several_things_or_names_none_is_asked_about(typed, choices):
    reading = EIGHT.read(typed)
    assert reading.kind == "unclear" and {match.task for match in reading.matches} == choices


@pytest.mark.parametrize("typed", ["make it bright", "be slight", "sit upright"])
def test_words_that_only_end_like_known_ones_are_not_taken_for_them(typed):
    assert EIGHT.read(typed).kind in ("unknown", "refused")


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        *((x, "not to do") for x in ("do not open the drawer", "don't open the drawer", "never close the drawer")),
        *((x, "not to do") for x in ("don\u2019t close it", "leave the drawer alone", "turn the light off, not on")),
        *((x, "question") for x in ("what is a drawer?", "is the drawer open?", "did you open the drawer", "led on?")),
        *((x, "question") for x in ("what can you do?", "What is this?", "what do you do")),  # no misspelt "wait"
        *((x, "question") for x in ("can the drawer open", "what is the weather tomorrow", "drawer open?")),
        *((x, "depends") for x in ("open the drawer if the light is on", "open the drawer after that")),
        ("the drawer is open", "how something is"),
    ],
)
def test_what_forbids_asks_or_describes_is_refused_with_the_reason(typed, why):
    reading = EIGHT.read(typed)
    assert reading.kind == "refused" and why in reading.why


@pytest.mark.parametrize(
    "typed",
    [
        *(
            "stop",
            "STOP!",
            "halt",
            "wait",
            "freeze",
            "stop it now",
            "please stop",
            "hold on",
            "stop the drawer",
            "stpo",
        ),
        *("don't move", "do not do anything", "stand still", "멈춰", "멈춰!", "그만해", "정지", "停", "止まれ", "стоп"),
        *("stpo", "Stopp!", "arrête", "para", "warte", "no", "cancel", "abort", "wait a second"),
    ],
)
def test_what_asks_for_a_stop_is_a_stop_in_many_words_and_languages(typed):
    assert EIGHT.read(typed).kind == "stop"


@pytest.mark.parametrize("typed", ["hold the door", "leave the block in the drawer", "top", "shut the drawer"])
def test_what_only_sounds_like_a_stop_is_none_where_something_is_said_of_it(typed):
    assert ALL.read(typed).kind != "stop"


@pytest.mark.parametrize(
    "typed",
    [
        *("lift the red block", "push the blue block left", "put the red block in the drawer", "kill all humans"),
        *("Öffne die Tür", "hello robot", "12345", "?!", "<b>bold</b>", "x" * 500, "make me a coffee"),
    ],
)
def test_what_is_unlike_every_known_sentence_is_not_understood(typed):
    assert EIGHT.read(typed).kind == "unknown"


@settings(max_examples=40)
@given(st.text(max_size=400))
def test_any_text_is_read_and_prints_on_one_line(text):
    reading = EIGHT.read(text)
    assert all(0 <= x.similarity <= 1 and x.sentence in EIGHT.known[x.task] for x in reading.matches)
    assert len(reading.matches) == 1 if reading.understood else len(reading.matches) != 1 or reading.kind == "unclear"
    assert bool(reading.why) == (reading.kind == "refused") and bool(clean(text)) == (reading.kind != "empty")
    cleaned = clean(text)
    assert len(cleaned) <= MAX_LENGTH and cleaned == clean(cleaned)
    assert not any(x in cleaned for x in "\n\r\t\x00\x1b")


@pytest.mark.parametrize("value", [None, 3, ["open"], {"text": 1}, b"open"])
def test_what_is_no_text_is_empty(value):
    assert clean(value) == ""


def test_a_list_without_sentences_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Sentences({"open_drawer": ()})
