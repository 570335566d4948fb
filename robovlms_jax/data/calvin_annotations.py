"""CALVIN's auto_lang_ann.npy: which spans of frames are annotated, with which sentence and task.

A pickled dictionary {"language": {"ann", "task"}, "info": {"indx"}}; its three lists have one entry for each span.
"""

from __future__ import annotations

import logging
import pathlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax import json_files
from robovlms_jax.data import base, sentences

logger = logging.getLogger(__name__)

FILE = "auto_lang_ann.npy"


def find(directory: pathlib.Path, folder: str) -> pathlib.Path:
    """The split's annotation file, in `folder` or beside the frames. Raises base.NotAnnotatedError."""
    candidates = [directory / folder / FILE, directory / FILE]
    for path in candidates:
        if path.exists():
            return path
    others = sorted(path.parent.name for path in directory.glob(f"*/{FILE}"))
    hint = f"set data.annotation_folder to one of {others}" if others else f"no other folder has {FILE} either"
    raise base.NotAnnotatedError(
        f"{directory} has no language annotations: looked for {candidates[0]} and {candidates[1]}; {hint}."
    )


def read(path: pathlib.Path) -> tuple[base.Episode, ...]:
    """Episodes in file order; spans without a sentence are left out, and counted in the log.

    Of several sentences of a span the first is its instruction, the others are rewordings.

    Raises:
      base.NotAnnotatedError: no span has a sentence. ValueError: the file is of another form; names what differs.
    """
    spans, texts, names = _columns(path, _load_pickled_npy(path))
    episodes, silent = [], []
    for number, (span, text, name) in enumerate(zip(spans, texts, names, strict=True)):
        start, end = _span(path, number, span)
        wordings = _texts(path, f"language.ann[{number}]", text)
        if not wordings:
            silent.append(f"number {number}, frames {start} to {end}")
            continue
        task = _texts(path, f"language.task[{number}]", name)
        if len(task) != 1:
            raise ValueError(
                f"{path}: language.task[{number}] is {name!r:.80}, expected one name such as 'open_drawer'."
            )
        episodes.append(base.Episode(start, end, wordings[0], task[0], wordings[1:]))
    if not episodes:
        why = f": none of its {len(silent)} spans has a sentence" if silent else ""
        raise base.NotAnnotatedError(f"{path} annotates no episode{why}.")
    if silent:
        logger.warning(
            "%s: %d of %d spans have no sentence and are left out (first: %s).",
            *(path, len(silent), len(spans), silent[0]),
        )
    return tuple(episodes)


def _columns(path: pathlib.Path, content: Any) -> tuple[Sequence[Any], ...]:
    """info.indx, language.ann and language.task. Raises ValueError that names everything that differs."""
    found: dict[str, Sequence[Any]] = {}
    faults = []
    for part, keys in (("info", ("indx",)), ("language", ("ann", "task"))):
        inside = content.get(part) if isinstance(content, Mapping) else None
        if not isinstance(inside, Mapping):
            has = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            faults.append(f"it lacks {part!r}, a dictionary (it has {has})")
            continue
        for key in keys:
            column = inside.get(key)
            if key not in inside:
                faults.append(f"{part} lacks {key!r} (it has {sorted(map(str, inside))})")
            elif not isinstance(column, list | tuple) and not (isinstance(column, np.ndarray) and column.ndim):
                faults.append(f"{part}.{key} is {type(column).__name__}, not a list")
            else:
                found[f"{part}.{key}"] = column
    lengths = {name: len(column) for name, column in found.items()}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        faults.append(f"the entries do not pair: {counted}; one sentence and one task for each span is expected")
    if faults:
        raise ValueError(
            f"{path} is not CALVIN's annotation dictionary, which has info.indx, language.ann and language.task of one "
            f"length: {'; '.join(faults)}."
        )
    return found["info.indx"], found["language.ann"], found["language.task"]


def _span(path: pathlib.Path, number: int, span: Any) -> tuple[int, int]:
    try:
        start, end = (base.whole_number(value) for value in span)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: info.indx[{number}] is {span!r:.80}, expected the numbers of a span's first and last frame: "
            f"{error}."
        ) from error
    if end < start:
        raise ValueError(f"{path}: info.indx[{number}] ends at frame {end}, before its start {start}.")
    return start, end


def _texts(path: pathlib.Path, where: str, cell: Any) -> tuple[str, ...]:
    try:
        return sentences.wordings(cell)
    except ValueError as error:
        raise ValueError(f"{path}: {where}: {error}") from error


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
        raise ValueError(f"{path} cannot be read: {error}.{json_files.pointer_hint(path)}") from error
