"""Find a dataset's directory, choose its split, and leave out the episodes that are not asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np

from robovlms_jax.data import base, notices, shard_index, splits
from robovlms_jax.data import storage as storages
from robovlms_jax.data.registry import entry as entries
from robovlms_jax.data.registry import infer, ranges
from robovlms_jax.data.rlds import checks, files, prepared
from robovlms_jax.data.rlds.dataset import RldsDataset
from robovlms_jax.data.rlds.options import Options

logger = logging.getLogger(__name__)

DEFAULTS = Options()


class NotFoundError(ValueError):
    """No directory holds the dataset. Says where was looked, and what is there."""


class SeveralError(NotFoundError):
    """A dataset has several configurations, and none is named. Says which."""


def open_dataset(
    root: str | os.PathLike[str],
    entry: entries.Entry | Mapping[str, Any],
    split: splits.Use,
    *,
    name: str = "",
    options: Options = DEFAULTS,
    alone: bool = True,
) -> RldsDataset:
    """Open a dataset's training or validation episodes, building its index if there is none.

    Validation is the split `val` or `validation` where there is one, else the last 5 % of the usable training episodes.

    Args:
      root: the directory with features.json, or one above it: <root>/<dataset>/<version>. May be a URL.
      entry: the registry's, or fields that replace inferred ones (see `registry.infer`).
      name: of the dataset, where `entry` is no Entry.
      alone: whether `root` may be the dataset's own directory, rather than one with several.
    Raises:
      NotFoundError, ValueError: nothing usable there; says what was looked for and what was found.
    """
    storages.require_no_file(root)
    label = entry.name if isinstance(entry, entries.Entry) else name
    others = entry.directories if isinstance(entry, entries.Entry) else entry.get("directories", ())
    directory = find(root, (label, *([others] if isinstance(others, str) else others)), alone=alone)
    where = str(directory)
    fields = shard_index.read_fields(directory)
    is_guess = not isinstance(entry, entries.Entry) and not {"arm", "units"} & set(entry)
    if not isinstance(entry, entries.Entry):
        entry = infer.infer(label, fields, entry)
    choice = splits.choose(splits.read(directory), entry.splits, split, where)
    entry = entry.without_missing_cameras(fields, where)
    opened = prepared.prepare(directory, choice.split, fields, entry, options)
    if is_guess and not opened.meta.get("any_robot"):
        ranges.require_steps(opened.arrays["actions"][:, :6], where, "in the dataset's description")
    if options.image_size is None:
        checks.require_one_size(opened.meta["image_sizes"], where)
    episodes = _select(opened, choice, split, entry, options, where)
    if not episodes:
        texts = [path for path, field in fields.items() if field.kind == "text"]
        raise ValueError(
            f"{where}: no episode of split {choice.split.name!r} is left for {split}: {opened.meta['num_records']} "
            f"recorded; the rest has no instruction (read from {entry.instruction or 'nowhere'!r}; texts: {texts}), "
            "failed, or is too short (data.unlabelled_share, data.success_only; instruction: NAME in a description, "
            "data/README.md)."
        )
    dataset = RldsDataset(opened, where, episodes, options)
    checks.warn_of_state(dataset.statistics, entry.state_encoding, where)
    return dataset


def find(root: str | os.PathLike[str], names: Sequence[str], *, alone: bool = True) -> storages.Directory:
    """The directory with features.json for one of `names` at or below `root`; of several versions the newest.

    A dataset with one configuration may have a directory for it in between: <root>/<dataset>/<config>/<version>.

    Args:
      alone: whether `root` may be the dataset's own directory.
    Raises NotFoundError.
    """
    top = storages.Directory(root)
    candidates = [*([top] if alone else []), *(top / name for name in names)]
    for candidate in candidates:
        if found := _newest(candidate):
            return found
    for candidate in candidates:
        if candidate is top and top.name not in names:  # what lies below are other datasets, no configurations
            continue
        inside = candidate.names()
        configs = {config: found for config in inside if (found := _newest(candidate / config))}
        if len(configs) == 1:
            (config, found), *_ = configs.items()
            notices.once(logger, f"{candidate} has one configuration, {config}: reading {found}", logging.INFO)
            return found
        if configs:
            raise SeveralError(
                f"{candidate} has several configurations, {', '.join(configs)}; say which one: --data.root "
                f"{candidate / next(iter(configs))}, or directories: [{candidate.name}/{next(iter(configs))}] in a "
                "description (data/README.md)."
            )
    there = top.names()
    listing = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    raise NotFoundError(
        f"no RLDS dataset {' or '.join(dict.fromkeys(names))}: looked for features.json in "
        f"{', '.join(str(c) for c in candidates)} and directories of versions and configurations below; {top} "
        f"{'holds ' + listing if there else 'does not exist or is empty'}. data/README.md says how to get datasets."
    )


def _newest(place: storages.Directory) -> storages.Directory | None:
    """The directory with features.json, `place` itself or its newest version."""
    inside = place.names()
    if "features.json" in inside:
        return place
    versions = [v for v in inside if v.replace(".", "").isdigit() and "features.json" in (place / v).names()]
    return place / max(versions, key=lambda v: [int(part) for part in v.split(".") if part]) if versions else None


def _select(
    opened: files.Prepared,
    choice: splits.Choice,
    use: splits.Use,
    entry: entries.Entry,
    options: Options,
    where: str,
) -> tuple[base.Episode, ...]:
    arrays, wordings = opened.arrays, opened.meta["wordings"]
    numbers = arrays["number"]
    keep = (numbers >= choice.first) & (numbers < choice.last)
    blank = np.array([len(entry) == 0 for entry in wordings], bool)[arrays["instruction"]]
    # Which unlabelled episodes stay follows from their number alone: no random state to carry along.
    lottery = np.array(
        [google_crc32c.value(f"unlabelled {number}".encode()) / 2**32 for number in numbers[blank].tolist()]
    )
    unlabelled = np.zeros(len(keep), bool)
    unlabelled[blank] = lottery >= options.unlabelled_share
    failed = ~arrays["success"] if options.success_only else np.zeros(len(keep), bool)
    if options.success_only and not entry.success:
        _say_that_nothing_fails(opened.meta["failure_texts"], where)
    if choice.is_shared:
        keep &= _held_out(numbers, keep & ~unlabelled & ~failed, use)
    for what, mask in (("without instruction", keep & unlabelled), ("marked as failed", keep & failed)):
        if mask.any():
            message = f"{where}: left out {mask.sum()} of {keep.sum()} episodes {what}"
            notices.once(logger, message, logging.INFO)
    episodes = []
    chosen = np.flatnonzero(keep & ~unlabelled & ~failed)
    columns = (arrays[name][chosen].tolist() for name in ("start", "end", "instruction"))
    for start, end, said in zip(*columns, strict=True):
        sentence, *rewordings = wordings[said] or (options.unlabelled_instruction,)
        episodes.append(base.Episode(start, end, sentence, entry.name, tuple(rewordings)))
    return tuple(episodes)


def _held_out(numbers: np.ndarray, usable: np.ndarray, use: splits.Use) -> np.ndarray:
    """bool[E]: which episodes of a shared split `use` takes. The border counts usable records, so that both have some;
    a single one is both."""
    records = np.unique(numbers[usable])
    if len(records) < 2:
        return np.ones(len(numbers), bool)
    border = records[min(round(len(records) * (1 - splits.HELD_OUT_SHARE)), len(records) - 1)]
    return numbers >= border if use == "validation" else numbers < border


def _say_that_nothing_fails(texts: Mapping[str, tuple[str, int]], where: str) -> None:
    message = f"{where}: data.success_only is on, but nothing is described that tells failures: all episodes count"
    if not texts:
        notices.once(logger, f"{message} as successful", logging.INFO)
        return
    path, (example, count) = next(iter(texts.items()))
    notices.once(
        logger,
        f"{message}, although {path} speaks of failure in {count} (such as {example!r}); to leave those out write "
        f"success: {path} and failure_pattern: a regular expression, in the dataset's description (data/README.md)",
    )
