"""Chat templates, answers' tokens, and boxes as each family writes them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax.backbones import registry
from robovlms_jax.inputs import boxes, conversations, tokenizers
from robovlms_jax.inputs.conversations import Turn

BOX = "<ref>the red block</ref><box>(250,500),(500,1000)</box>"
TURNS = (Turn("<image>\nWhere is it?", "on the left"), Turn("What colour?", "red"))


# Families whose pictures stand among their words; the others are refused (runs/questions.py).
AMONG = sorted({vlm.model_type for vlm in map(registry.get, registry.names()) if not vlm.beside})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizers.make_twin_tokenizer(["where is it on the left", "what colour red"], 400, directory)
    return tokenizers.load_tokenizer(directory)


@pytest.mark.parametrize("model_type", AMONG)
def test_every_family_has_a_template_in_which_answers_alone_are_learned(tokenizer, model_type):
    found = conversations.encoder(tokenizer, model_type, 4)(TURNS, 1)
    said = tokenizer.decode(found.ids[found.answer])
    end = conversations.CHATS.get(model_type, conversations.PLAIN).end or tokenizer.eos_token
    assert re.sub(r"\s+", "", said) == re.sub(r"\s+", "", f"on the left{end}red{end}")
    assert np.flatnonzero(found.image >= 0).tolist() == list(
        range(np.argmax(found.image >= 0), np.argmax(found.image >= 0) + 4)
    )
    rest = tokenizer.decode(found.ids[~found.answer & (found.image < 0)])
    assert "Where is it?" in rest and "What colour?" in rest and "<image>\n" not in rest


def test_kosmos_sees_its_own_order(tokenizer):
    found = conversations.encoder(tokenizer, "kosmos-2", 2)(TURNS[:1], 1)
    text = tokenizer.decode(np.where(found.image >= 0, tokenizer.pad_token_id, found.ids))
    assert text == "<s><image><pad><pad></image><grounding> Question: Where is it? Answer: on the left</s>"


def test_janus_is_asked_as_its_published_template_asks():
    text, spans = conversations._text(conversations.CHATS["janus"], "END", TURNS, 1, "#")
    system, _, rest = text.partition("natural language.\n\n")
    assert system.startswith("<\uff5cbegin▁of▁sentence\uff5c>You are a helpful language and vision assistant.")
    assert rest == (
        "<|User|>: #\nWhere is it?\n\n<|Assistant|>: on the leftEND<|User|>: What colour?\n\n<|Assistant|>: redEND"
    )
    assert [text[begin:end] for begin, end in spans] == [" on the leftEND", " redEND"]


def test_pictures_stand_where_their_marks_are(tokenizer):
    turn = Turn("<image>\n<image>\nSame?", "no")
    found = conversations.encoder(tokenizer, "qwen", 2)((turn,), 2)
    assert found.image[found.image >= 0].tolist() == [0, 1, 2, 3]
    gaps = np.diff(np.flatnonzero(found.image >= 0))
    assert gaps[0] == 1 and gaps[1] > 1 and gaps[2] == 1  # words between the pictures


@pytest.mark.parametrize(
    ("turns", "pictures", "message"),
    [
        (TURNS, 2, "1 marks <image> for 2 pictures"),
        ((Turn("What?", " "),), 0, "has no answer"),
        ((Turn("What?", "an <image>"),), 0, "pictures stand|only questions"),
        ((Turn("What?", "<ref>it"),), 0, "cannot be read"),
        ((Turn("What?", "<box>(1,2)</box>"),), 0, "cannot be read"),
        ((Turn("What?", "<box>(500,2),(400,9)</box>"),), 0, "upper left"),
    ],
)
def test_conversations_that_mean_nothing_are_refused(tokenizer, turns, pictures, message):
    with pytest.raises(ValueError, match=message):
        conversations.encoder(tokenizer, "kosmos-2", 2)(turns, pictures)


FIRST, SECOND = "<patch_index_0000><patch_index_0495>", "<patch_index_0528><patch_index_1023>"


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        # 8 and 16 of 32 columns, 16 and 32 of 32 rows: the last cells are one before the end.
        ("kosmos-2", "<phrase>the red block</phrase><object><patch_index_0520><patch_index_1007></object>"),
        ("paligemma", "<loc0512><loc0256><loc1023><loc0512> the red block"),
        ("qwen-vl", BOX),
        ("fractions", "the red block [0.250, 0.500, 0.500, 1.000]"),
    ],
)
def test_boxes_are_written_as_each_family_does(style, expected):
    assert boxes.written(f"See {BOX}.", style) == f"See {expected}."


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("kosmos-2", f"<phrase>it</phrase><object>{FIRST}</delimiter_of_multi_objects/>{SECOND}</object>"),
        ("paligemma", "<loc0000><loc0000><loc0512><loc0512> it ; <loc0512><loc0512><loc1023><loc1023> it"),
        ("fractions", "it [0.000, 0.000, 0.500, 0.500], [0.500, 0.500, 1.000, 1.000]"),
        ("qwen-vl", "<ref>it</ref><box>(0,0),(500,500)</box><box>(500,500),(1000,1000)</box>"),
    ],
)
def test_a_phrase_may_have_several_boxes_a_space_before_them_or_none(style, expected):
    both = "<box>(0,0),(500,500)</box><box>(500,500),(1000,1000)</box>"
    assert boxes.written(f"<ref>it</ref>{both}.", style) == f"{expected}."
    assert boxes.written(f"<ref>it</ref> {both}.", style) == f"{expected}."
    alone = {"kosmos-2": "<phrase>it</phrase>", "qwen-vl": "<ref>it</ref>"}.get(style, "it")
    assert boxes.written("Where is <ref>it</ref>?", style) == f"Where is {alone}?"


@pytest.mark.parametrize("style", ["kosmos-2", "paligemma", "fractions", "qwen-vl"])
@pytest.mark.parametrize("box", ["(-1,0),(10,1)", "(0.1,0),(10,1)", "(0, 0), (10, 1)", "(0,0)"])
def test_a_box_that_cannot_be_read_is_refused_by_every_family(style, box):
    with pytest.raises(ValueError, match="cannot be read"):
        boxes.written(f"<box>{box}</box>", style)


def test_paligemma_is_asked_for_captions_in_its_own_words(tokenizer):
    asked = [
        conversations._text(conversations.CHATS["paligemma"], "<eos>", (Turn(question, "grey"),), 1, "#")[0]
        for question in (f"<image>\n{conversations.DESCRIBE}", "<image>\nWhat colour?")
    ]
    assert asked == ["#<bos>caption en\ngrey<eos>", "#<bos>answer en What colour?\ngrey<eos>"]


def test_text_with_a_character_of_the_private_area_keeps_it_and_shows_no_picture(tokenizer):
    turns = (Turn("<image>\nWhat is \ue000?", "an icon \ue000"),)
    found = conversations.encoder(tokenizer, "kosmos-2", 4)(turns, 1)
    assert found.image[found.image >= 0].tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_kosmos_boxes_are_those_of_transformers():
    processing = pytest.importorskip("transformers.models.kosmos2.processing_kosmos2")
    rng = np.random.default_rng(0)
    for _ in range(50):
        (left, right), (top, bottom) = (sorted(rng.choice(1001, 2, replace=False).tolist()) for _ in range(2))
        expected = processing.coordinate_to_patch_index([x / 1000 for x in (left, top, right, bottom)], 32)
        found = boxes.written(f"<box>({left},{top}),({right},{bottom})</box>", "kosmos-2")
        assert tuple(map(int, re.findall(r"_(\d{4})>", found))) == tuple(expected)


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_every_box_is_inside_the_grid_or_refused(corners):
    text = "<box>({},{}),({},{})</box>".format(*corners)
    for style, bins in (("kosmos-2", 1024), ("paligemma", 1024)):
        try:
            found = boxes.written(text, style)
        except ValueError:
            assert corners[0] >= corners[2] or corners[1] >= corners[3]
        else:
            assert all(0 <= int(number) < bins for number in re.findall(r"(\d{4})>", found))


def plain_and_learned(tokenizer, found):
    """The text without special tokens, and what of it is learned, without spaces."""
    return [
        "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in (found.ids, found.ids[found.answer])
    ]


@pytest.mark.parametrize("odd", ["</s>", "<s>", "<grounding>", "</image>", "<pad>", "<unk>"])
def test_a_special_token_that_is_written_out_is_text_and_learned_as_text(tokenizer, odd):
    # Fails where an answer with </s> in it teaches to stop in its middle, or a question ends its own turn.
    encode = conversations.encoder(tokenizer, "kosmos-2", 2)
    turns = (Turn(f"<image>\nWhat {odd} is it?", f"a{odd}{odd} mark"), Turn("Sure?", f"{odd}"))
    found, without = encode(turns, 1), encode((Turn("<image>\nWhat?", "mark"), Turn("Sure?", "yes")), 1)
    mine = tokenizer.convert_tokens_to_ids(odd)
    assert (found.ids[found.image < 0] == mine).sum() == (without.ids[without.image < 0] == mine).sum()
    text, learned = plain_and_learned(tokenizer, found)
    assert learned == f"a{odd}{odd}mark{odd}"
    assert text.replace("!", "").count(odd) == 4  # padding's id 0 stands where pictures are
    assert encode.written_out(turns) == [odd] * 4


def test_words_for_places_are_special_tokens_in_answers_and_text_for_other_families(tokenizer):
    phrase = tokenizer.convert_tokens_to_ids("<phrase>")
    turns = (Turn("Where?", "<phrase>it</phrase>"),)
    assert phrase in conversations.encoder(tokenizer, "kosmos-2", 2)(turns, 0).ids
    other = conversations.encoder(tokenizer, "llava", 2)
    assert phrase not in other(turns, 0).ids and other.written_out(turns) == ["<phrase>", "</phrase>"]


ANY = st.lists(st.sampled_from([*"ab <>/", "<s>", "</s>", "<image>", "<pad>", "é"]), max_size=12).map("".join)


@given(question=ANY, answer=ANY)
def test_whatever_is_said_there_is_one_end_per_answer_and_no_other_special_token(tokenizer, question, answer):
    answer = answer.replace("<image>", "") + "x"
    encode = conversations.encoder(tokenizer, "kosmos-2", 2)
    pictures = question.count("<image>")
    found = encode((Turn(f"q{question}", answer),), pictures)
    special = [
        tokenizer.convert_ids_to_tokens(int(i)) for i in found.ids[found.image < 0] if i in tokenizer.all_special_ids
    ]
    marks = [name for _ in range(pictures) for name in ("<image>", "</image>")]
    assert special == ["<s>", *marks, "<grounding>", "</s>"]
    assert plain_and_learned(tokenizer, found)[1] == "".join(answer.split())


@pytest.mark.parametrize(
    ("answer", "language"),
    [
        *[("red", "en"), ("빨간색 block", "ko"), ("赤いブロック", "ja"), ("红色", "zh"), ("3 {language}", "en")],
        *[("the sign says スシ", "en"), ("빨강・파랑", "ko"), ("東京都の地図", "ja")],  # few kana are no language
    ],
)
def test_paligemmas_prefix_names_the_language_of_the_answer(answer, language):
    for question, prefix in (
        ("What {language}?", f"answer {language} What {{language}}?\n"),
        (conversations.DESCRIBE, f"caption {language}\n"),
    ):
        text, _ = conversations._text(conversations.CHATS["paligemma"], "<eos>", [Turn(question, answer)], 0, "#")
        assert text == f"<bos>{prefix}{answer}<eos>"
