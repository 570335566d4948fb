"""From the index of a split to arrays of actions, states, spans and image places, made once per entry.

Frame ids count kept steps over all episodes. An episode of L steps has L + 1 ids: the last stands for what follows the
last step that is learned from, the next recorded frame or, where the recording ends, the last one again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from robovlms_jax.control import robot as robots
from robovlms_jax.data import features, shard_columns, shard_index, splits, statistics
from robovlms_jax.data import storage as storages
from robovlms_jax.data.registry import entry as entries
from robovlms_jax.data.registry import ranges, robot_entry
from robovlms_jax.data.rlds import checks, files, instructions
from robovlms_jax.data.rlds.options import Options

logger = logging.getLogger(__name__)

_FAILURE = re.compile(r"(?<![a-z])fail(ure|ures|ed|s)?(?![a-z])", re.IGNORECASE)


def prepare(
    directory: storages.Directory,
    split: splits.Split,
    fields: Mapping[str, features.Field],
    entry: entries.Entry,
    options: Options,
) -> files.Prepared:
    """The standardised arrays of a split, made where they are missing, damaged or out of date. Raises ValueError."""
    entry.check(fields, str(directory))
    for name, field in entry.sensors.items():
        path = features.locate(fields, field)
        if not shard_columns.is_kept(fields[path]):
            raise ValueError(
                f"{directory}: sensors.{name} is {path} with {fields[path].size} numbers per step in "
                f"{list(fields[path].shape)}; only vectors of up to {shard_columns.TABLE_SIZE} and other arrays of up "
                f"to {shard_columns.INLINE_SIZE} numbers are read. Leave it out of the description."
            )
    fields = entry.with_pictures(fields)
    target = shard_index.place(directory, split, options.index_dir)
    indexes = shard_index.build(
        directory,
        split,
        fields,
        target,
        workers=options.workers,
        max_damaged_share=options.max_damaged_share,
    )
    stamps = [index.header["shard"] for index in indexes]
    identity = json.dumps([files.VERSION, repr(entry), stamps, str(directory)], sort_keys=True, default=str)
    place = target / f"prepared-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    try:
        return files.load(place)
    except FileNotFoundError:
        pass
    except ValueError as error:
        logger.warning("%s is made again: %s", place, error)
        shutil.rmtree(place, ignore_errors=True)
    arrays, meta = _standardize(directory, split, fields, entry, indexes)
    files.save(place, arrays, meta)
    return files.load(place)


def storage_of(meta: Mapping[str, Any]) -> storages.Storage:
    """The shards that the arrays' places refer to."""
    directory = storages.Directory(meta["directory"])
    return shard_index.storage_of(directory, meta["split"]["file_format"], meta["shards"], meta["record_lengths"])


