"""Sentences out of whatever a dataset stores for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax.data import sentences

BLANK = [None, "", "  \n", b"", float("nan"), np.float64("nan"), [], [None, ""], np.array([b"", b" "], object)]


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
    ],
    ids=repr,
)
def test_the_sentence_is_found_however_it_is_wrapped(cell):
    assert sentences.wordings(cell) == ("open the drawer",)


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
