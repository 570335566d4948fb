"""Which rows, pictures and sentences belong together. All that is stored twice is compared; an episode about which two
places disagree is left out by name, never paired with what lies where it should be.

Rows are found by their own `episode_index` and `frame_index`, pictures by their number in the video: where the episode
begins, which must fit the episodes before it, plus `frame_index`. The `timestamp` column is a clock and only compared.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.data import sentences
from robovlms_jax.data.lerobot import faults as left_out
from robovlms_jax.data.lerobot import meta, spans, tables


@dataclasses.dataclass(frozen=True)
class Paired:
    """An episode of which nothing disagrees.

    first, last: its rows in the sorted `tables.Rows`, `last` excluded; frame t is row first + t.
    videos: feature key -> file and the number of the episode's first frame in it.
    """

    number: int
    first: int
    last: int
    videos: Mapping[str, tuple[pathlib.Path, int]]


def pair(
    info: meta.Info,
    rows: tables.Rows,
    listed: Sequence[meta.EpisodeRow],
    tasks: Mapping[int, tuple[str, ...]],
    max_share: float,
    notes: meta.Notes,
) -> tuple[tables.Rows, list[Paired]]:
    """Sort the rows and find every episode's.

    Args:
      listed: all of meta/episodes, by number.
      max_share: of the episodes that may be left out.
    Returns:
      The rows by episode and frame, each once; the episodes of which nothing disagrees, by number.
    Raises:
      ValueError: more than `max_share` are left out, or all.
    """
    faults = left_out.Faults()
    episodes = _each_once(listed, faults, notes)
    rows = _sorted(rows, faults, notes)
    numbers, firsts = np.unique(rows.episode, return_index=True)
    lasts = np.append(firsts[1:], len(rows.episode))
    bounds = {n: (a, b) for n, a, b in zip(numbers.tolist(), firsts.tolist(), lasts.tolist(), strict=True)}
    for number in bounds:
        if number not in episodes:
            faults.add(
                number, "not in meta/episodes", f"{bounds[number][1] - bounds[number][0]} rows in the data files"
            )
    _compare_rows(info, rows, faults)
    for episode in episodes.values():
        _compare_counts(info, episode, rows, bounds.get(episode.number), faults)
    _compare_indices(rows, episodes, bounds, faults, notes)
    _compare_tasks(rows, episodes, tasks, faults, notes)
    lengths = {n: b - a for n, (a, b) in bounds.items()}
    lengths = {n: e.length if e.length is not None else lengths.get(n, 0) for n, e in episodes.items()}
    videos = spans.compare(info, episodes, lengths, faults, notes)
    faults.settle(info, len(set(episodes) | set(bounds)), max_share, notes)
    _compare_totals(info, len(episodes), len(rows.episode), notes)
    paired = [Paired(n, *bounds[n], videos[n]) for n in episodes if n not in faults]
    _compare_clock(info, rows, paired, notes)
    return rows, paired


def _each_once(
    listed: Sequence[meta.EpisodeRow], faults: left_out.Faults, notes: meta.Notes
) -> dict[int, meta.EpisodeRow]:
    episodes: dict[int, meta.EpisodeRow] = {}
    repeated = 0
    for episode in listed:
        if episode.fault:
            faults.add(episode.number, "whose entry in meta/episodes is incomplete", episode.fault)
        known = episodes.setdefault(episode.number, episode)
        if known is not episode:
            repeated += 1
            if known != episode:
                faults.add(episode.number, "listed in meta/episodes twice", "the two entries differ")
    if repeated:
        notes.warn(f"meta/episodes repeats {repeated} episodes; entries that are the same are read once.")
    return episodes


def _sorted(rows: tables.Rows, faults: left_out.Faults, notes: meta.Notes) -> tables.Rows:
    """By episode and frame, without rows that are the same as another."""
    if rows.unkeyed:
        notes.warn(f"{rows.unkeyed} rows have no episode_index or no frame_index; they are left out.")
    if rows.frame is None:
        notes.guess("the data files have no frame_index; rows are taken in the order in which they are stored.")
        order = np.argsort(rows.episode, kind="stable")
        rows = rows.take(order)
        starts = np.flatnonzero(np.append(True, rows.episode[1:] != rows.episode[:-1]))
        position = np.arange(len(order))
        frame = position - starts[np.searchsorted(starts, position, side="right") - 1] if len(order) else position
        return dataclasses.replace(rows, frame=frame)
    rows = rows.take(np.lexsort((rows.frame, rows.episode)))
    again = np.append(False, (rows.episode[1:] == rows.episode[:-1]) & (rows.frame[1:] == rows.frame[:-1]))[
        : len(rows.episode)
    ]
    if not again.any():
        return rows
    places = np.flatnonzero(again)
    same = np.ones(len(places), bool)
    for values in (rows.task, rows.index, rows.timestamp, *rows.numbers.values()):
        if values is not None:
            here, before = (values[p].reshape(len(places), -1) for p in (places, places - 1))
            same &= ((here == before) | ((here != here) & (before != before))).all(axis=1)
    differ = np.zeros(len(again), bool)
    differ[places[~same]] = True
    faults.add_rows(rows, differ, "with different rows of one frame_index", lambda r: f"frame {rows.frame[r]}")
    notes.warn(f"{len(places)} rows have the episode and frame of another; those that are the same are read once.")
    return rows.take(np.flatnonzero(~again))


def _compare_rows(info: meta.Info, rows: tables.Rows, faults: left_out.Faults) -> None:
    """What can be told row by row."""
    starts = np.flatnonzero(np.append(True, rows.episode[1:] != rows.episode[:-1])[: len(rows.episode)])
    position = np.arange(len(rows.episode))
    first = starts[np.searchsorted(starts, position, side="right") - 1] if len(starts) else position
    assert rows.frame is not None
    faults.add_rows(
        rows,
        rows.frame != position - first,
        "whose rows have gaps",
        lambda r: f"frame_index {rows.frame[r]} where {r - first[r]} should be",
    )
    moved = rows.file != rows.file[first]
    faults.add_rows(
        rows, moved, "spread over files", lambda r: f"{rows.paths[rows.file[first[r]]]} and {rows.paths[rows.file[r]]}"
    )
    for name, sizes in rows.sizes.items():
        width = info.width(name)
        faults.add_rows(
            rows,
            sizes != width,
            f"whose {name} cannot be read",
            lambda r, s=sizes, w=width, n=name: (
                f"frame {rows.frame[r]} has {'a null' if s[r] < 0 else f'{s[r]} numbers'} in {n}, expected {w} numbers"
            ),
        )


def _compare_counts(
    info: meta.Info, episode: meta.EpisodeRow, rows: tables.Rows, found: tuple[int, int] | None, faults: left_out.Faults
) -> None:
    """length, dataset_from_index and dataset_to_index, and the data file, with the rows that were found."""
    number = episode.number
    said = "" if episode.length is None else f", meta/episodes says {episode.length}"
    if found is None:
        place = "" if episode.data is None else f" ({info.file('data_path', *episode.data)})"
        faults.add(number, "whose rows are missing", f"no row in the data files{place}{said}")
        return
    count = found[1] - found[0]
    if episode.length is not None and episode.length != count:
        faults.add(number, "whose rows are not as many as meta/episodes says", f"{count} rows{said}")
    if episode.first is not None and episode.last is not None and episode.last - episode.first != count:
        span = f"dataset_from_index {episode.first}, dataset_to_index {episode.last}"
        faults.add(number, "whose rows are not as many as meta/episodes says", f"{count} rows, {span}")
    if episode.data is not None:
        path = rows.paths[rows.file[found[0]]]
        expected = info.file("data_path", *episode.data)
        if path != info.root / expected:
            detail = f"rows in {path.relative_to(info.root)}, meta/episodes says {expected}"
            faults.add(number, "whose rows lie in another file", detail)


def _compare_indices(
    rows: tables.Rows,
    episodes: Mapping[int, meta.EpisodeRow],
    bounds: Mapping[int, tuple[int, int]],
    faults: left_out.Faults,
    notes: meta.Notes,
) -> None:
    """The running number of each row with where meta/episodes says that its episode begins.

    A part of a larger dataset may number its rows as the whole does, or anew, in one of the two places: then the
    episodes are in the same order, and one of the two counts without gaps.
    """
    if rows.index is None:
        return
    assert rows.frame is not None
    begin = rows.index - rows.frame
    wrong = np.append(False, (begin[1:] != begin[:-1]) & (rows.episode[1:] == rows.episode[:-1]))[: len(begin)]
    wrong |= rows.index == tables.NULL
    faults.add_rows(
        rows, wrong, "whose index does not count its rows", lambda r: f"index {rows.index[r]} at frame {rows.frame[r]}"
    )
    compared = [e for e in episodes.values() if e.number in bounds and e.first is not None and e.number not in faults]
    if not compared:
        return
    stored = np.array([begin[bounds[e.number][0]] for e in compared])
    said = np.array([e.first for e in compared])
    offsets = stored - said
    values, counts = np.unique(offsets, return_counts=True)
    if len(values) == 1:
        if values[0] != 0:
            notes.guess(f"the index column is dataset_from_index of meta/episodes plus {values[0]} everywhere.")
        return
    lengths = np.array([bounds[e.number][1] - bounds[e.number][0] for e in compared])
    for one, other in ((stored, said), (said, stored)):
        order = np.argsort(one)
        counted = (np.diff(one[order]) == lengths[order][:-1]).all()
        if counted and (np.diff(other[order]) >= lengths[order][:-1]).all():
            notes.guess("the index column and dataset_from_index count in different ways; the order is the same.")
            return
    common = values[np.argmax(counts)]
    for episode, offset, index in zip(compared, offsets.tolist(), stored.tolist(), strict=True):
        if offset != common or counts.max() * 2 <= len(compared):
            detail = f"its rows begin at index {index}, meta/episodes says {episode.first}"
            faults.add(episode.number, "whose index is another's", detail)


def _compare_tasks(
    rows: tables.Rows,
    episodes: Mapping[int, meta.EpisodeRow],
    tasks: Mapping[int, tuple[str, ...]],
    faults: left_out.Faults,
    notes: meta.Notes,
) -> None:
    """task_index of every row with meta/tasks, and an episode's list of sentences with those of its rows."""
    faults.add_rows(rows, rows.task == tables.NULL, "whose task_index is null", lambda r: f"frame {rows.frame[r]}")
    unknown = ~np.isin(rows.task, [*tasks, tables.NULL])
    faults.add_rows(rows, unknown, "with a task that meta/tasks lacks", lambda r: f"task_index {rows.task[r]}")
    found: dict[int, set[int]] = collections.defaultdict(set)
    for number, task in np.unique(np.stack([rows.episode, rows.task], axis=1), axis=0).tolist():
        found[number].add(task)
    said: dict[int, set[str]] = {}
    for number in found:
        if number in episodes and number not in faults and episodes[number].tasks is not None:
            try:
                said[number] = _told(episodes[number].tasks, tasks)
            except ValueError as error:
                faults.add(number, "whose tasks in meta/episodes are no sentences", str(error))
    renamed = _renamed(said, found, tasks)
    if renamed:
        notes.guess(f"tasks {renamed} of meta/episodes are called otherwise in meta/tasks, which counts.")
    for number, told in said.items():
        have = {sentence for task in found[number] for sentence in tasks[task]}
        each = all(not tasks[task] or told & set(tasks[task]) for task in found[number])
        if told and not (told <= have and each) and not found[number] <= set(renamed):
            detail = f"meta/episodes says {sorted(told)}, its rows' task_index {sorted(have)}"
            faults.add(number, "whose tasks differ", detail)


