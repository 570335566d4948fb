"""Open whatever `data.dataset` and `data.root` name: CALVIN, a dataset in RLDS, LeRobot or LIBERO's form, a mixture."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Literal

from robovlms_jax import cores
from robovlms_jax.data import base, calvin, lerobot, libero_hdf5, mixing, notices, packed, rlds, statistics
from robovlms_jax.data.config import DataConfig
from robovlms_jax.data.registry import mixtures

logger = logging.getLogger(__name__)

Split = Literal["training", "validation"]

READ_BY: Mapping[str, tuple[str, ...]] = {
    "annotation_folder": ("calvin",),
    "decoded_gb": ("calvin",),
    "max_left_out_share": ("lerobot",),
    "index_dir": ("rlds",),
    "reference": ("rlds",),
    "statistics": ("rlds",),
    "image_size": ("rlds", "lerobot"),
    "success_only": ("rlds", "lerobot"),
    "unlabelled_share": ("rlds", "lerobot"),
    "unlabelled_instruction": ("rlds", "lerobot"),
}
"""Settings that some formats alone read."""


def open_split(settings: DataConfig, split: Split) -> base.Dataset:
    """Training or validation episodes. Raises ValueError that names the setting, what was found and the way out."""
    if not settings.root:
        raise ValueError(
            "data.root is empty; pass --data.root DIR, a directory with training/ and validation/ or, for other "
            "formats, with the dataset (data/README.md says how to get one)."
        )
    _say_what_is_not_read(settings)
    chosen = {}
    if split == "training":  # validation keeps every task, whatever training sees
        chosen = {"episode_list": settings.episode_list, "exclude_tasks": settings.exclude_tasks}
    if settings.dataset == "calvin":
        found = calvin.open_dataset(settings.root, split, annotation_folder=settings.annotation_folder, **chosen)
        if split == "training" and isinstance(found, packed.PackedDataset):
            found.keep_decoded(_room_for_pictures(settings))
        elif split == "training" and settings.decoded_gb:
            notices.once(
                logger,
                f"data.decoded_gb={settings.decoded_gb} has no effect on {found.name}, which is not packed; "
                "`python -m experiments.pack_calvin` packs it.",
            )
        return found
    if settings.dataset == "libero_hdf5":
        dataset: base.Dataset = libero_hdf5.LiberoDataset(settings.root, split)
    elif settings.dataset == "lerobot":
        dataset = lerobot.open_dataset(
            settings.root,
            split,
            image_size=_size(settings),
            conventions=settings.conventions,
            unlabelled_share=settings.unlabelled_share,
            unlabelled_instruction=settings.unlabelled_instruction,
            max_left_out_share=settings.max_left_out_share,
            success_only=settings.success_only,
        )
    else:
        dataset = _open_rlds(settings, split)
    if any(chosen.values()):
        if dataset.groups:
            raise ValueError("data.episode_list and data.exclude_tasks work on one dataset, not on a mixture.")
        dataset.episodes = base.select(dataset.episodes, **chosen)
    return dataset


def _room_for_pictures(settings: DataConfig) -> int:
    """Bytes of decoded pictures for each process that reads: data.decoded_gb, or what half of the machine's memory has
    room for, which is then said."""
    asked, readers = int(settings.decoded_gb * 1e9), max(settings.num_workers, 1)
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return asked
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if asked * readers > half:
        notices.once(
            logger,
            f"data.decoded_gb={settings.decoded_gb} for {readers} reading processes is more than half of this "
            f"machine's memory ({half / 1e9:.1f} GB); that much is kept, and other pictures are decoded anew.",
        )
    return min(asked, half // readers)


def _say_what_is_not_read(settings: DataConfig) -> None:
    """Log, once, settings that were given and that this format has no use for."""
    form = settings.dataset if settings.dataset in ("calvin", "lerobot", "libero_hdf5") else "rlds"
    usual = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    for name, forms in READ_BY.items():
        if form not in forms and getattr(settings, name) != usual[name]:
            notices.once(
                logger,
                f"data.{name}={getattr(settings, name)!r} has no effect on data.dataset={settings.dataset!r}: it is "
                f"for {' and '.join(forms)}.",
            )


def _open_rlds(settings: DataConfig, split: Split) -> base.Dataset:
    mixture = mixtures.resolve(settings.dataset)
    options = rlds.Options(
        index_dir=settings.index_dir,
        workers=settings.index_workers or cores.usable(),
        max_damaged_share=settings.max_corrupt_share,
        unlabelled_share=settings.unlabelled_share,
        unlabelled_instruction=settings.unlabelled_instruction,
        success_only=settings.success_only,
        image_size=_size(settings),
    )
    names = list(mixture.weights)
    given = statistics.read(settings.statistics, names) if settings.statistics else {}
    opened, missing = {}, []
    for name in names:
        try:
            opened[name] = rlds.open_dataset(
                settings.root, mixture.datasets[name], split, name=name, options=options, alone=len(names) == 1
            )
        except rlds.NotFoundError as error:
            missing.append(str(error))
    if missing:
        listed = "\n  ".join(missing)
        raise ValueError(
            f"data.dataset={settings.dataset!r}: {len(missing)} of {len(names)} datasets are not at {settings.root}:\n"
            f"  {listed}\nGet them, or list those you have in a mixture file (data/README.md)."
        )
    for name, dataset in opened.items():
        if name in given:
            dataset.statistics = given[name]
    if len(opened) == 1:
        return next(iter(opened.values()))
    parts = []
    for name, dataset in opened.items():
        weight = mixture.weights[name] * (dataset.num_transitions if mixture.balance else 1.0)
        parts.append(mixing.Part(name, dataset, weight, dataset.statistics))
    return mixing.MixtureDataset(mixture.name, parts, settings.reference or names[0])


def _size(settings: DataConfig) -> tuple[int, int] | None:
    return (settings.image_size, settings.image_size) if settings.image_size else None