def _standardize(
    directory: storages.Directory,
    split: splits.Split,
    fields: Mapping[str, features.Field],
    entry: entries.Entry,
    indexes: Sequence[shard_index.ShardIndex],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name in `files.ARRAYS`, and what goes beside them."""
    names = (*files.ARRAYS, *(files.SENSOR + name for name in entry.sensors))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    table = instructions.Table()
    position, dropped, number, trimmed = 0, 0, 0, 0
    bar = tqdm.tqdm(
        total=sum(len(index.num_steps) for index in indexes), desc=f"{entry.name}: actions", unit="episode", delay=2
    )
    with bar:
        for file, index in enumerate(indexes):
            for record in _records(file, index, fields, entry, table):
                bar.update()
                number += 1
                if record is None:
                    dropped += 1
                    continue
                trimmed += int(record.pop("trimmed")[0])
                starts = record["start"]
                record |= {name: position + record[name] for name in ("start", "end")}
                record["number"] = np.full(len(starts), number - 1)
                for name, values in record.items():
                    parts[name].append(values)
                position += len(record["actions"])
    if position == 0:
        raise ValueError(f"{directory}: all {number} episodes of split {split.name!r} are empty.")
    if dropped:
        logger.warning("%s: left out %d of %d episodes that have no step to learn from", directory, dropped, number)
    if trimmed:
        logger.warning(
            "%s: left out %d steps at ends of episodes whose action or state is no number", directory, trimmed
        )
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    meta: dict[str, Any] = {
        "dataset": entry.name,
        "directory": str(directory),
        "split": dataclasses.asdict(split),
        "shards": [index.header["shard"]["file"] for index in indexes],
        "record_lengths": [index.header["record_lengths"] for index in indexes],
        "cameras": list(entry.cameras),
        "num_records": number,
        "wordings": table.entries,
        "robot": entry.robot.to_json(),
        "action_units": [entry.robot.action[column].measure[0] for column in entry.robot.scaled],
        "state_encoding": entry.state_encoding,
        "any_robot": isinstance(entry, robot_entry.RobotEntry),
        "state_gripper": entry.state_gripper if entry.measures_opening else "",
        "failure_texts": _failure_texts(indexes, fields),
        "statistics": _statistics(directory, entry, arrays).to_json(),
    }
    meta["image_sizes"] = checks.image_sizes(storage_of(meta), entry.camera_paths(fields), arrays, str(directory))
    return arrays, meta


def _records(
    file: int,
    index: shard_index.ShardIndex,
    fields: Mapping[str, features.Field],
    entry: entries.Entry,
    table: instructions.Table,
) -> Iterator[dict[str, np.ndarray] | None]:
    """One file's records: what `files.ARRAYS` names but "number", and sensors' arrays; "start" and "end" counted from
    the record's first row, and "trimmed", the steps taken off its end. None for a record without a step to learn from.
    `table` grows."""
    bounds = np.concatenate([[0], np.cumsum(index.num_steps)])
    columns = {name: index.numbers(features.locate(fields, name)) for name in entry.numeric_fields}
    sensors = {name: index.numbers(features.locate(fields, field)) for name, field in entry.sensors.items()}
    said = instructions.per_step(index, fields, (entry.instruction, *entry.more_instructions), table)
    success = _success(index, fields, entry, bounds)
    places = {
        part: np.stack([index.arrays[f"{path}:{part}"] for path in entry.camera_paths(fields).values()], axis=1)
        for part in ("offset", "length", "checksum")
    }
    for episode, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if first == last:
            yield None
            continue
        actions, states, rows = entry.standardize({name: v[first:last] for name, v in columns.items()})
        if len(rows) == 0:
            yield None
            continue
        length = _meaningful(actions, states)
        trimmed, actions, states, rows = len(rows) - length, actions[:length], states[:length], rows[:length]
        # The frame after the last step: the next recorded one, or the last again.
        rows = first + np.append(rows, min(rows[-1] + 1, last - first - 1))
        still = robots.rest(entry.robot.action, actions[-1])
        # Where the task changes, another episode begins; its first frame is the end of the one before.
        starts, instruction = instructions.spans(said[rows[:-1]], table)
        yield {
            "actions": np.concatenate([actions, still[None]]),
            "states": np.concatenate([states, states[-1:]]),
            "file_id": np.full(len(rows), file, np.int32),
            **{part: values[rows] for part, values in places.items()},
            **{files.SENSOR + name: values[rows].astype(np.float32) for name, values in sensors.items()},
            "start": starts,
            "end": np.append(starts[1:], len(rows) - 1),
            "instruction": instruction,
            "success": np.full(len(starts), success[episode]),
            "trimmed": np.array([trimmed]),
        }


def _meaningful(actions: np.ndarray, states: np.ndarray) -> int:
    """Steps that are left when those at the end are taken off whose action or state is no number: RLDS says that the
    last action means nothing. Where none is a number, all: they are counted and refused elsewhere."""
    finite = np.isfinite(actions).all(axis=1) & np.isfinite(states).all(axis=1)
    return int(np.flatnonzero(finite)[-1]) + 1 if finite.any() else len(actions)


def _success(
    index: shard_index.ShardIndex, fields: Mapping[str, features.Field], entry: entries.Entry, bounds: np.ndarray
) -> np.ndarray:
    """bool[E]: which episodes of a shard succeeded, as far as the entry says how to tell."""
    count = len(index.num_steps)
    if not entry.success or count == 0:
        return np.ones(count, bool)
    path = entry.success_path(fields)
    field = fields[path]
    if field.kind == "text":
        rows, texts = index.texts(path)
        pattern = re.compile(entry.failure_pattern)
        values = np.array([not pattern.search(text.decode("utf-8", errors="replace")) for text in texts], bool)[rows]
        return values if not field.per_step else ~_any_step(~values, bounds)
    values = index.numbers(path).astype(bool).reshape(-1)
    return _any_step(values, bounds) if field.per_step else values


def _any_step(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """bool[E]: whether any of an episode's steps is True."""
    counts = np.concatenate([[0], np.cumsum(values)])[bounds]
    return counts[1:] > counts[:-1]


def _failure_texts(
    indexes: Sequence[shard_index.ShardIndex], fields: Mapping[str, features.Field]
) -> dict[str, tuple[str, int]]:
    """Path of an episode's text -> (one that speaks of failure, how many do), for a hint."""
    found: dict[str, tuple[str, int]] = {}
    for path, field in fields.items():
        if field.kind != "text" or field.per_step:
            continue
        for index in indexes:
            rows, texts = index.texts(path)
            failed = [bool(_FAILURE.search(text.decode("utf-8", errors="replace"))) for text in texts]
            count = int(np.array(failed, bool)[rows].sum()) if texts else 0
            if count:
                example = texts[failed.index(True)].decode("utf-8", errors="replace")
                found[path] = (found.get(path, (example, 0))[0], found.get(path, ("", 0))[1] + count)
    return found


def _statistics(
    directory: storages.Directory, entry: entries.Entry, arrays: Mapping[str, np.ndarray]
) -> statistics.Statistics:
    """Of the steps to learn from; those that are not finite are named and left out.

    Raises ValueError if no step is finite, or the gripper is not between 0 and 1."""
    kept = np.ones(len(arrays["actions"]), bool)
    kept[arrays["end"]] = False  # what follows an episode; where an instruction changes it is a step of the next
    kept[arrays["start"]] = True
    finite = np.isfinite(arrays["actions"]).all(axis=1) & np.isfinite(arrays["states"]).all(axis=1)
    if not finite.all():
        bad = np.unique(np.searchsorted(arrays["start"], np.flatnonzero(~finite), side="right") - 1)
        logger.warning(
            "%s: %d steps in %d episodes have NaN or infinite actions or states, the first in record %d; they are left "
            "out of the statistics and replaced in training",
            directory,
            int((~finite).sum()),
            len(bad),
            int(arrays["number"][bad[0]]),
        )
    if not (kept & finite).any():
        raise ValueError(f"{directory}: no step has finite actions and states; is the entry {entry.name!r} right?")
    actions, states = arrays["actions"][kept & finite], arrays["states"][kept & finite]
    if not isinstance(entry, robot_entry.RobotEntry):
        ranges.require_gripper(actions[:, 6], entry, str(directory), "in the dataset's description")
    mask = statistics.mask_of(entry.robot)
    return statistics.compute(actions, states, len(np.unique(arrays["number"])), mask)
