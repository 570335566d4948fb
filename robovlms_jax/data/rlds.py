"""RLDS episodes in TFDS directories (Bridge, Open X-Embodiment), read without TensorFlow.

Opening takes three steps, each done once and kept in the index directory: `shard_index` finds every image and copies
every number; the registry's entry turns numbers into actions and state (`prepare`); then only arrays are mapped.

Frame ids count kept steps over all episodes. An episode of L steps has L + 1 ids: the last stands for what follows the
last step that is learned from, the next recorded frame or, where the recording ends, the last one again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import google_crc32c
import numpy as np
import tqdm

from robovlms_jax import interface
from robovlms_jax.data import atomic, base, features, frame_index, shard_index, statistics
from robovlms_jax.data import storage as storages
from robovlms_jax.data.registry import entry as entries
from robovlms_jax.data.registry import expressions

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the prepared arrays."""
HELD_OUT_SHARE = 0.05
"""Of the training episodes, the last ones, where a dataset has no split of its own to validate on (as upstream)."""

_ARRAYS = (
    "actions",
    "states",
    "file_id",
    "offset",
    "length",
    "checksum",
    "start",
    "end",
    "number",
    "instruction",
    "others",
    "success",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a dataset is opened.

    index_dir: where indexes go; "" = beside the data or in the user's cache.
    workers: processes that build an index.
    max_damaged_share: of the episodes, see `shard_index.build`.
    unlabelled_share: of the episodes without instruction that are kept; they are told `unlabelled_instruction`.
    success_only: leave out episodes that the dataset marks as failed.
    image_size: (height, width) that all images are scaled to; None keeps those of the dataset.
    """

    index_dir: str = ""
    workers: int = 1
    max_damaged_share: float = 0.01
    unlabelled_share: float = 0.0
    unlabelled_instruction: str = "interact with the objects"
    success_only: bool = True
    image_size: tuple[int, int] | None = None


class NotFoundError(ValueError):
    """No directory holds the dataset. Says where was looked, and what is there."""


class RldsDataset(base.Dataset):
    """One split of a dataset, as `open_dataset` opens it.

    statistics: of all its steps.
    action_units: metres and radians per unit of the arm's dimensions.
    control_hz: steps per second, 0 = unknown.
    """

    action_units = (1.0,) * 6

    def __init__(self, prepared: pathlib.Path, name: str, selection: tuple[base.Episode, ...], options: Options):
        self.name, self.episodes, self._prepared, self._options = name, selection, prepared, options
        self._meta, arrays = _load(prepared)
        self._actions, self._states = arrays["actions"], arrays["states"]
        self._starts = arrays["start"]
        stored = self._meta["image_sizes"]
        sizes = {camera: tuple(stored[camera]) for camera in interface.CAMERAS if camera in stored}
        self.image_sizes = dict.fromkeys(sizes, options.image_size) if options.image_size else sizes
        self.statistics = statistics.from_json(self._meta["statistics"], str(prepared))
        self.control_hz = float(self._meta["control_hz"])
        columns = [self._meta["cameras"].index(camera) for camera in sizes]
        self.may_lack_images = bool((arrays["length"][:, columns] == 0).any())
        self._index = frame_index.FrameIndex(
            _storage(self._meta),
            tuple(self._meta["cameras"]),
            arrays["file_id"],
            arrays["offset"],
            arrays["length"],
            arrays["checksum"],
            resize=options.image_size is not None,
        )

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        self._index.decode(self._rows(frame_ids), {camera: out[camera] for camera in cameras})
        return out

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        stored = {"rel_actions": self._actions, "state": self._states}
        if name not in stored or stored[name].shape[1] == 0:
            raise ValueError(f"{self.name} stores no {name!r}; it has rel_actions and, where recorded, state.")
        return base.require_finite(stored[name][self._rows(frame_ids)], frame_ids, name, self.name)

    def has_images(self, frame_ids: Sequence[int], camera: str) -> np.ndarray:
        """bool[n]: whether a frame has an image of this camera; where not, `images` gives black."""
        return self._index.is_stored(self._rows(frame_ids), camera)

    @property
    def num_transitions(self) -> int:
        """Steps of the chosen episodes that are learned from."""
        return sum(episode.end - episode.start for episode in self.episodes)

    @property
    def num_frame_ids(self) -> int:
        """Frame ids run from 0 to below this."""
        return len(self._actions)

    def proprio(self, frame_ids: Sequence[int]) -> np.ndarray:
        rows, encoding = self._rows(frame_ids), self._meta["state_encoding"]
        if encoding not in ("POS_EULER", "POS_QUAT"):
            raise ValueError(
                f"{self.name} records {'joints' if encoding == 'JOINT' else 'no state'}, not the gripper's pose that "
                "policy.proprio needs; train with --no-policy.proprio.enabled."
            )
        state = self.array("state", frame_ids)
        angles = state[:, 3:6] if encoding == "POS_EULER" else expressions.euler(state[:, 3:7])
        # The command given last, as at control time; before any, the first.
        first = self._starts[np.searchsorted(self._starts, rows, side="right") - 1]
        command = self._actions[np.maximum(rows - 1, first), 6:]
        return base.require_finite(np.concatenate([state[:, :3], angles, command], 1), frame_ids, "proprio", self.name)

    def close(self) -> None:
        """Release the shards; the next read opens them again."""
        self._index.close()

    def _rows(self, frame_ids: Sequence[int]) -> np.ndarray:
        rows = np.asarray(frame_ids, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self._actions)):
            raise ValueError(f"{self.name} has frames 0 to {len(self._actions) - 1}; asked for {rows.tolist()[:8]}.")
        return rows

    def __reduce__(self):
        chosen = {"statistics": self.statistics}
        return RldsDataset, (self._prepared, self.name, self.episodes, self._options), chosen


def open_dataset(
    root: str | os.PathLike[str],
    entry: entries.Entry | Mapping[str, Any],
    split: Literal["training", "validation"],
    *,
    name: str = "",
    options: Options = Options(),
    alone: bool = True,
) -> RldsDataset:
    """Open a dataset's training or validation episodes, building its index if there is none.

    Validation is the split `val` where there is one, else the last 5 % of the training episodes.

    Args:
      root: the directory with features.json, or one above it: <root>/<dataset>/<version>. May be a URL.
      entry: the registry's, or fields that replace inferred ones (see `registry.entry.infer`).
      name: of the dataset, where `entry` is no Entry.
      alone: whether `root` may be the dataset's own directory, rather than one with several.
    Raises:
      NotFoundError, ValueError: nothing usable there; says what was looked for and what was found.
    """
    label = entry.name if isinstance(entry, entries.Entry) else name
    others = entry.directories if isinstance(entry, entries.Entry) else entry.get("directories", ())
    names = (label, *others)
    directory = find(root, names, alone=alone)
    fields = shard_index.read_fields(directory)
    if not isinstance(entry, entries.Entry):
        entry = entries.infer(label, fields, entry)
    splits = shard_index.read_splits(directory)
    if "train" not in splits:
        raise ValueError(f"{directory} has no split 'train'; dataset_info.json lists {sorted(splits)}.")
    chosen = splits["val" if split == "validation" and "val" in splits else "train"]
    prepared = prepare(directory, chosen, fields, entry, options)
    meta, arrays = _load(prepared)
    numbers = arrays["number"]
    keep = np.ones(len(numbers), bool)
    total = meta["num_records"]
    if "val" not in splits and total > 1:  # a single episode is both
        border = min(round(total * (1 - HELD_OUT_SHARE)), total - 1)
        keep = numbers >= border if split == "validation" else numbers < border
    episodes = _select(meta, arrays, keep, entry, options, str(directory))
    if not episodes:
        raise ValueError(
            f"{directory}: no episode of split {chosen.name!r} is left for {split}: {meta['num_records']} recorded, "
            f"{int(keep.sum())} considered; the rest has no instruction, failed, or is too short "
            "(data.unlabelled_share, data.success_only)."
        )
    return RldsDataset(prepared, str(directory), episodes, options)


def find(root: str | os.PathLike[str], names: Sequence[str], *, alone: bool = True) -> storages.Directory:
    """The directory with features.json for one of `names` at or below `root`; of several versions the newest.

    Args:
      alone: whether `root` may be the dataset's own directory.
    Raises NotFoundError.
    """
    top = storages.Directory(root)
    candidates = [*([top] if alone else []), *(top / name for name in names)]
    for candidate in candidates:
        inside = candidate.names()
        if "features.json" in inside:
            return candidate
        versions = [v for v in inside if v.replace(".", "").isdigit() and "features.json" in (candidate / v).names()]
        if versions:
            return candidate / max(versions, key=lambda v: [int(part) for part in v.split(".") if part])
    there = top.names()
    listing = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    raise NotFoundError(
        f"no RLDS dataset {' or '.join(dict.fromkeys(names))}: looked for features.json in "
        f"{', '.join(str(c) for c in candidates)} and version directories below; {top} "
        f"{'holds ' + listing if there else 'does not exist or is empty'}. data/README.md says how to get datasets."
    )


def prepare(
    directory: storages.Directory,
    split: shard_index.Split,
    fields: Mapping[str, features.Field],
    entry: entries.Entry,
    options: Options,
) -> pathlib.Path:
    """Directory with the standardised arrays of a split, made where they are missing, damaged or out of date."""
    entry.check(fields, str(directory))
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
    identity = json.dumps([VERSION, repr(entry), stamps, str(directory)], sort_keys=True, default=str)
    prepared = target / f"prepared-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    try:
        _load(prepared)
        return prepared
    except FileNotFoundError:
        pass
    except ValueError as error:
        logger.warning("%s is made again: %s", prepared, error)
        shutil.rmtree(prepared, ignore_errors=True)
    arrays, meta = _standardize(directory, split, fields, entry, indexes)
    _save(prepared, arrays, meta)
    return prepared


def _standardize(
    directory: storages.Directory,
    split: shard_index.Split,
    fields: Mapping[str, features.Field],
    entry: entries.Entry,
    indexes: Sequence[shard_index.ShardIndex],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name in `_ARRAYS`, and what goes beside them."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
    texts: dict[str, int] = {}
    cameras = entry.cameras
    position, dropped, number = 0, 0, 0
    bar = tqdm.tqdm(
        total=sum(len(index.num_steps) for index in indexes), desc=f"{entry.name}: actions", unit="episode", delay=2
    )
    with bar:
        for file, index in enumerate(indexes):
            bounds = np.concatenate([[0], np.cumsum(index.num_steps)])
            columns = {name: index.numbers(f"steps/{name}") for name in entry.numeric_fields}
            languages = [
                _language(index, fields, name, texts) for name in (entry.instruction, *entry.more_instructions)
            ]
            success = (
                index.numbers(entry.success).astype(bool).reshape(len(index.num_steps))
                if entry.success
                else np.ones(len(index.num_steps), bool)
            )
            offsets, lengths, checksums = (
                np.stack([index.arrays[f"{path}:{part}"] for path in cameras.values()], axis=1)
                for part in ("offset", "length", "checksum")
            )
            for episode, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
                bar.update()
                number += 1
                if first == last:
                    dropped += 1
                    continue
                actions, states, rows = entry.standardize({name: v[first:last] for name, v in columns.items()})
                if len(rows) == 0:
                    dropped += 1
                    continue
                # The frame after the last step: the next recorded one, or the last again.
                rows = first + np.append(rows, min(rows[-1] + 1, last - first - 1))
                still = np.append(np.zeros(6, np.float32), actions[-1, 6])
                parts["actions"].append(np.concatenate([actions, still[None]]))
                parts["states"].append(np.concatenate([states, states[-1:]]))
                parts["file_id"].append(np.full(len(rows), file, np.int32))
                parts["offset"].append(offsets[rows])
                parts["length"].append(lengths[rows])
                parts["checksum"].append(checksums[rows])
                spoken = np.stack([language[rows[:-1]] for language in languages], axis=1)
                # Where the instruction changes, another episode begins; its first frame is the end of the one before.
                starts = np.flatnonzero(np.append(True, (spoken[1:, 0] != spoken[:-1, 0])))
                ends = np.append(starts[1:], len(rows) - 1)
                parts["start"].append(position + starts)
                parts["end"].append(position + ends)
                parts["number"].append(np.full(len(starts), number - 1))
                parts["instruction"].append(spoken[starts, 0])
                parts["others"].append(spoken[starts, 1:])
                parts["success"].append(np.full(len(starts), success[episode]))
                position += len(rows)
    if position == 0:
        raise ValueError(f"{directory}: all {number} episodes of split {split.name!r} are empty.")
    if dropped:
        logger.warning("%s: left out %d of %d episodes that have no step to learn from", directory, dropped, number)
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    kept = np.ones(position, bool)
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
    numbers = statistics.compute(
        arrays["actions"][kept & finite], arrays["states"][kept & finite], len(np.unique(arrays["number"]))
    )
    meta: dict[str, Any] = {
        "dataset": entry.name,
        "directory": str(directory),
        "split": dataclasses.asdict(split),
        "shards": [index.header["shard"]["file"] for index in indexes],
        "record_lengths": [index.header["record_lengths"] for index in indexes],
        "cameras": list(cameras),
        "num_records": number,
        "texts": list(texts),
        "control_hz": entry.control_hz,
        "state_encoding": entry.state_encoding,
        "statistics": numbers.to_json(),
    }
    meta["image_sizes"] = _image_sizes(_storage(meta), list(cameras), arrays)
    return arrays, meta


def _language(
    index: shard_index.ShardIndex, fields: Mapping[str, features.Field], name: str, texts: dict[str, int]
) -> np.ndarray:
    """int32[steps], rows of `texts`, which grows."""
    total = int(index.num_steps.sum())
    if not name:
        return np.full(total, texts.setdefault("", len(texts)), np.int32)
    path = f"steps/{name}"
    if fields[path].kind == "text":
        rows, table = index.texts(path)
        words = [text.decode("utf-8", errors="replace") for text in table]
    else:
        codes = index.arrays.get(f"{path}:table")
        if codes is None:
            codes, rows = np.unique(index.numbers(path), axis=0, return_inverse=True)
        else:
            rows = index.arrays[f"{path}:row"]
        words = ["".join(chr(code) for code in row[: int(np.argmax(np.append(row, 0) == 0))].tolist()) for row in codes]
    numbers = [texts.setdefault(" ".join(word.split()), len(texts)) for word in words]
    return np.array(numbers, np.int32)[rows.reshape(-1)] if total else np.zeros(0, np.int32)


def _image_sizes(
    storage: storages.Storage, cameras: Sequence[str], arrays: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, int]]:
    """Camera -> (height, width) of the first image that can be read."""
    sizes = {}
    for column, camera in enumerate(cameras):
        problem = "no frame has one"
        for row in np.flatnonzero(arrays["length"][:, column])[:16]:
            try:
                data = storage.read(
                    int(arrays["file_id"][row]), int(arrays["offset"][row, column]), int(arrays["length"][row, column])
                )
                sizes[camera] = frame_index.image_size(data)
                break
            except (OSError, ValueError, SyntaxError) as error:
                problem = str(error)
        else:
            logger.warning("camera %s is left out: %s", camera, problem)
    return sizes


def _select(
    meta: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    keep: np.ndarray,
    entry: entries.Entry,
    options: Options,
    where: str,
) -> tuple[base.Episode, ...]:
    texts = meta["texts"]
    blank = np.array([text == "" for text in texts])[arrays["instruction"]]
    # Which unlabelled episodes stay follows from their number alone: no random state to carry along.
    lottery = np.array(
        [google_crc32c.value(f"unlabelled {number}".encode()) / 2**32 for number in arrays["number"][blank].tolist()]
    )
    unlabelled = np.zeros(len(keep), bool)
    unlabelled[blank] = lottery >= options.unlabelled_share
    failed = ~arrays["success"] if options.success_only else np.zeros(len(keep), bool)
    for what, mask in (("without instruction", keep & unlabelled), ("marked as failed", keep & failed)):
        if mask.any():
            logger.info("%s: left out %d of %d episodes %s", where, mask.sum(), keep.sum(), what)
    chosen = np.flatnonzero(keep & ~unlabelled & ~failed)
    episodes = []
    for start, end, instruction, others in zip(
        arrays["start"][chosen].tolist(),
        arrays["end"][chosen].tolist(),
        arrays["instruction"][chosen].tolist(),
        arrays["others"][chosen].tolist(),
        strict=True,
    ):
        sentence = texts[instruction] or options.unlabelled_instruction
        rewordings = tuple(dict.fromkeys(texts[o] for o in others if texts[o] and texts[o] != sentence))
        episodes.append(base.Episode(start, end, sentence, entry.name, rewordings))
    return tuple(episodes)


def _storage(meta: Mapping[str, Any]) -> storages.Storage:
    directory = storages.Directory(meta["directory"])
    return shard_index.storage_of(directory, meta["split"]["file_format"], meta["shards"], meta["record_lengths"])


def _save(prepared: pathlib.Path, arrays: Mapping[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write arrays, then the file that marks completeness and knows their checksums."""
    prepared.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for name in _ARRAYS:
        path = prepared / f"{name}.npy"
        with atomic.replacing(path) as file:
            np.save(file, arrays[name])
        checksums[name] = google_crc32c.value(path.read_bytes())
    content = {**meta, "checksums": checksums}
    text = json.dumps(content)
    atomic.write_json(prepared / "meta.json", {"checksum": google_crc32c.value(text.encode()), "content": text})
    atomic.write_json(prepared / "dataset_statistics.json", meta["statistics"])


def _load(prepared: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(meta, arrays, memory-mapped). Raises FileNotFoundError when never finished, ValueError when damaged."""
    path = prepared / "meta.json"
    try:
        envelope = json.loads(path.read_text())
        if google_crc32c.value(envelope["content"].encode()) != envelope["checksum"]:
            raise ValueError("its checksum is wrong")
        meta = json.loads(envelope["content"])
        arrays = {}
        for name in _ARRAYS:
            file = prepared / f"{name}.npy"
            arrays[name] = np.asarray(np.load(file, mmap_mode="r"))
            if google_crc32c.value(file.read_bytes()) != meta["checksums"][name]:
                raise ValueError(f"{file} is damaged")
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged JSON and npy files raise almost anything
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return meta, arrays
