"""Korean sentences."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from robovlms_jax.driving import instructions, scenarios

NAMES = list(scenarios.SCENARIOS)


def test_the_documents_sentences_come_first_and_no_sentence_means_two_things():
    assert instructions.wordings("1box_vert_left")[0] == "박스를 왼쪽으로 돌아서 컵까지 가세요"
    every = [
        (sentence, name)
        for name in NAMES
        for held in (0, 1)
        for sentence in instructions.wordings(name, held_out=bool(held))
    ]
    assert len(dict(every)) == len(every)
    assert all(unicodedata.is_normalized("NFC", sentence) for sentence, _ in every)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_wordings_are_none_of_trainings_but_for_their_spaces_either(name):
    training = {x.replace(" ", "") for x in instructions.wordings(name)}
    held_out = {x.replace(" ", "") for x in instructions.wordings(name, held_out=True)}
    assert len(training) >= 100 and len(held_out) >= 20 and training.isdisjoint(held_out)


@pytest.mark.parametrize("name", NAMES)
def test_every_wording_names_its_side_and_only_that(name):
    words = {"left": ("왼쪽", "왼편", "좌측"), "right": ("오른쪽", "오른편", "우측")}
    side = name.rpartition("_")[2]
    other = {"left": "right", "right": "left"}[side]
    for sentence in (*instructions.wordings(name), *instructions.wordings(name, held_out=True)):
        assert any(word in sentence for word in words[side]) and not any(word in sentence for word in words[other])


def test_mistyping_changes_spaces_and_nothing_else():
    rng = np.random.default_rng(0)
    for sentence in instructions.wordings("2box_vert_right")[:40]:
        typed = instructions.mistyped(sentence, rng)
        assert typed != sentence and typed.replace(" ", "") == sentence.replace(" ", "")
        assert abs(len(typed) - len(sentence)) == 1


def test_asking_is_drawn_from_the_seed():
    asked = [instructions.ask("2box_hori_left", seed) for seed in range(200)]
    assert asked == [instructions.ask("2box_hori_left", seed) for seed in range(200)]
    plain = set(instructions.wordings("2box_hori_left"))
    assert len(set(asked)) > 100 and 0.1 < np.mean([x not in plain for x in asked]) < 0.4


def test_noise_adds_or_drops_one_word_and_never_the_side():
    rng = np.random.default_rng(0)
    sentence = instructions.CANONICAL["2box_vert_left"]
    lengths = set()
    for _ in range(60):
        heard = instructions.noisy(sentence, rng)
        lengths.add(len(heard.split(" ")) - len(sentence.split(" ")))
        assert "왼쪽" in heard and heard != sentence
    assert lengths == {-1, 1}


def test_held_out_wordings_have_words_that_training_never_has():
    for name in NAMES:
        words = {word for sentence in instructions.wordings(name) for word in sentence.split(" ")}
        for sentence in instructions.wordings(name, held_out=True):
            assert len([word for word in sentence.split(" ") if word not in words]) >= 2, sentence
