"""Rows, pictures and sentences of a LeRobotDataset that do not belong together are never paired."""

from __future__ import annotations

import fractions
import itertools
import logging
import pathlib
import re
import shutil
import tempfile

import hypothesis
import pytest
from hypothesis import strategies as st

from robovlms_jax.data import lerobot
from tests.data import toy_lerobot as toy

LENGTHS = (5, 6, 4, 5)
SENTENCES = ("open it", "close it")


def expected(*episodes: int, lengths=LENGTHS) -> list[tuple[int, int, str]]:
    return [(e, t, SENTENCES[e % 2]) for e in episodes for t in range(lengths[e])]


def opened(root: pathlib.Path, split: lerobot.Split = "training", **settings) -> list[tuple[int, int, str]]:
    return toy.seen(lerobot.open_dataset(root, split, **settings))


@pytest.mark.parametrize("video", [False, True])
def test_a_whole_dataset_is_paired_without_a_word(tmp_path, caplog, video):
    root = toy.write(tmp_path / "d", video=video, files=[[0, 1], [2, 3]], cameras=("a", "wrist"))
    assert opened(root) == expected(0, 1, 2) and opened(root, "validation") == expected(3)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(order=st.permutations(range(sum(LENGTHS))))
def test_rows_in_any_order_are_found_by_their_keys(order):
    with tempfile.TemporaryDirectory() as folder:
        root = toy.write(pathlib.Path(folder) / "d")
        toy.choose(toy.data_file(root), order)
        assert opened(root) == expected(0, 1, 2)


def test_a_part_of_a_larger_dataset_keeps_its_numbers(tmp_path, caplog):
    for video in (False, True):
        root = toy.write(tmp_path / f"{video}", video=video, files=[[0, 1], [2, 3]])
        toy.data_file(root).unlink()
        toy.choose(toy.episodes_file(root), [2, 3])
        assert opened(root) == expected(2) and opened(root, "validation") == expected(3)
        assert "total_episodes 4, there are 2" in caplog.text
    # The same with rows numbered anew, as tools do that filter a table.
    toy.edit(toy.data_file(root, 1), lambda rows: rows.update(index=list(range(9))))
    assert opened(root) == expected(2)


def test_missing_rows_are_left_out_up_to_a_share(tmp_path, caplog):
    root = toy.write(tmp_path / "d", files=[[0], [1], [2], [3]])
    toy.data_file(root, 1).unlink()
    with pytest.raises(
        ValueError, match=r"(?s)of 4 episodes 1 cannot be used.*1 whose rows are missing: episode 1: no row"
    ):
        opened(root)
    assert opened(root, max_left_out_share=0.25) == expected(0, 2)
    assert "1 of 4 episodes are left out" in caplog.text and "file-001.parquet" in caplog.text
    for number in (0, 2, 3):
        toy.data_file(root, number).unlink()
    with pytest.raises(ValueError, match="holds no parquet file"):
        opened(root, max_left_out_share=0.9)


def _swap_episodes(rows):
    rows["episode_index"] = [{0: 1, 1: 0}.get(e, e) for e in rows["episode_index"]]


SPOILED_ROWS = {
    "whose rows have gaps": lambda rows: rows["frame_index"].__setitem__(7, 9),
    "frame 2 has a null in action": lambda rows: rows["action"].__setitem__(7, None),
    "frame 2 has 6 numbers in action, expected 7": lambda rows: rows["action"].__setitem__(7, [0.0] * 6),
    "with different rows of one frame_index": lambda rows: rows["frame_index"].__setitem__(7, 1),
    "with a task that meta/tasks lacks: episode 1: task_index 9": lambda rows: rows["task_index"].__setitem__(7, 9),
    "whose task_index is null": lambda rows: rows["task_index"].__setitem__(7, None),
    "whose tasks differ: episode 1: meta/episodes says": lambda rows: rows["task_index"].__setitem__(7, 0),
    "whose index does not count its rows": lambda rows: rows["index"].__setitem__(7, 99),
    "1 rows have no episode_index": lambda rows: rows["episode_index"].__setitem__(7, None),
    "whose rows are not as many": _swap_episodes,
}


@pytest.mark.parametrize("message", SPOILED_ROWS)
def test_an_episode_whose_rows_disagree_is_left_out_by_name(tmp_path, caplog, message):
    root = toy.write(tmp_path / "d")
    toy.edit(toy.data_file(root), SPOILED_ROWS[message])
    kept = opened(root, max_left_out_share=0.5)
    assert {e for e, _, _ in kept} <= {0, 2, 3} and message in caplog.text
    with pytest.raises(ValueError, match="cannot be used"):
        opened(root)


def test_episodes_of_equal_length_with_each_others_numbers_are_told_by_their_index(tmp_path, caplog):
    root = toy.write(tmp_path / "d", lengths=(5,) * 6, tasks=("open it",))
    toy.edit(toy.data_file(root), _swap_episodes)
    dataset = lerobot.open_dataset(root, "training", max_left_out_share=0.5)
    assert {e for e, _, _ in toy.seen(dataset)} <= {2, 3, 4, 5}
    assert "2 whose index is another's: episode 0: its rows begin at index 5, meta/episodes says 0" in caplog.text