def _told(cell: Any, tasks: Mapping[int, tuple[str, ...]]) -> set[str]:
    """Sentences of an episode's `tasks`, which may hold numbers of tasks. Raises ValueError."""
    stored = cell if isinstance(cell, list) else [cell]
    if stored and all(isinstance(task, int) for task in stored):
        return {sentence for task in stored for sentence in tasks.get(task, ())}
    return set(sentences.wordings(stored))


def _renamed(
    said: Mapping[int, set[str]], found: Mapping[int, set[int]], tasks: Mapping[int, tuple[str, ...]]
) -> list[int]:
    """Tasks that were worded anew in meta/tasks alone: all their episodes, more than one, say the same other sentence,
    which no task has."""
    known = {sentence for listed in tasks.values() for sentence in listed}
    by_task: dict[int, list[str]] = collections.defaultdict(list)
    for number, told in said.items():
        if told and len(found[number]) == 1:
            by_task[next(iter(found[number]))] += told
    return sorted(
        task
        for task, told in by_task.items()
        if tasks[task] and len(told) > 1 and len(set(told)) == 1 and told[0] not in known
    )


def _compare_totals(info: meta.Info, num_episodes: int, num_rows: int, notes: meta.Notes) -> None:
    for field, found, said in (
        ("total_episodes", num_episodes, info.total_episodes),
        ("total_frames", num_rows, info.total_frames),
    ):
        if said is not None and said != found:
            why = "part of the dataset is not here" if found < said else "info.json is out of date"
            notes.warn(f"info.json says {field} {said}, there are {found}: {why}.")


def _compare_clock(info: meta.Info, rows: tables.Rows, paired: Sequence[Paired], notes: meta.Notes) -> None:
    """Whether `timestamp` is frame_index / fps."""
    if rows.timestamp is None or not paired:
        return
    assert rows.frame is not None
    chosen = np.concatenate([np.arange(episode.first, episode.last) for episode in paired])
    expected = rows.frame[chosen] / info.fps
    # LeRobot's own tolerance, and what float32 seconds cannot tell apart.
    wrong = ~(np.abs(rows.timestamp[chosen] - expected) <= 1e-4 + 1e-6 * expected)
    if wrong.any():
        place = int(np.argmax(wrong))
        row = chosen[place]
        notes.warn(
            f"{int(wrong.sum())} of {len(chosen)} timestamps are not frame_index / fps (episode {rows.episode[row]}, "
            f"frame {rows.frame[row]}: {rows.timestamp[row]:.6g} s, expected {expected[place]:.6g} s), as a recorder's "
            "clock gives them; frames are found by frame_index / fps."
        )
