"""Other words for instructions: which are drawn, and which never may be."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax import cli
from robovlms_jax.data import base, language
from robovlms_jax.data.config import DataConfig

LIGHTS = {
    "turn_on_led": ["turn on the green light", "push the button so that the green light goes on"],
    "turn_off_led": ["turn off the green light"],
    "turn_on_lightbulb": ["turn on the yellow light bulb"],
}


def cut_from(words: list[str], sentence: list[str]) -> bool:
    """By the book: every word is found after the one before."""
    at = 0
    for word in words:
        if word not in sentence[at:]:
            return False
        at = sentence.index(word, at) + 1
    return True


def test_no_word_that_tells_tasks_apart_is_left_out():
    """Fails if a sentence is cut down to what another task's sentence could be cut to, too."""
    found = language.shorten(LIGHTS, 50)
    told = set(found["turn on the green light"])
    assert {"on green", "turn on the green", "on the green light"} <= told
    assert not told & {"turn on the light", "on the light", "the green light", "turn green light", "turn on"}
    assert all("off" in text for text in found["turn off the green light"])


@given(
    st.dictionaries(
        st.sampled_from("abc"), st.lists(st.text("xyz ,Z", min_size=1, max_size=12), min_size=1, max_size=4), max_size=3
    ),
    st.integers(1, 6),
)
def test_shorter_sentences_are_cut_from_their_own_and_from_no_other_tasks(meanings, count):
    found = language.shorten(meanings, count)
    assert found == language.shorten(meanings, count)  # the same for every process and run

    def words(text: str) -> list[str]:
        return [w.strip(",").lower() for w in text.split() if w.strip(",")]

    for meaning, sentences in meanings.items():
        others = [words(s) for other, listed in meanings.items() if other != meaning for s in listed]
        for sentence in sentences:
            if sum(sentence in listed for listed in meanings.values()) > 1:
                continue
            assert len(found[sentence]) <= count
            for text in found[sentence]:
                assert text and len(text.split()) < len(sentence.split())
                assert cut_from(words(text), words(sentence))
                assert not any(cut_from(words(text), other) for other in others)


def test_a_sentence_that_is_asked_in_evaluation_is_never_made():
    """Fails if leaving out words makes the benchmark's own sentence, however it is written."""
    meanings = {"push": ["go push the blue block to the left"]}
    assert "go push the blue block left" in language.shorten(meanings, 400)["go push the blue block to the left"]
    found = language.shorten(meanings, 400, never=["Go push the blue block left."])
    assert "go push the blue block left" not in found["go push the blue block to the left"]


def test_what_a_run_may_say_follows_its_configuration(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"sentences": {"open it": ["pull it open"]}, "never": ["pull open"]}))
    episodes = [base.Episode(0, 5, "open it", "open"), base.Episode(6, 9, "close it", "close", ("shut it",))]
    assert language.of_data(DataConfig(), episodes) is None
    config = DataConfig(vary_language=True, paraphrases=str(path), shorter_sentences=9)
    said = language.of_data(config, episodes, asked=["close"])
    assert said.of(episodes[0])[0] == "open it"  # the recorded one comes first
    assert set(said.of(episodes[0])) == {"open it", "pull it open", "open", "pull", "pull it", "it open"}
    assert set(said.of(episodes[1])) == {"close it", "shut it", "shut"}  # "it" is said of both, "close" is asked
    none = language.of_data(cli.override(config, shorter_sentences=0), episodes)
    assert set(none.of(episodes[0])) == {"open it", "pull it open"}


def test_episodes_without_a_task_are_told_apart_by_their_sentences():
    """Fails if all sentences of a dataset that names no tasks count as one meaning."""
    episodes = [base.Episode(0, 5, "pick up the cup", ""), base.Episode(6, 9, "pick up the can", "")]
    said = language.of_data(DataConfig(vary_language=True, shorter_sentences=50), episodes)
    assert all("cup" in text for text in said.shortened["pick up the cup"])
    assert "pick cup" in said.shortened["pick up the cup"]


@pytest.mark.parametrize("field", [{"paraphrases": "x.json"}, {"shorter_sentences": 3}])
def test_a_field_that_would_have_no_effect_is_refused(field):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(field))} needs --data\.vary_language"):
        DataConfig(**field)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match=r"data\.shorter_sentences=-1"):
        DataConfig(vary_language=True, shorter_sentences=-1)