SPOILED_EPISODES = {
    "whose rows are not as many as meta/episodes says: episode 1: 6 rows, meta/episodes says 5": ("length", 5),
    "6 rows, dataset_from_index 5, dataset_to_index 12": ("dataset_to_index", 12),
    "whose rows lie in another file": ("data/file_index", 7),
    "data/chunk_index is null": ("data/chunk_index", None),
    "whose tasks differ": ("tasks", ["open it"]),
    f"videos/{toy.FRONT}/file_index is null": (f"videos/{toy.FRONT}/file_index", None),
    "file-003.mp4 does not exist": (f"videos/{toy.FRONT}/file_index", 3),
    f"videos/{toy.FRONT}/from_timestamp is null": (f"videos/{toy.FRONT}/from_timestamp", float("nan")),
    f"videos/{toy.FRONT}/from_timestamp is -1.0": (f"videos/{toy.FRONT}/from_timestamp", -1.0),
    f"videos/{toy.FRONT}/chunk_index is null": (f"videos/{toy.FRONT}/chunk_index", float("nan")),
    "overlap by 2 frames": (f"videos/{toy.FRONT}/from_timestamp", 0.3),
}


@pytest.mark.parametrize("message", SPOILED_EPISODES)
def test_an_episode_whose_entry_disagrees_is_left_out_by_name(tmp_path, message):
    root = toy.write(tmp_path / "d", video=True)
    column, value = SPOILED_EPISODES[message]
    toy.edit(toy.episodes_file(root), lambda listed: listed[column].__setitem__(1, value))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        opened(root)
    assert re.search(r"episodes? 1|episodes 0 and 1", str(error.value))


def test_videos_that_do_not_fit_are_refused(tmp_path):
    whole = toy.write(tmp_path / "whole", video=True)
    frames = [(e, t) for e, n in enumerate(LENGTHS) for t in range(n)]
    spoiled = {
        "it has 23 frames, its 4 episodes have 20": {"frames": [*frames[:5], (7, 0), (7, 1), (7, 2), *frames[5:]]},
        "episode 3 ends at 2.000 s, the video lasts 1.900 s": {"frames": frames[:-1]},
        "has 12 frames per second, info.json says fps 10": {"frames": frames, "rate": 12},
        "has 48 x 64 pixels, info.json says 32 x 48": {"frames": frames, "size": (48, 64)},
    }
    for number, (message, settings) in enumerate(spoiled.items()):
        root = tmp_path / str(number)
        shutil.copytree(whole, root)
        toy.write_video(root, **settings)
        with pytest.raises(ValueError, match=message):
            opened(root)
    video = next(root.rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"file-000\.mp4 cannot be read"):
        opened(root)


@pytest.mark.parametrize("shift", [-0.2, 0.3, 60.0])
def test_offsets_carried_over_from_another_file_are_refused(tmp_path, shift):
    root = toy.write(tmp_path / "d", video=True)

    def change(listed):
        for part in ("from", "to"):
            column = listed[f"videos/{toy.FRONT}/{part}_timestamp"]
            column[2:] = [value + shift for value in column[2:]]

    toy.edit(toy.episodes_file(root), change)
    with pytest.raises(ValueError, match=r"4 whose video does not fit: episodes 0, 1, 2 and 1 more: .*file-000\.mp4"):
        opened(root)


