"""CALVIN as published, one npz file per frame (Mees et al. 2022, arXiv:2112.03227); `open_dataset` opens either layout.

<root>/{training,validation}/
  episode_0000000.npz ...              rgb_static, rgb_gripper, rel_actions, actions, robot_obs, scene_obs; depth and
                                       tactile images are never read
  ep_start_end_ids.npy                 int[S, 2], first and last frame of each recording session, inclusive
  lang_annotations/auto_lang_ann.npy   pickled {"language": {"ann", "task"}, "info": {"indx"}}
"""

from __future__ import annotations

import collections
import logging
import os
import pathlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from robovlms_jax.data import base, packed

logger = logging.getLogger(__name__)

Split = Literal["training", "validation"]

IMAGE_KEYS = {"static": "rgb_static", "wrist": "rgb_gripper"}
ARRAY_SIZES = {"rel_actions": 7, "actions": 7, "robot_obs": 15, "scene_obs": 24}
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
        annotations = _find_annotations(self.directory, annotation_folder)
        self.episodes = _read_annotations(annotations)
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
        probe = self.path(self.episodes[0].start)
        shapes = {
            key: value.shape
            for key, value in _read_npz(probe, [*IMAGE_KEYS.values(), *ARRAY_SIZES], optional=True).items()
        }
        self.image_sizes = {camera: shapes[key][:2] for camera, key in IMAGE_KEYS.items() if key in shapes}
        self.arrays = tuple(key for key in ARRAY_SIZES if key in shapes)
        if "rel_actions" not in shapes or not self.image_sizes:
            raise ValueError(
                f"{probe} has the keys {sorted(shapes)}; a CALVIN frame needs rel_actions and one of "
                f"{list(IMAGE_KEYS.values())}."
            )

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
        inside = np.zeros(len(self.frame_ids) + 1, np.int64)
        np.add.at(inside, np.searchsorted(self.frame_ids, spans[:, 0]), 1)
        np.add.at(inside, np.searchsorted(self.frame_ids, spans[:, 1], side="right"), -1)
        return self.frame_ids[np.cumsum(inside[:-1]) > 0].astype(np.int64)

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
        if name not in self.arrays:
            raise ValueError(f"{self.name} stores no {name!r}; it has {list(self.arrays)}.")
        base.rows_of(self.frame_ids, frame_ids, self.name)
        return np.stack([self._read(frame_id, (), (name,))[name] for frame_id in frame_ids])

    def _read(self, frame_id: int, cameras: Sequence[str], arrays: Sequence[str]) -> dict[str, np.ndarray]:
        """The wanted keys of one file, shapes and numbers checked."""
        path = self.path(frame_id)
        content = _read_npz(path, [IMAGE_KEYS[camera] for camera in cameras] + list(arrays))
        for camera in cameras:
            _require_array(path, IMAGE_KEYS[camera], content, np.uint8, (*self.image_sizes[camera], 3))
        for name in arrays:
            # Published files hold float64 or float32, depending on the release.
            content[name] = content[name].astype(np.float32)
            _require_array(path, name, content, np.float32, (ARRAY_SIZES[name],))
            base.require_finite(content[name][None], [frame_id], name, str(path))
        return content


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
        raise base.CorruptFrameError(f"{path} cannot be read: {error}") from error


def _require_array(
    path: pathlib.Path, key: str, content: Mapping[str, np.ndarray], dtype: type, shape: tuple[int, ...]
) -> None:
    array = content[key]
    if array.dtype != dtype or array.shape != shape:
        raise base.CorruptFrameError(
            f"{path}: {key} is {array.dtype}{list(array.shape)}, expected {np.dtype(dtype)}{list(shape)} as in the "
            "rest of the split."
        )


def _find_split(root: pathlib.Path, split: str) -> pathlib.Path:
    """`root/split`. Raises ValueError that says what is at `root` instead."""
    directory = root / split
    if directory.is_dir():
        return directory
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
    if not found:
        raise ValueError(
            f"{directory} holds neither CALVIN frames (episode_0000000.npz ...) nor a packed split ({packed.META}); "
            f"it holds {_listing(directory)}. See data/README.md for how to obtain CALVIN."
        )
    prefix, digits = max(found, key=lambda naming: len(found[naming]))
    return prefix, digits, np.sort(np.array(found[prefix, digits], np.int32))


def _find_annotations(directory: pathlib.Path, folder: str) -> pathlib.Path:
    candidates = [directory / folder / "auto_lang_ann.npy", directory / "auto_lang_ann.npy"]
    for path in candidates:
        if path.exists():
            return path
    others = sorted(path.parent.name for path in directory.glob("*/auto_lang_ann.npy"))
    hint = (
        f"set data.annotation_folder to one of {others}" if others else "no other folder has auto_lang_ann.npy either"
    )
    raise ValueError(f"no language annotations: looked for {candidates[0]} and {candidates[1]}; {hint}.")


def _read_annotations(path: pathlib.Path) -> tuple[base.Episode, ...]:
    """Episodes of auto_lang_ann.npy, in file order. Raises ValueError."""
    content = _load_pickled_npy(path)
    try:
        spans, language = content["info"]["indx"], content["language"]
        sentences, tasks = language["ann"], language["task"]
        episodes = [
            base.Episode(int(start), int(end), str(sentence), str(task))
            for (start, end), sentence, task in zip(spans, sentences, tasks, strict=True)
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is not CALVIN's annotation dictionary, which has info.indx, language.ann and language.task of one "
            f"length: {error!r}"
        ) from error
    if not episodes:
        raise ValueError(f"{path} annotates no episode.")
    for episode in episodes:
        if episode.end < episode.start:
            raise ValueError(
                f"{path}: {episode.instruction!r} ends at frame {episode.end}, before its start {episode.start}."
            )
    return tuple(episodes)


_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),  # NumPy 1 wrote numpy.core, NumPy 2 writes numpy._core
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),  # how old protocols store bytes
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, numbers, strings and NumPy arrays. Anything else could run code and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which annotations have no use for")
        return super().find_class(module, name)


def _load_pickled_npy(path: pathlib.Path) -> Any:
    """The object that np.save pickled into an npy file; np.load would run any code it names. Raises ValueError."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):  # what np.save writes for any header as short as this one
                raise ValueError(f"it has npy format {version}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if not dtype.hasobject or shape != ():
                raise ValueError(f"it holds {dtype}{list(shape)}, expected one pickled dictionary")
            return _ArraysOnly(file).load().item()
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
