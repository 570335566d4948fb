"""Sentences and splits of a LeRobotDataset: read in any form, or refused by name."""

from __future__ import annotations

import json
import logging
import pathlib
import re
from collections.abc import Sequence

import pytest

from robovlms_jax.data import lerobot, opening
from robovlms_jax.data.config import DataConfig
from robovlms_jax.data.lerobot import meta, splits
from tests.data import toy_lerobot as toy

# Instructions.


def test_where_the_task_changes_another_episode_begins(tmp_path):
    root = toy.write(tmp_path / "d")
    toy.edit(toy.data_file(root), lambda rows: rows.update(task_index=[int(t >= 3) for t in rows["frame_index"]]))
    toy.edit(toy.episodes_file(root), lambda listed: listed.update(tasks=[["open it", "close it"]] * 4))
    dataset = lerobot.open_dataset(root, "training")
    assert toy.seen(dataset) == [
        (e, t, ["open it", "close it"][t >= 3]) for e, n in enumerate((5, 6, 4)) for t in range(n)
    ]
    assert [(e.start, e.end) for e in dataset.episodes[:2]] == [(0, 3), (3, 5)]


def test_tasks_of_one_sentence_are_one_episode(tmp_path):
    root = toy.write(tmp_path / "d", tasks=("open it", " open  it"))
    toy.edit(toy.data_file(root), lambda rows: rows.update(task_index=[t % 2 for t in rows["frame_index"]]))
    assert [(e.start, e.end) for e in lerobot.open_dataset(root, "training").episodes] == [(0, 5), (6, 12), (13, 17)]


@pytest.mark.parametrize("blank", ["", "  ", None, [], ["", None]])
def test_episodes_without_a_sentence_are_left_out_and_counted(tmp_path, caplog, blank):
    caplog.set_level(logging.INFO)
    root = toy.write(tmp_path / "d")
    column = toy.pa.array([["open it"], blank]) if isinstance(blank, list) else ["open it", blank]
    toy.save(root / "meta/tasks.parquet", {"task_index": [0, 1], "task": column})
    toy.edit(toy.episodes_file(root), lambda listed: [listed.pop("tasks"), None][1])
    assert {e for e, _, _ in toy.seen(lerobot.open_dataset(root, "training"))} == {0, 2}
    assert "left out 1 of 3 episodes without instruction" in caplog.text
    config = DataConfig(dataset="lerobot", root=str(root), unlabelled_share=1.0, unlabelled_instruction="do something")
    assert [e.instruction for e in opening.open_split(config, "training").episodes] == [
        "open it",
        "do something",
        "open it",
    ]


def _jsonl(text: str):
    def write(root):
        (root / "meta/tasks.parquet").unlink()
        (root / "meta/tasks.jsonl").write_bytes(text.encode("utf-8"))

    return write


def _parquet(**columns):
    return lambda root: toy.save(root / "meta/tasks.parquet", columns)


TASKS = {
    "index of another name": _parquet(task_index=[0, 1], instruction=["open it", "close it"]),
    "beside numbers": _parquet(task_index=[0, 1], count=[3, 4], task=["open it", "close it"]),
    "bytes": _parquet(task_index=[0, 1], task=[b"open it", b"close it"]),
    "several": _parquet(task_index=[0, 1], task=[["", "open it", "open the thing"], ["close it"]]),
    "lines": _jsonl('\ufeff{"task_index": 0, "task": "open it"}\r\n{"task_index": 1, "task": "close it"}\r\n'),
    "pretty": _jsonl('{\n "task_index": 0,\n "task": "open it"\n}\n{\n "task_index": 1,\n "task": "close it"\n}\n'),
    "list": _jsonl('[{"task_index": 0, "task": "open it"},\n {"task_index": 1, "task": ["close it"]}]'),
}


@pytest.mark.parametrize("form", TASKS)
def test_sentences_are_read_in_any_form(tmp_path, form):
    root = toy.write(tmp_path / "d")
    TASKS[form](root)
    if form == "several":
        tasks = [[["open it", "open the thing"], ["close it"]][e % 2] for e in range(4)]
        toy.edit(toy.episodes_file(root), lambda listed: listed.update(tasks=tasks))
    episodes = lerobot.open_dataset(root, "training").episodes
    assert [e.instruction for e in episodes] == ["open it", "close it", "open it"]
    assert episodes[0].rewordings == (("open the thing",) if form == "several" else ())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (_parquet(task_index=[0, 1], task=[1.5, 2.5]), "task_index 0: an instruction must be text"),
        (_parquet(task_index=[0, None], task=["a", "b"]), "entry 1 has task_index None"),
        (_parquet(task_index=[0, 0], task=["a", "b"]), "has task_index 0 twice"),
        (_parquet(number=[0, 1], task=["a", "b"]), "has no column 'task_index'"),
        (_parquet(task_index=[0, 1], one=["a", "b"], two=["c", "d"]), "does not say which column has the sentences"),
        (_jsonl('{"task_index": 0, "task": "open it"}\n{"task_index": 1, "ta'), "cannot be read from line 2 on"),
        (_jsonl('{"index": 0, "task": "open it"}'), "expected {'task_index': 0"),
        (lambda root: (root / "meta/tasks.parquet").unlink(), "has neither tasks.parquet nor tasks.jsonl"),
        (
            lambda root: (root / "meta/tasks.jsonl").write_text('{"task_index": 1, "task": "push"}'),
            "tasks.parquet and tasks.jsonl differ: task_index 1",
        ),
    ],
)
def test_sentences_that_cannot_be_read_are_named(tmp_path, form, message):
    root = toy.write(tmp_path / "d")
    form(root)
    with pytest.raises(ValueError, match=re.escape(message)):
        lerobot.open_dataset(root, "training")


