"""Checkpoint folders of DeepSpeed's ZeRO stages 2 and 3, as Lightning writes them: float32 parameters in pieces.

    <checkpoint>/latest                                     name of the folder below
                 <tag>/mp_rank_00_model_states.pt           shapes, buffers, and weights in training precision (stage 2)
                       zero_pp_rank_0_mp_rank_00_model_states.pt                                         (stage 3)
                       *zero_pp_rank_<i>_mp_rank_00_optim_states.pt    rank i's part of the float32 parameters

Stage 2 cuts each parameter group, all parameters in a row, into equal parts. Stage 3 cuts every parameter by itself and
pads it. A parameter is put together when it is read, so no more than one is in memory. (Layout: zero_to_fp32.py, which
DeepSpeed leaves in the folder.)
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.weights import torch_files
from robovlms_jax.weights.rules import normalize

_STATES = "*_optim_states.pt"


class ZeroSource:
    """See `weights.sources.Source`."""

    def __init__(self, path: pathlib.Path):
        directory = _locate(path)
        self.name = str(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[np.ndarray]] = {}
        ranks = [_optimizer_state(file) for file in sorted(directory.glob(_STATES), key=_rank)]
        stage, count = ranks[0].get("zero_stage"), ranks[0].get("partition_count")
        count = max(count) if isinstance(count, list) else count
        if stage not in (1, 2, 3) or count != len(ranks):
            raise ValueError(
                f"{directory} has optimizer states of {len(ranks)} ranks, ZeRO stage {stage}, and says they are "
                f"{count}; expected a complete checkpoint of stage 1, 2 or 3."
            )
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        model = torch_files.load(_require(directory / f"{prefix}mp_rank_00_model_states.pt"))
        if stage == 3:
            self._take_apart_by_parameter(ranks, model["param_shapes"])
        else:
            self._take_apart_by_group(ranks, model["param_shapes"])
        self._take_whole(model)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        shape, pieces = self.shapes[name], self._pieces[name]
        if shape:  # only the pieces with the rows that are asked for
            start, stop, _ = index[0].indices(shape[0])
            size = math.prod(shape[1:])
            pieces = _span(pieces, start * size, (stop - start) * size)
            shape, index = (stop - start, *shape[1:]), (slice(None), *index[1:])
        flat = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.float32), *pieces])
        return flat.reshape(shape)[index]

    def _add(self, name: str, shape: Iterable[int], pieces: list[np.ndarray]) -> None:
        shape = tuple(shape)
        found = sum(len(piece) for piece in pieces)
        if found != math.prod(shape):
            raise ValueError(f"{self.name}: {name} has {list(shape)} = {math.prod(shape)} numbers, found {found}.")
        self.shapes[name], self._pieces[name] = shape, pieces

    def _take_apart_by_group(self, ranks: Sequence[Mapping], groups: Sequence[Mapping[str, tuple]]) -> None:
        for number, shapes in enumerate(groups):
            parts = [rank["single_partition_of_fp32_groups"][number].view() for rank in ranks]
            start = 0
            for name, shape in shapes.items():
                size = math.prod(shape)
                self._add(name, shape, _span(parts, start, size))
                start += size

    def _take_apart_by_parameter(self, ranks: Sequence[Mapping], groups: Sequence[Mapping[str, tuple]]) -> None:
        parts = [[group.view() for group in rank["fp32_flat_groups"]] for rank in ranks]
        start = 0
        for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
            size = math.prod(shape)
            share = -(-size // len(ranks))
            pieces, missing = [], size
            for part in parts:
                for piece in _span(part, start, min(share, missing)):
                    pieces.append(piece)
                    missing -= len(piece)
            self._add(name, shape, pieces)
            start += share

    def _take_whole(self, model: Mapping[str, Any]) -> None:
        """Buffers, frozen parameters, and second names, which only the module's own dictionary has."""
        whole = dict(model.get("frozen_param_fragments") or {})
        module = {name: x for name, x in (model.get("module") or {}).items() if isinstance(x, torch_files.Tensor)}
        whole |= {name: module[name] for name in model.get("buffer_names", ()) if name in module}
        for name, tensor in whole.items():
            self._add(name, tensor.shape, [tensor.view().reshape(-1)])
        known = {x.identity: name for name, x in module.items() if name in self.shapes and math.prod(x.shape) > 0}
        for name, tensor in module.items():
            other = known.get(tensor.identity)
            if name not in self.shapes and other is not None and normalize(name) != normalize(other):
                self.shapes[name], self._pieces[name] = self.shapes[other], self._pieces[other]


def is_zero(path: pathlib.Path) -> bool:
    """Whether a directory is such a checkpoint."""
    return (path / "latest").is_file() or any(path.glob("*_model_states.pt"))


def _locate(path: pathlib.Path) -> pathlib.Path:
    """The folder with the states. Raises FileNotFoundError naming what is missing."""
    directory = path
    if (path / "latest").is_file():
        directory = path / (path / "latest").read_text().strip()
        if not directory.is_dir():
            raise FileNotFoundError(f"{path / 'latest'} names {directory.name}, which is no folder beside it.")
    if not any(directory.glob(_STATES)):
        raise FileNotFoundError(
            f"{directory} has no {_STATES}, which hold the float32 parameters of a DeepSpeed checkpoint; of stage 2, "
            "pass its mp_rank_00_model_states.pt for the weights in training precision."
        )
    return directory


def _require(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it names the parameters of this DeepSpeed checkpoint.")
    return path


def _rank(path: pathlib.Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0


def _optimizer_state(path: pathlib.Path) -> Mapping[str, Any]:
    content = torch_files.load(path)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no optimizer_state_dict; expected one rank's state of a ZeRO checkpoint.")
    return state


def _span(parts: Sequence[np.ndarray], start: int, size: int) -> list[np.ndarray]:
    """`size` numbers from `start` on of vectors laid end to end; fewer where they end."""
    pieces = []
    for part in parts:
        piece = part[max(start, 0) : max(start + size, 0)] if start < len(part) else part[:0]
        if len(piece):
            pieces.append(piece)
            size -= len(piece)
        start = max(start - len(part), 0) if start >= len(part) else 0
        if size == 0:
            break
    return pieces
