"""Other words for instructions: which are drawn, and which never may be."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax import cli
from robovlms_jax.data import base, language, opening, shortening
from robovlms_jax.data.config import DataConfig
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.runs import setup as setups
from robovlms_jax.runs import validation
from tests.experiments.test_calvin_abcd import small

ROOT = pathlib.Path(__file__).resolve().parents[2]

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
    found = shortening.shorten(LIGHTS, 50)
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
    found = shortening.shorten(meanings, count)
    assert found == shortening.shorten(meanings, count)  # the same for every process and run

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
    assert "go push the blue block left" in shortening.shorten(meanings, 400)["go push the blue block to the left"]
    found = shortening.shorten(meanings, 400, never=["Go push the blue block left."])
    assert "go push the blue block left" not in found["go push the blue block to the left"]


def dataset(episodes, names_tasks=True):
    return types.SimpleNamespace(episodes=tuple(episodes), names_tasks=names_tasks)


def test_what_a_run_may_say_follows_its_configuration(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"sentences": {"open it up": ["pull it wide open"]}, "never": ["pull open"]}))
    episodes = [base.Episode(0, 5, "open it up", "open"), base.Episode(6, 9, "close it", "close", ("shut it now",))]
    assert language.of_data(DataConfig(), [dataset(episodes)]) is None
    config = DataConfig(vary_language=True, paraphrases=str(path), shorter_sentences=99)
    said = language.of_data(config, [dataset(episodes)], asked=["shut now"])
    assert said.of(episodes[0])[0] == "open it up"  # the recorded one comes first
    cut = {"open up", "open it", "pull wide", "wide open", "pull it open", "pull wide open", "pull it", "it open"}
    cut |= {"pull it wide", "it wide", "it wide open", "it up"}
    assert set(said.of(episodes[0])) == {"open it up", "pull it wide open", *cut}
    assert set(said.of(episodes[1])) == {"close it", "shut it now", "shut it", "it now"}  # "shut now" is asked
    none = language.of_data(cli.override(config, shorter_sentences=0), [dataset(episodes)])
    assert set(none.of(episodes[0])) == {"open it up", "pull it wide open"}


def test_what_nobody_is_told_is_not_said_by_paraphrases_and_templates_either(tmp_path):
    """Fails if a template, a paraphrase or a mirror image makes a sentence that is kept for evaluation."""
    path = tmp_path / "words.json"
    words = {"sentences": {"push left": ["shove left"]}, "templates": ["now {instruction}"]}
    path.write_text(json.dumps(words | {"never": ["Now push left!", "shove left"]}))
    episode = base.Episode(0, 5, "push left", "push")
    said = language.of_data(DataConfig(vary_language=True, paraphrases=str(path)), [dataset([episode])])
    assert said.of(episode) == ("push left", "now shove left")
    path.write_text(json.dumps(words | {"never": ["shove right"]}))
    config = DataConfig(
        vary_language=True, paraphrases=str(path), shorter_sentences=3, augment=AugmentConfig(mirror=0.5)
    )
    mirrored = language.of_data(config, [dataset([episode])])
    assert "shove left" not in mirrored.of(episode)  # half of the samples would say it


@pytest.mark.parametrize("names_tasks", [True, False])
def test_what_other_tasks_may_be_asked_in_is_told_apart_from_what_is_learned(tmp_path, names_tasks):
    """Fails if "lift it from the" is learned of the table while the drawer is asked for in such words, of a task that
    data lack; or if a sentence of the task itself forbids what could be left of it."""
    path = tmp_path / "words.json"
    words = {"table": ["go and lift it from the table"], "drawer": ["lift it from the drawer"]}
    episode = base.Episode(0, 5, "lift it from the table", "table" if names_tasks else "mine")
    config = DataConfig(vary_language=True, paraphrases=str(path), shorter_sentences=99)
    told = {}
    for name, tasks in (("none", {}), ("own", {"table": ["go and lift it from the table"]}), ("all", words)):
        own = {"table": [*tasks.get("table", ()), episode.instruction]} if tasks else {}
        path.write_text(json.dumps({"tasks": tasks | own}))
        told[name] = set(language.of_data(config, [dataset([episode], names_tasks)]).of(episode))
    assert told["none"] == told["own"] > told["all"]
    assert "lift it from the" in told["own"] - told["all"] and "lift from table" in told["all"]
    assert all("table" in sentence for sentence in told["all"])
    # Other signs and capitals are the same sentence; one of two tasks says neither.
    other = dataclasses.replace(episode, instruction="Lift it from the table.")
    assert len(set(language.of_data(config, [dataset([other], names_tasks)]).of(other))) == len(told["all"])
    path.write_text(json.dumps({"tasks": {"a": [episode.instruction], "b": [episode.instruction]}}))
    told_of = language.of_data(config, [dataset([episode], names_tasks)]).of(episode)
    assert told_of == (episode.instruction,)


def test_episodes_without_a_task_are_told_apart_by_their_sentences():
    """Fails if all sentences of a dataset that names no tasks count as one meaning, or if what another dataset says of
    a sentence is not used."""
    episodes = [base.Episode(0, 5, "pick up the cup", "mine"), base.Episode(6, 9, "pick up the can", "mine")]
    config = DataConfig(vary_language=True, shorter_sentences=50)
    said = language.of_data(config, [dataset(episodes, names_tasks=False)])
    assert all("cup" in text for text in said.shortened["pick up the cup"])
    assert "pick cup" in said.shortened["pick up the cup"]
    named = [base.Episode(0, 5, "pick up the cup", "cup"), base.Episode(0, 5, "now pick up the cup", "cup")]
    both = language.of_data(config, [dataset(episodes, names_tasks=False), dataset(named)])
    assert "up cup" in both.shortened["now pick up the cup"] and "pick cup" in both.shortened["pick up the cup"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (DataConfig(root=str(ROOT / "data" / "calvin_sample")), True),
        (DataConfig(dataset="bridge", root=str(ROOT / "data" / "bridge_sample"), index_workers=1), False),
    ],
)
def test_readers_say_whether_their_tasks_have_names(config, named):
    """Fails if a dataset's own name counts as the task of all of its episodes."""
    found = opening.open_split(config, "training")
    assert found.names_tasks == named
    assert (len({episode.task for episode in found.episodes}) > 1) == named


