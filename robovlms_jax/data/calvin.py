"""CALVIN as published, one npz file per frame (Mees et al. 2022, arXiv:2112.03227); `open_dataset` opens either layout.

<root>/{training,validation}/
  episode_0000000.npz ...              rgb_static, rgb_gripper, rel_actions, actions, robot_obs, scene_obs; depth and
                                       tactile images are never read
  ep_start_end_ids.npy                 int[S, 2], first and last frame of each recording session, inclusive
  lang_annotations/auto_lang_ann.npy   pickled {"language": {"ann", "task"}, "info": {"indx"}}
"""

from __future__ import annotations

import collections
import difflib
import logging
import os
import pathlib
import re
import typing
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from robovlms_jax import json_files
from robovlms_jax.data import base, calvin_annotations, packed, storage

logger = logging.getLogger(__name__)

Split = Literal["training", "validation"]

IMAGE_KEYS = {"static": "rgb_static", "wrist": "rgb_gripper"}
ARRAY_SIZES = base.CALVIN_SIZES
_PARSER_ATTEMPTS = 8
SIDECARS = ("ep_start_end_ids.npy", "ep_lens.npy", "scene_info.npy", "statistics.yaml", ".hydra/merged_config.yaml")
"""Small files that simulators and other tools look for in a split."""


def open_dataset(
    root: str | os.PathLike[str],
    split: Split,
    *,
    annotation_folder: str = "lang_annotations",
    episode_list: str = "",
    exclude_tasks: Sequence[str] = (),
) -> base.Dataset:
    """Open one split of a CALVIN dataset, packed or as published, whichever is there.

    Args:
      root: directory that holds `training` and `validation`.
      annotation_folder: folder of the split with auto_lang_ann.npy; a packed split has its annotations inside.
      episode_list, exclude_tasks: see `base.select`.
    Raises:
      base.NotAnnotatedError: frames without a sentence, or a root with training data alone.
      ValueError: nothing usable at `root`; says what was looked for and what is there.
    """
    directory = pathlib.Path(root) / split
    if (directory / packed.META).exists() or (directory / packed.PARTIAL_META).exists():
        dataset: base.Dataset = packed.PackedDataset(directory)
    else:
        dataset = open_npz(root, split, annotation_folder=annotation_folder)
        logger.info(
            "%s holds one npz per frame; to load about three times faster, pack it once: "
            "python -m experiments.pack_calvin --root %s --out DIR",
            directory,
            root,
        )
    dataset.episodes = base.select(dataset.episodes, episode_list=episode_list, exclude_tasks=exclude_tasks)
    return dataset


def open_splits(root: str | os.PathLike[str], open_one: Callable[[Split], base.Dataset]) -> dict[Split, base.Dataset]:
    """Every split under `root` by `open_one`; a validation split without annotations is left out, with a warning.

    Raises as `open_one` does, for the training split also where there is no split at all.
    """
    found = [split for split in typing.get_args(Split) if (pathlib.Path(root) / split).is_dir()]
    opened: dict[Split, base.Dataset] = {}
    for split in found or ["training"]:  # without any, opening the first says what was looked for
        try:
            opened[split] = open_one(split)
        except base.NotAnnotatedError as error:
            if "training" not in opened:
                raise
            logger.warning("%s is left out: %s", pathlib.Path(root) / split, error)
    return opened


def open_npz(root: str | os.PathLike[str], split: Split, *, annotation_folder: str = "lang_annotations") -> NpzDataset:
    """Open one split in the published layout only. Arguments and errors as for `open_dataset`."""
    return NpzDataset(_find_split(pathlib.Path(root), split), annotation_folder=annotation_folder)