def test_a_discarded_take_that_the_metadata_steps_over_is_no_fault(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = toy.write(tmp_path / "d", video=True)
    frames = [(e, t) for e, n in enumerate(LENGTHS) for t in range(n)]
    toy.write_video(root, [*frames[:5], (7, 0), (7, 1), *frames[5:]])

    def change(listed):
        for part in ("from", "to"):
            column = listed[f"videos/{toy.FRONT}/{part}_timestamp"]
            column[1:] = [value + 0.2 for value in column[1:]]

    toy.edit(toy.episodes_file(root), change)
    assert opened(root) == expected(0, 1, 2)
    assert "2 frames between episodes 0 and 1 belong to no episode" in caplog.text


def test_a_wrong_end_is_said_where_lengths_fit_the_video(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = toy.write(tmp_path / "d", video=True)
    toy.edit(toy.episodes_file(root), lambda listed: listed[f"videos/{toy.FRONT}/to_timestamp"].__setitem__(1, 9.0))
    assert opened(root) == expected(0, 1, 2)
    assert "lengths decide" in caplog.text


def test_episodes_that_lie_in_a_video_in_another_order_than_their_numbers_are_said(tmp_path, caplog):
    root = toy.write(tmp_path / "d", lengths=(5, 5, 5, 5), video=True)
    for part in ("from_timestamp", "to_timestamp"):
        toy.edit(
            toy.episodes_file(root),
            lambda listed, key=f"videos/{toy.FRONT}/{part}": listed.update(
                {key: [listed[key][i] for i in (0, 2, 1, 3)]}
            ),
        )
    lerobot.open_dataset(root, "training")
    assert "episode 2 lies before episode 1. Lengths fit, and nothing else tells" in caplog.text


def test_a_video_of_variable_frame_rate_is_refused_rather_than_read_at_other_times(tmp_path):
    root = toy.write(tmp_path / "d", video=True)
    frames = [(e, t) for e, length in enumerate(LENGTHS) for t in range(length)]
    evenly_on_average = list(itertools.accumulate([0, *[60] * 9, *[140] * 10]))
    toy.write_video(root, frames, milliseconds=evenly_on_average)
    with pytest.raises(ValueError, match=r"(?s)4 whose video does not fit.*frame \d+ comes .* s after.*ffmpeg"):
        lerobot.open_dataset(root, "training")


def test_how_long_the_last_frame_stays_says_nothing_about_the_others(tmp_path):
    root = toy.write(tmp_path / "d", lengths=(12,) * 4, video=True)
    short, path = tmp_path / "short.mp4", root / f"videos/{toy.FRONT}/chunk-000/file-000.mp4"
    path.rename(short)
    with toy.av.open(str(short)) as source, toy.av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        packets[-1].duration *= 6
        for packet in packets:
            packet.stream = stream
            out.mux(packet)
    assert opened(root) == expected(0, 1, 2, lengths=(12,) * 4)


@pytest.mark.parametrize("in_stream_time", [False, True])
def test_frames_are_counted_where_the_stream_is_a_little_slower_than_fps(tmp_path, in_stream_time):
    # 9.95 and 10 frames per second are half a frame apart after 10 s.
    lengths = (70, 70, 70)
    root = toy.write(tmp_path / "d", lengths=lengths, video=True)
    frames = [(e, t) for e, n in enumerate(lengths) for t in range(n)]
    toy.write_video(root, frames, rate=fractions.Fraction(995, 100))
    if in_stream_time:
        times = {part: [70 * (e + add) / 9.95 for e in range(3)] for part, add in (("from", 0), ("to", 1))}
        columns = {f"videos/{toy.FRONT}/{part}_timestamp": values for part, values in times.items()}
        toy.edit(toy.episodes_file(root), lambda listed: listed.update(columns))
    assert [(e, t) for e, t, _ in opened(root)] == [(e, t) for e in (0, 1) for t in range(70)]


CLOCKS = {
    "drift": lambda t: 1.04 * t / 10,
    "late start and jitter": lambda t: 0.3 + t / 10 + 0.06 * (t % 3 == 1),
    "epoch": lambda t: 1.7e9 + t / 10,
    "29.97 against 30": lambda t: t / 9.99,
    "stopped": lambda t: float("nan"),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_frames_are_found_by_number_where_timestamps_are_a_clock(tmp_path, caplog, clock):
    root = toy.write(tmp_path / "d", video=True)
    toy.edit(toy.data_file(root), lambda rows: rows.update(timestamp=[CLOCKS[clock](t) for t in rows["frame_index"]]))
    assert opened(root) == expected(0, 1, 2) and opened(root, "validation") == expected(3)
    assert caplog.text.count("frames are found by frame_index / fps") == 1  # training says it, validation does not


def test_what_is_stored_again_is_read_once(tmp_path, caplog):
    root = toy.write(tmp_path / "d")
    toy.choose(toy.data_file(root), [*range(20), 3, 4])
    toy.choose(toy.episodes_file(root), [0, 1, 2])
    second = root / "meta/episodes/chunk-000/file-001.parquet"
    shutil.copy(toy.episodes_file(toy.write(tmp_path / "other")), second)
    (second.parent / "._file-001.parquet").write_bytes(b"macOS")
    assert opened(root) == expected(0, 1, 2)
    assert "repeats 3 episodes" in caplog.text and "2 rows have the episode and frame of another" in caplog.text
    toy.edit(second, lambda listed: listed["dataset_from_index"].__setitem__(0, 1))
    with pytest.raises(ValueError, match="1 listed in meta/episodes twice: episode 0"):
        opened(root)


def test_tasks_worded_anew_are_told_from_tasks_in_another_order(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = toy.write(tmp_path / "d")
    toy.save(root / "meta/tasks.parquet", {"task_index": [0, 1], "task": ["open it", "shut the box"]})
    assert [e.instruction for e in lerobot.open_dataset(root, "training").episodes][1] == "shut the box"
    assert "tasks [1] of meta/episodes are called otherwise" in caplog.text
    toy.save(root / "meta/tasks.parquet", {"task_index": [1, 0], "task": ["open it", "close it"]})
    with pytest.raises(ValueError, match="4 whose tasks differ"):
        opened(root)


def test_rows_that_no_episode_lists_are_counted(tmp_path, caplog):
    root = toy.write(tmp_path / "d")
    toy.choose(toy.episodes_file(root), [0, 1, 3])
    assert opened(root, max_left_out_share=0.25) == expected(0, 1)
    assert "1 not in meta/episodes: episode 2: 4 rows in the data files" in caplog.text
