"""Sentences out of whatever a dataset stores for them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax.data import notices, sentences

BLANK = [None, "", "  \n", b"", float("nan"), np.float64("nan"), [], [None, ""], np.array([b"", b" "], object)]
BLANK += ["None", "nan", " NaN\n", b"null", "N/A", "<NA>", "[]", "['']", "[None]", "b''", '""', "{}", ["None", b"nan"]]


@pytest.mark.parametrize("cell", BLANK, ids=repr)
def test_a_cell_that_says_nothing_has_no_wording(cell):
    assert sentences.wordings(cell) == ()


@pytest.mark.parametrize(
    "cell",
    [
        "open the  drawer\n",
        b"open the drawer",
        ["open the drawer"],
        ["", "open the drawer", None, "open the drawer"],
        np.array("open the drawer"),
        np.array([[b"open the drawer", b""]], object),
        np.str_("open the drawer"),
        np.bytes_(b"open the drawer\0"),
        "['open the drawer']",
        "('open the drawer',)",
        '["open the drawer"]',
        "b'open the drawer'",
        '"open the drawer"',
        str(np.array(["open the drawer"])),
        "['open the drawer', 'None']",
    ],
    ids=repr,
)
def test_the_sentence_is_found_however_it_is_wrapped(cell):
    assert sentences.wordings(cell) == ("open the drawer",)


@pytest.mark.parametrize(
    "text",
    [
        "[open the drawer]",
        str(np.array(["open", "close"])),
        "{'text': 'open'}",
        "[1, 2]",
        "(the red one) open it",
        "['open'",
        "unknown",
        "none of the drawers",
    ],
    ids=repr,
)
def test_text_that_no_program_printed_in_full_stays_as_it_is(text):
    assert sentences.wordings(text) == (text,)


def test_what_a_program_printed_is_said_once_with_an_example(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    for cell in ("None", "nan", "['open it']", "['close it']", "unknown", "todo", "open it"):
        sentences.wordings(cell)
    assert [record.getMessage().split(";")[0].split(" counts")[0] for record in caplog.records] == [
        "the stored instruction 'None' says nothing and",
        "the stored instruction \"['open it']\" was printed by a program",
        "the stored instruction 'unknown' looks like a program's value, not like a sentence",
    ]


@given(st.lists(st.text(), min_size=1), st.sampled_from([repr, str, json.dumps]))
def test_a_printed_list_is_read_as_the_list(texts, printed):
    text = printed(texts)
    clean = text == " ".join(text.replace("\0", " ").split())
    assert sentences.wordings(text) == sentences.wordings(texts) or not clean


@pytest.mark.parametrize("cell", [3, 2.5, {"text": "open"}, ["open", 4], True, np.arange(3)], ids=repr)
def test_what_is_no_text_is_refused_and_never_printed_as_a_sentence(cell):
    with pytest.raises(ValueError, match="must be text"):
        sentences.wordings(cell)


@given(st.lists(st.one_of(st.none(), st.text(), st.text().map(str.encode), st.lists(st.text()))))
def test_wordings_are_clean_unique_and_stable(cell):
    found = sentences.wordings(cell)
    assert len(set(found)) == len(found)
    assert all(text == " ".join(text.split()) and text for text in found)
    assert sentences.wordings(list(found)) == found