class NpzDataset(base.Dataset):
    """One split in the published layout.

    frame_ids: int32[N], sorted ids of all frame files present.
    arrays: numeric fields that the frames have.
    """

    def __init__(self, directory: str | os.PathLike[str], *, annotation_folder: str = "lang_annotations"):
        self.directory = pathlib.Path(directory)
        self.name = str(self.directory)
        self._prefix, self._digits, self.frame_ids = _list_frames(self.directory)
        annotations = calvin_annotations.find(self.directory, annotation_folder)
        self.episodes = calvin_annotations.read(annotations)
        for episode in self.episodes:
            first, last = np.searchsorted(self.frame_ids, (episode.start, episode.end + 1))
            if last - first != episode.end - episode.start + 1:
                missing = np.setdiff1d(np.arange(episode.start, episode.end + 1), self.frame_ids[first:last])
                raise ValueError(
                    f"{annotations} annotates {episode.instruction!r} at frames {episode.start} to {episode.end}, but "
                    f"{self.path(missing[0]).name} is missing in {self.directory}, which has {len(self.frame_ids)} "
                    f"frames, {self.frame_ids[0]} to {self.frame_ids[-1]}. Copy the missing frames, or the annotations "
                    "made for these."
                )
        self.image_sizes, self.arrays = _fields(self.path(self.episodes[0].start))

    def path(self, frame_id: int) -> pathlib.Path:
        """File of one frame."""
        return self.directory / f"{self._prefix}{frame_id:0{self._digits}d}.npz"

    def sessions(self) -> np.ndarray:
        """int64[S, 2], first and last frame of each recording session, annotated or not. Raises ValueError."""
        path = self.directory / "ep_start_end_ids.npy"
        try:
            sessions = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}, which lists the recording sessions, cannot be read: {error}") from error
        if sessions.ndim != 2 or sessions.shape[1] != 2 or sessions.dtype.kind not in "iu":
            raise ValueError(f"{path} is {sessions.dtype}{list(sessions.shape)}, expected int[sessions, 2].")
        return sessions.astype(np.int64)

    def frames_within(self, spans: np.ndarray) -> np.ndarray:
        """int64[n], sorted ids of all frames that int[m, 2] inclusive spans cover and that are present."""
        return base.frames_within(self.frame_ids, spans)

    def frame(self, frame_id: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        """All of one frame: camera -> uint8[height, width, 3], field -> float32[d]. Raises CorruptFrameError."""
        content = self._read(frame_id, self.cameras, self.arrays)
        images = {camera: content[IMAGE_KEYS[camera]] for camera in self.cameras}
        return images, {name: content[name] for name in self.arrays}

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        base.rows_of(self.frame_ids, frame_ids, self.name)
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        for row, frame_id in enumerate(frame_ids):
            content = self._read(frame_id, cameras, ())
            for camera in cameras:
                out[camera][row][:] = content[IMAGE_KEYS[camera]]
        return out

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        base.rows_of(self.frame_ids, frame_ids, self.name)
        if name not in self.arrays:
            if name in ARRAY_SIZES:
                raise ValueError(f"{self.name} stores no {name!r}; it has {list(self.arrays)}.")
            return self._further(name, frame_ids)
        return np.stack([self._read(frame_id, (), (name,))[name] for frame_id in frame_ids])

    def _further(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        """float32[n, ...] of any other numeric key of the files, such as depth_static or depth_tactile."""
        if len(frame_ids) and name not in (known := _keys(self.path(int(frame_ids[0])))):
            raise ValueError(f"{self.name} stores no {name!r}; its frames have {known}.")
        found = []
        for frame_id in frame_ids:
            path = self.path(int(frame_id))
            values = _read_npz(path, [name])[name]
            if values.dtype.kind not in "fiu" or (found and values.shape != found[0].shape):
                raise base.CorruptFrameError(f"{path}: {name} is {_form(values)}, expected numbers as in other frames.")
            found.append(values.astype(np.float32))
        return np.stack(found)

    def _read(self, frame_id: int, cameras: Sequence[str], arrays: Sequence[str]) -> dict[str, np.ndarray]:
        """The wanted keys of one file, shapes and numbers checked."""
        path = self.path(frame_id)
        content = _read_npz(path, [IMAGE_KEYS[camera] for camera in cameras] + list(arrays))
        for camera in cameras:
            _require_array(path, IMAGE_KEYS[camera], content, np.uint8, (*self.image_sizes[camera], 3))
        for name in arrays:
            # Published files hold float64 or float32, depending on the release.
            if content[name].dtype.kind not in "fiu":
                raise base.CorruptFrameError(f"{path}: {name} is {_form(content[name])}, expected numbers.")
            content[name] = content[name].astype(np.float32)
            _require_array(path, name, content, np.float32, (ARRAY_SIZES[name],))
            base.require_finite(content[name][None], [frame_id], name, str(path))
        return content


def _fields(path: pathlib.Path) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Image sizes by camera, and numeric fields, that a frame has. Raises ValueError naming what is missing or odd."""
    found = _read_npz(path, [*IMAGE_KEYS.values(), *ARRAY_SIZES], optional=True)
    cameras = {camera: key for camera, key in IMAGE_KEYS.items() if key in found}
    if "rel_actions" not in found or not cameras:
        held = _keys(path)
        near = difflib.get_close_matches("rel_actions", held, n=1) if "rel_actions" not in found else []
        hint = f" Is rel_actions what it calls {near[0]!r}? Rename it." if near and near[0] not in ARRAY_SIZES else ""
        raise ValueError(
            f"{path} has the keys {held}; a CALVIN frame needs rel_actions and one of {list(IMAGE_KEYS.values())}."
            f"{hint}"
        )
    for key in cameras.values():
        image = found[key]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{path}: {key} is {_form(image)}, expected uint8[height, width, 3], RGB.")
    odd = [name for name in ARRAY_SIZES if name in found and not _is_field(found[name], ARRAY_SIZES[name])]
    if "rel_actions" in odd:
        raise ValueError(
            f"{path}: rel_actions is {_form(found['rel_actions'])}, expected {ARRAY_SIZES['rel_actions']} numbers: "
            "change of xyz and of Euler angles, and the gripper's command."
        )
    for name in odd:
        logger.warning(
            "%s: %s is %s, CALVIN's has %d numbers: it is left out.",
            *(path, name, _form(found[name]), ARRAY_SIZES[name]),
        )
    arrays = tuple(name for name in ARRAY_SIZES if name in found and name not in odd)
    return {camera: found[key].shape[:2] for camera, key in cameras.items()}, arrays


def _is_field(array: np.ndarray, size: int) -> bool:
    return array.shape == (size,) and array.dtype.kind in "fiu"


def _form(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _keys(path: pathlib.Path) -> list[str]:
    with np.load(path, allow_pickle=False) as file:
        return sorted(file.files)


def _read_npz(path: pathlib.Path, keys: Sequence[str], *, optional: bool = False) -> dict[str, np.ndarray]:
    """Some arrays of an npz; `optional` leaves out those it lacks. Raises CorruptFrameError."""
    try:
        for attempt in range(_PARSER_ATTEMPTS):
            try:
                with np.load(path, allow_pickle=False) as file:
                    return {key: file[key] for key in keys if not optional or key in file}
            except SystemError:
                # Headers are parsed by `ast`, whose parser fails now and then in one of many threads (CPython issue
                # 106905, met with 3.11.7); the file is fine.
                if attempt == _PARSER_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise base.CorruptFrameError(f"{path} cannot be read: {error}.{json_files.pointer_hint(path)}") from error


def _require_array(
    path: pathlib.Path, key: str, content: Mapping[str, np.ndarray], dtype: type, shape: tuple[int, ...]
) -> None:
    array = content[key]
    if array.dtype != dtype or array.shape != shape:
        raise base.CorruptFrameError(
            f"{path}: {key} is {_form(array)}, expected {np.dtype(dtype)}{list(shape)} as in the rest of the split."
        )


def _find_split(root: pathlib.Path, split: str) -> pathlib.Path:
    """`root/split`. Raises ValueError that says what is at `root` instead; base.NotAnnotatedError: only training is."""
    directory = root / split
    if directory.is_dir():
        return directory
    storage.require_no_file(root)
    looked = (
        f"data.root={str(root)!r}: looked for {directory} with CALVIN frames (episode_0000000.npz ...) or a packed "
        f"split ({packed.META})"
    )
    if not root.is_dir():
        near = next(parent for parent in [*root.parents, pathlib.Path("/")] if parent.is_dir())
        raise ValueError(f"{looked}; {root} does not exist. {near} holds {_listing(near)}.")
    if root.name in ("training", "validation"):
        hint = f" Pass the directory above it: {root.parent}."
    else:
        if split == "validation" and (root / "training").is_dir():
            raise base.NotAnnotatedError(f"{looked}; {root} holds {_listing(root)}.")
        inside = sorted(path.parent for path in root.glob(f"*/{split}"))
        hint = f" Did you mean {inside[0]}?" if inside else ""
    raise ValueError(f"{looked}; {root} holds {_listing(root)}.{hint}")


def _listing(directory: pathlib.Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) if names else "nothing"


def _list_frames(directory: pathlib.Path) -> tuple[str, int, np.ndarray]:
    """(prefix, digits, sorted int32 ids) of the numbered npz files; the commonest naming wins. Raises ValueError."""
    found: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
    for entry in os.scandir(directory):
        if match := re.fullmatch(r"(.*?)(\d+)\.npz", entry.name):
            found[match[1], len(match[2])].append(int(match[2]))
    if not found and (directory / packed.META).exists():
        raise ValueError(f"{directory} is packed already; this needs frames as CALVIN publishes them, one npz each.")
    if not found:
        raise ValueError(
            f"{directory} holds neither CALVIN frames (episode_0000000.npz ...) nor a packed split ({packed.META}); "
            f"it holds {_listing(directory)}. See data/README.md for how to obtain CALVIN."
        )
    prefix, digits = max(found, key=lambda naming: len(found[naming]))
    return prefix, digits, np.sort(np.array(found[prefix, digits], np.int32))