def test_the_same_words_are_left_out_in_every_process():
    """Fails if drawing depends on what differs from one process to another, such as the hashes of strings."""
    code = (
        "from robovlms_jax.data import shortening; "
        "print(sorted(shortening.shorten({'a': ['go and push the blue block to the left']}, 4).items()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and b"block" in outputs.pop()


def test_a_side_or_a_turn_is_never_lost():
    """Fails if a sentence loses the word by which its mirror image, which mirrored samples are told, differs."""
    found = shortening.shorten({"a": ["push the block to the left"], "b": ["turn the knob counter clockwise"]}, 60)
    assert found["push the block to the left"] and all("left" in x for x in found["push the block to the left"])
    turns = found["turn the knob counter clockwise"]
    assert turns and all("counter" in text for text in turns)


def test_thousands_of_sentences_take_seconds_at_most():
    """Fails if every wording is compared with every sentence."""
    meanings = {
        f"pick item{n} and put it into box{n % 50}": [f"pick item{n} and put it into box{n % 50}"] for n in range(4000)
    }
    begin = time.process_time()
    found = shortening.shorten(meanings, 4)
    assert sum(map(len, found.values())) > 8000 and time.process_time() - begin < 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"never": "open"}, "never is 'open'; expected a list"),
        ({"never": [3]}, "never is"),
        ({"sentences": {"open it": "pull it"}}, r"sentences\['open it'\] is 'pull it'; expected a list"),
        ({"sentences": {"open it": [" "]}}, "none of them empty"),
        ({"sentences": []}, "sentences is a list"),
        ({"sentense": {}}, r"has \['sentense'\]"),
        ([], "is a list"),
        ({"templates": ["please"]}, r"no \{instruction\}"),
    ],
)
def test_a_damaged_file_of_paraphrases_is_refused(tmp_path, content, message):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"data\.paraphrases: .*words\.json.*{message}"):
        language.read(str(path))


def test_a_missing_file_of_paraphrases_says_who_writes_it(tmp_path):
    with pytest.raises(ValueError, match=r"is not there\. Recorders write paraphrases\.json"):
        language.read(str(tmp_path / "none.json"))


def test_recordings_packed_as_one_keep_all_of_their_words(tmp_path):
    for name, words in (("a", {"x": ["y"]}), ("b", {"x": ["z"], "v": []})):
        (tmp_path / name).mkdir()
        content = {"sentences": words, "never": [name], "tasks": {"t": [name], name: ["w"]}}
        (tmp_path / name / "paraphrases.json").write_text(json.dumps(content))
    (tmp_path / "c").mkdir()
    language.join([tmp_path / name for name in "abc"], tmp_path / "c")
    found = language.read(str(tmp_path / "c" / "paraphrases.json"))
    assert (found.sentences, found.never) == ({"x": ("y", "z"), "v": ()}, ("a", "b"))
    assert found.tasks == {"t": ("a", "b"), "a": ("w",), "b": ("w",)}


def test_a_run_shortens_to_nothing_that_validation_asks_and_its_batches_depend_on_which_words_were_left(tmp_path):
    """Fails if the run forgets the validation split's sentences, or would be resumed with other ones."""
    changes = {"data.vary_language": True, "data.shorter_sentences": 200, "data.windows_per_segment": 1}
    found = []
    for number in (200, 100):
        prepared = setups.prepare(small(tmp_path, **changes | {"data.shorter_sentences": number}))
        found.append(prepared.train.content()["sentences"])
        asked = {shortening.words(text) for text in validation.sentences(prepared.validation.dataset)}
        recorded = {shortening.words(episode.instruction) for episode in prepared.train.dataset.episodes}
        said = {shortening.words(text) for text in prepared.train._said}
        assert asked and not said & asked - recorded
    assert found[0] != found[1] and ", " in found[0]


@pytest.mark.parametrize("field", [{"paraphrases": "x.json"}, {"shorter_sentences": 3}])
def test_a_field_that_would_have_no_effect_is_refused(field):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(field))} needs --data\.vary_language"):
        DataConfig(**field)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match=r"data\.shorter_sentences=-1"):
        DataConfig(vary_language=True, shorter_sentences=-1)
