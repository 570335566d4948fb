"""RLDS datasets that other people wrote: what is said in them, which episodes count, and files that do not fit."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.data import rlds, rlds_writer, splits
from robovlms_jax.data.features import Field
from robovlms_jax.data.registry import mixtures, oxe
from robovlms_jax.data.rlds import files, instructions
from tests.data import toy_rlds
from tests.data.written_rlds import T, numbers, open_written, picture, text

# Instructions.


def spoken(dataset):
    return {(episode.instruction, episode.rewordings) for episode in dataset.episodes}


def test_an_instruction_of_the_episode_is_found_and_can_be_named(tmp_path):
    changes = {"steps/language_instruction": None,
               "episode_metadata/language_instruction": text(values=lambda e: [b"open  the drawer"]),
               "episode_metadata/file_path": text(values=lambda e: [b"/raw/7.h5"])}  # fmt: skip
    assert spoken(open_written(tmp_path, changes)) == {("open the drawer", ())}
    for name in ("episode_metadata/language_instruction", "../episode_metadata/language_instruction"):
        dataset = rlds.open_dataset(tmp_path, {"instruction": name}, "training", name="mine")
        assert spoken(dataset) == {("open the drawer", ())}


def test_of_several_texts_none_is_guessed(tmp_path):
    changes = {"steps/language_instruction": None, "episode_metadata/task": text(values=lambda e: [b"a"]),
               "episode_metadata/goal": text(values=lambda e: [b"b"])}  # fmt: skip
    with pytest.raises(ValueError, match=r"episode_metadata/task.*episode_metadata/goal.*say instruction: NAME"):
        open_written(tmp_path / "a", changes)
    only_path = {"steps/language_instruction": None, "episode_metadata/file_path": text(values=lambda e: [b"/raw/7"])}
    with pytest.raises(
        ValueError, match=r"no instruction \(read from 'nowhere'; texts: \['episode_metadata/file_path'"
    ):
        open_written(tmp_path / "b", only_path)


@pytest.mark.parametrize("shape", [(3,), (None,)])
def test_of_several_wordings_the_first_filled_is_the_instruction(tmp_path, shape):
    cells = text(*shape, values=lambda e: [(b" ", b"lift\0", b"raise")] * T)
    assert spoken(open_written(tmp_path, {"steps/language_instruction": cells})) == {("lift", ("raise",))}


def test_a_blank_first_wording_does_not_make_an_episode_unlabelled(tmp_path):
    changes = {"steps/language_instruction": text(values=lambda e: [b"" if e % 2 else b"lift"] * T),
               "steps/language_instruction_2": text(values=lambda e: [b"raise"] * T)}  # fmt: skip
    assert spoken(open_written(tmp_path, changes)) == {("lift", ("raise",)), ("raise", ())}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=3, unique=True).map(tuple), min_size=1, max_size=8))
def test_tasks_change_where_no_sentence_is_shared(said):
    table = instructions.Table()
    starts, found = instructions.spans(np.array([table.number(cell) for cell in said]), table)
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and len(found) == len(starts)
    for start, end, number in zip(starts, [*starts[1:], len(said)], found, strict=True):
        cells = said[start:end]
        assert table.entries[number] == tuple(dict.fromkeys(word for cell in cells for word in cell))
        assert all(cells) or not any(cells), "what is silent is no part of a task"
    for start in starts[1:]:
        assert not said[start] or said[start][0] not in said[start - 1]


# Which episodes.


def test_droids_failures_are_told_by_the_files_path(tmp_path):
    assert oxe.ENTRIES["droid"].success == "episode_metadata/file_path"
    given = {"success": "episode_metadata/file_path", "failure_pattern": oxe.ENTRIES["droid"].failure_pattern}
    paths = text(values=lambda e: [b"/raw/LAB/failure/7.h5" if e % 2 else b"/raw/failure-lab/success/7.h5"])
    dataset = open_written(tmp_path, {"episode_metadata/file_path": paths}, given=given)
    assert len(dataset.episodes) == 2  # of three successful ones the last is for validation
    kept = rlds.open_dataset(tmp_path, given, "training", name="mine", options=rlds.Options(success_only=False))
    assert len(kept.episodes) == 5


def test_where_nothing_tells_success_it_is_said_once_with_a_hint(tmp_path, caplog):
    paths = text(values=lambda e: [b"/raw/failed/7.h5" if e == 2 else b"/raw/7.h5"])
    open_written(tmp_path, {"episode_metadata/file_path": paths})
    rlds.open_dataset(tmp_path, {}, "validation", name="mine")
    assert (
        caplog.text.count("although episode_metadata/file_path speaks of failure in 1 (such as '/raw/failed/7.h5')")
        == 1
    )


def test_success_may_be_a_flag_of_steps(tmp_path):
    flag = Field("", "tensor", "bool"), lambda e: (np.arange(T) == T - 1) & (e != 1)
    dataset = open_written(tmp_path, {"steps/solved": flag}, given={"success": "solved"})
    assert [episode.start // (T + 1) for episode in dataset.episodes] == [0, 2, 3, 4]


@pytest.mark.parametrize("names", list(itertools.product(*[(False, True)] * 4)))
def test_test_episodes_never_train_whatever_splits_there_are(names):
    there = [name for name, is_there in zip(("train", "val", "validation", "test"), names, strict=True) if is_there]
    found = {name: splits.Split("mine", "1", name, "tfrecord", ("a",), (10,)) for name in there}
    if "train" not in there:
        with pytest.raises(ValueError, match=r"has no split 'train'.*splits: \{training"):
            splits.choose(found, {}, "training", "here")
        return
    training, validation = (splits.choose(found, {}, use, "here") for use in ("training", "validation"))
    assert training.split.name == "train"
    expected = next((name for name in ("val", "validation") if name in there), "train")
    assert validation.split.name == expected
    assert training.is_shared == validation.is_shared == (expected == "train")


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.integers(1, 99) | st.integers(1, 999).map(lambda tenths: tenths / 10))
def test_slices_of_a_split_share_nothing_and_leave_nothing_out(total, percent):
    found = {"all": splits.Split("mine", "1", "all", "tfrecord", ("a",), (total,))}
    given = {"training": f"all[:{percent}%]", "validation": f"all[{percent}%:]"}
    border = round(percent * total / 100)
    if border in (0, total):
        with pytest.raises(ValueError, match="which has none of the"):
            [splits.choose(found, given, use, "here") for use in ("training", "validation")]
        return
    training, validation = (splits.choose(found, given, use, "here") for use in ("training", "validation"))
    assert (training.first, training.last, validation.first, validation.last) == (0, border, border, total)
    assert not training.is_shared


def test_slices_that_overlap_or_are_no_slices_are_refused():
    found = {"train": splits.Split("mine", "1", "train", "tfrecord", ("a",), (100,))}
    with pytest.raises(ValueError, match="share episodes 90 to 94 of split 'train'"):
        splits.choose(found, {"training": "train[:95]", "validation": "train[-10:]"}, "training", "here")
    with pytest.raises(ValueError, match=r"such as 'train\[:90%\]'; there are \['train'\]"):
        splits.choose(found, {"training": "test[:90%]"}, "training", "here")


def test_validation_opens_where_the_last_episodes_are_unusable(tmp_path):
    words = text(values=lambda e: [b"" if e >= 30 else b"lift"] * T)
    training = open_written(tmp_path, {"steps/language_instruction": words}, episodes=40)
    validation = rlds.open_dataset(tmp_path, {}, "validation", name="mine")
    assert (len(training.episodes), len(validation.episodes)) == (28, 2)
    assert training.episodes[-1].end < validation.episodes[0].start


def test_a_last_action_that_is_no_number_is_left_out_with_its_step(tmp_path, caplog):
    action = lambda e: np.where(np.arange(T)[:, None] == T - 1, np.nan, np.c_[np.full((T, 6), 0.01), np.arange(T) > 3])  # noqa: E731
    dataset = open_written(tmp_path, {"steps/action": numbers(7, action)})
    assert [episode.end - episode.start for episode in dataset.episodes] == [T - 1] * 5
    assert np.isfinite(dataset.actions(range(dataset.num_frame_ids))).all() and "NaN" not in caplog.text
    assert "left out 6 steps at ends of episodes" in caplog.text
    last = dataset.images([dataset.episodes[0].end], ["static"])["static"]
    np.testing.assert_array_equal(last[0], toy_rlds.image(0, 16))


# Files.


def test_files_with_a_byte_order_mark_are_read(tmp_path):
    open_written(tmp_path)
    for name in ("features.json", "dataset_info.json"):
        path = tmp_path / "mine" / "1.0.0" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert rlds.open_dataset(tmp_path, {}, "training", name="mine").episodes
    for name, content in (
        ("a.yaml", b"mixture: {bridge_orig: 1.0}\r\n"),
        ("a.json", b'{"mixture": {"bridge_orig": 1}}'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert mixtures.resolve(str(tmp_path / name)).weights == {"bridge_orig": 1.0}


def test_a_configuration_between_name_and_version_is_found_when_there_is_one(tmp_path):
    open_written(tmp_path)
    (tmp_path / "mine" / "small").mkdir()
    (tmp_path / "mine" / "1.0.0").rename(tmp_path / "mine" / "small" / "1.0.0")
    assert rlds.open_dataset(tmp_path, {}, "training", name="mine").episodes
    assert rlds.open_dataset(tmp_path / "mine", {}, "training", name="mine").episodes
    rlds_writer.write(tmp_path / "mine", "large", toy_rlds.FIELDS, {"train": [toy_rlds.episode(0, 3)]})
    with pytest.raises(rlds.NotFoundError, match=r"several configurations, large, small; .*--data.root .*mine/large"):
        rlds.open_dataset(tmp_path, {}, "training", name="mine")
    assert rlds.open_dataset(tmp_path, {"directories": "mine/small"}, "training", name="of_mine").episodes


def test_records_of_another_shape_are_named_with_both_sides(tmp_path):
    open_written(tmp_path, {"steps/observation/state": numbers(7)})
    path = tmp_path / "mine" / "1.0.0" / "features.json"
    tree = json.loads(path.read_text())
    step = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    state = step["observation"]["featuresDict"]["features"]["state"]
    state["tensor"]["shape"]["dimensions"] = ["8"]
    step["note"] = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="record 0 and 5 more, to record 5: ") as caught:
        rlds.open_dataset(tmp_path, {}, "training", name="mine")
    assert f"state has {7 * T} values, that is 7 each, expected {T} x 8" in str(caught.value)
    assert "the record has no steps/note, which features.json says is text[]" in str(caught.value)


def test_a_dataset_without_is_first_is_told_so(tmp_path):
    image = Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(e)] * T
    changes = {"steps/is_first": None, "steps/observation/image": None, "steps/obs/image": image}
    with pytest.raises(
        ValueError, match=r"no steps/is_first.*no steps/observation; its images are \['steps/obs/image'"
    ):
        open_written(tmp_path, changes)


def test_prepared_arrays_are_compared_with_their_checksums_once(tmp_path, monkeypatch):
    dataset = open_written(tmp_path)
    hashed = []
    real = files.google_crc32c.value
    monkeypatch.setattr(files.google_crc32c, "value", lambda data: (hashed.append(len(data)), real(data))[1])
    rlds.open_dataset(tmp_path, {}, "validation", name="mine")
    path = dataset._prepared.directory / "actions.npy"
    assert path.stat().st_size not in hashed
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"actions\.npy is damaged"):
        files.load(dataset._prepared.directory, dataset._prepared.stamps)
