"""Annotations as people's own scripts write them: what is read, left out and refused, by name."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import pack_calvin
from robovlms_jax.data import base, calvin, calvin_annotations
from robovlms_jax.data.config import DataConfig
from robovlms_jax.runs import validation

SPANS = [(0, 4), (2, 6), (5, 9)]
TEXTS = ["open drawer", "turn on led", "push blue block left"]
TASKS = ["open_drawer", "turn_on_led", "push_blue_block_left"]


def write(path: pathlib.Path, spans=SPANS, ann=TEXTS, task=TASKS, **language) -> pathlib.Path:
    content = {"language": {"ann": ann, "task": task, **language}, "info": {"indx": spans}}
    np.save(path, np.array(content, dtype=object), allow_pickle=True)
    return path


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "auto_lang_ann.npy"


@pytest.mark.parametrize(
    "columns",
    [
        {"ann": np.array(TEXTS), "task": np.array(TASKS, object), "spans": np.array(SPANS)},
        {"ann": [[text] for text in TEXTS], "task": [[name] for name in TASKS]},
        {"ann": [text.encode() for text in TEXTS], "spans": tuple(tuple(map(float, span)) for span in SPANS)},
        {"ann": [f" {text}\n" for text in TEXTS], "spans": [np.int32(span) for span in SPANS]},
    ],
)
def test_columns_are_read_however_they_are_wrapped(path, columns):
    episodes = calvin_annotations.read(write(path, **columns))
    assert [(e.start, e.end, e.instruction, e.task) for e in episodes] == [
        (*span, *rest) for span, *rest in zip(SPANS, TEXTS, TASKS, strict=True)
    ]


def test_of_several_sentences_the_first_that_says_something_is_the_instruction(path):
    first, *_ = calvin_annotations.read(write(path, ann=[["", "open it", "pull it", "open it"], *TEXTS[1:]]))
    assert (first.instruction, first.rewordings) == ("open it", ("pull it",))


@pytest.mark.parametrize("blank", [None, "", " ", [], [None, ""], float("nan"), b""], ids=repr)
def test_spans_without_a_sentence_are_left_out_and_counted(path, caplog, blank):
    episodes = calvin_annotations.read(write(path, ann=[TEXTS[0], blank, TEXTS[2]], task=[TASKS[0], None, TASKS[2]]))
    assert [e.task for e in episodes] == [TASKS[0], TASKS[2]]
    assert "1 of 3 spans have no sentence and are left out (first: number 1, frames 2 to 6)" in caplog.text
    with pytest.raises(base.NotAnnotatedError, match="annotates no episode: none of its 3 spans has a sentence"):
        calvin_annotations.read(write(path, ann=[blank] * 3))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ann": [3, *TEXTS[1:]]}, r"language\.ann\[0\]: an instruction must be text .* found int 3"),
        ({"ann": [TEXTS[0], {"en": "open"}, TEXTS[2]]}, r"language\.ann\[1\]: .* found dict"),
        ({"ann": "open drawer"}, r"language\.ann is str, not a list"),
        ({"ann": None}, r"language\.ann is NoneType, not a list"),
        ({"ann": TEXTS * 4}, r"language\.ann has 12, language\.task has 3; one sentence .* each span"),
        ({"task": [None, *TASKS[1:]]}, r"language\.task\[0\] is None, expected one name"),
        ({"task": [["a", "b"], *TASKS[1:]]}, r"language\.task\[0\] is \['a', 'b'\], expected one name"),
        ({"spans": [(0, 4), (2,), (5, 9)]}, r"info\.indx\[1\] is \(2,\), expected the numbers"),
        ({"spans": [(0, 4, 8), *SPANS[1:]]}, r"info\.indx\[0\] is \(0, 4, 8\)"),
        ({"spans": [(0, None), *SPANS[1:]]}, r"info\.indx\[0\] .* None is not a number"),
        ({"spans": [None, *SPANS[1:]]}, r"info\.indx\[0\] is None"),
        ({"spans": [(0, float("nan")), *SPANS[1:]]}, r"info\.indx\[0\] .* nan is not a whole number"),
        ({"spans": [(0.5, 4), *SPANS[1:]]}, r"0\.5 is not a whole number"),
        ({"spans": [(-1, 4), *SPANS[1:]]}, r"-1 is not a whole number"),
        ({"spans": [("0", "4"), *SPANS[1:]]}, r"'0' is not a number"),
        ({"spans": [(True, 4), *SPANS[1:]]}, r"True is not a number"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(path, columns, message):
    with pytest.raises(ValueError, match=rf"auto_lang_ann\.npy.*{message}"):
        calvin_annotations.read(write(path, **columns))


def test_everything_that_differs_is_said_at_once(path):
    np.save(path, np.array({"language": {"ann": TEXTS * 2, "emb": []}, "info": {"indx": SPANS}}, dtype=object))
    with pytest.raises(
        ValueError, match=r"lacks 'task' \(it has \['ann', 'emb'\]\); .*indx has 3, language\.ann has 6"
    ):
        calvin_annotations.read(path)
    np.save(path, np.array({"language": TEXTS}, dtype=object))
    with pytest.raises(ValueError, match=r"lacks 'info', a dictionary \(it has \['language'\]\); it lacks 'language'"):
        calvin_annotations.read(path)


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(), st.lists(st.integers())))
def test_a_whole_number_is_read_exactly_or_refused(value):
    try:
        number = base.whole_number(value)
    except (TypeError, ValueError):
        assert isinstance(value, bool) or not isinstance(value, int) or value < 0
    else:
        assert number == value and type(number) is int and number >= 0


# ---------------------------------------------------------------------------------------------------------------------
# A validation split without annotations


def unannotated(root: pathlib.Path) -> pathlib.Path:
    """The root, with a copy of its training frames as a validation split that has no annotations."""
    (root / "validation").mkdir()
    for frame in (root / "training").glob("*.npz"):
        (root / "validation" / frame.name).write_bytes(frame.read_bytes())
    return root


def test_training_goes_on_without_an_annotated_validation_split(write_calvin, caplog):
    root = unannotated(write_calvin([(0, 3)]))
    config = DataConfig(root=str(root))
    assert validation.open_split(config) is None
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{root}/validation has no language annotations" in warning and "training goes on" in warning
    (root / "validation" / "lang_annotations").mkdir()
    np.save(root / "validation" / "lang_annotations" / "auto_lang_ann.npy", {"language": 3}, allow_pickle=True)
    with pytest.raises(ValueError, match="is not CALVIN's annotation dictionary"):
        validation.open_split(config)  # damage is no lack


def test_training_goes_on_where_only_training_was_downloaded(write_calvin, caplog):
    root = write_calvin([(0, 3)])
    assert validation.open_split(DataConfig(root=str(root))) is None
    assert f"looked for {root}/validation" in caplog.text
    with pytest.raises(base.NotAnnotatedError):
        calvin.open_dataset(root, "validation")


def test_packing_leaves_out_an_unannotated_validation_split(write_calvin, tmp_path, caplog):
    root = unannotated(write_calvin([(0, 3)]))
    pack_calvin.main(pack_calvin.Args(root=(root,), out=tmp_path / "packed", workers=1))
    assert len(calvin.open_dataset(tmp_path / "packed", "training").episodes) == 1
    assert f"{root}/validation is left out" in caplog.text
    (root / "training" / "lang_annotations" / "auto_lang_ann.npy").unlink()
    with pytest.raises(base.NotAnnotatedError, match="training has no language annotations"):
        pack_calvin.main(pack_calvin.Args(root=(root,), out=tmp_path / "other", workers=1))