# Splits.


def _split(listed, total=100):
    info = meta.Info(pathlib.Path("d/meta/info.json"), 10.0, {}, "", "", listed, "", total, None)
    return [
        splits.choose(info, range(total), split, meta.Notes(info.root, split))[0]
        for split in ("training", "validation")
    ]


@pytest.mark.parametrize("name", ["val", "validation", "Validation", "valid"])
@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("0:80", "80:100"),
        (":80", "80:"),
        ("0%:80%", "80%:"),
        ("0:80%", "80%:100%"),
        (list(range(80)), list(range(80, 100))),
        ({"episodes": list(range(80))}, "-20:"),
        (["0:40", "40:80"], "80:90, 90:100"),
        ("train[:80%]", "train[80%:]"),
    ],
)
def test_splits_of_any_form_are_read(name, train, held_out):
    assert _split({"train": train, name: held_out}) == [set(range(80)), set(range(80, 100))]


@pytest.mark.parametrize(
    "listed",
    [
        {"train": "0:80", "test": "80:100"},
        {"train": "0:80"},
        {"train": "0:100", "test": "80:100"},
        {"test": "80:100"},
        {"train": "0:80", "val": "", "test_unseen": "80:"},
        {"train": "0:80", "val": None},
    ],
)
def test_episodes_of_other_splits_are_never_trained_on(listed):
    train, validation = _split(listed)
    assert train == set(range(76)) and validation == set(range(76, 80))


def test_validation_episodes_are_never_trained_on():
    assert _split({"train": "0:100", "val": "90:"}) == [set(range(90)), set(range(90, 100))]
    assert _split(None) == [set(range(95)), set(range(95, 100))]
    assert _split({"train": "0:1"}, 1) == [{0}, {0}]


@pytest.mark.parametrize("value", ["first half", "80:0", 0.8, "0:80:2", True, {"share": 0.8}])
def test_a_split_that_cannot_be_read_is_named(value):
    with pytest.raises(ValueError, match=r"splits\['train'\] is .*expected a range such as"):
        _split({"train": value})


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"train": "0:80", "val": "0:80"}, "leave no episode to train on"),
        (["0:80"], "expected an object such as"),
        ({"test": "0:100"}, "leave no episode to train on"),
    ],
)
def test_splits_that_leave_nothing_are_named(listed, message):
    with pytest.raises(ValueError, match=message):
        _split(listed)


def test_statistics_are_of_what_may_be_trained_on(tmp_path):
    root = toy.edit_info(toy.write(tmp_path / "d"), splits={"train": "0:2", "val": "2:3", "test": "3:4"})
    assert lerobot.open_dataset(root, "training").statistics.num_transitions == 11
    assert {e for e, _, _ in toy.seen(lerobot.open_dataset(root, "validation"))} == {2}


def flagged(root: pathlib.Path, episodes: Sequence[int], conventions: bool = True) -> pathlib.Path:
    """Ten episodes, of which `episodes` end with next.success."""
    toy.write(root, [4] * 10)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    toy.edit_info(root, features={**features, "next.success": {"dtype": "bool", "shape": [1], "names": None}})

    def add(rows: dict[str, list]) -> None:
        keys = zip(rows["episode_index"], rows["frame_index"], strict=True)
        rows["next.success"] = [episode in episodes and frame == 3 for episode, frame in keys]

    toy.edit(toy.data_file(root), add)
    if conventions:
        toy.write_json(root / "meta/robovlms.json", {"success": "next.success"})
    return root


def test_episodes_that_failed_are_left_out_where_the_conventions_name_the_flag(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = flagged(tmp_path / "d", (0, 3, 4, 9))
    trained = {episode for episode, _, _ in toy.seen(lerobot.open_dataset(root, "training"))}
    held_out = {episode for episode, _, _ in toy.seen(lerobot.open_dataset(root, "validation"))}
    assert trained == {0, 3, 4} and held_out == {9}  # the last 5 % of those that succeeded
    assert "left out 6 of 10 episodes marked as failed by 'next.success'" in caplog.text
    everything = lerobot.open_dataset(root, "training", success_only=False)
    assert {episode for episode, _, _ in toy.seen(everything)} == set(range(9))


def test_a_flag_that_nobody_names_is_said_and_changes_nothing(tmp_path, caplog):
    dataset = lerobot.open_dataset(flagged(tmp_path / "d", (0,), conventions=False), "training")
    assert len(dataset.episodes) == 9
    assert re.search(r'success_only is on, but nothing is described.*{"success": "next.success"}', caplog.text)


def test_a_flag_that_is_never_true_or_no_flag_is_refused(tmp_path):
    root = flagged(tmp_path / "d", ())
    with pytest.raises(ValueError, match=r"'next\.success' is true in none of 10 episodes"):
        lerobot.open_dataset(root, "training")
    for wrong in ("nothing", "action"):
        toy.write_json(root / "meta/robovlms.json", {"success": wrong})
        with pytest.raises(ValueError, match=rf"success names '{wrong}'.* flags are \['next.success'\]"):
            lerobot.open_dataset(root, "training")
