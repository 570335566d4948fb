"""Apply rules: source tensors -> parameters, strictly, each device reading only its part."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tqdm
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.weights import tying
from robovlms_jax.weights.rearrange import Rearrange
from robovlms_jax.weights.rules import Fallback, Ignore, Initialised, Rule, Rules, Tied, canonical, normalize
from robovlms_jax.weights.sources import Source

_HEAD = "/head/kernel"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one parameter is made."""

    tensors: tuple[str, ...]
    """Source tensors: one, or one per layer."""
    rearrange: Rearrange
    """Of each of them."""
    is_stacked: bool


def load_params(
    rules: Rules, source: Source, shapes: Any, shardings: Any, *, spare: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """Read a checkpoint straight into sharded parameters.

    Each device's part is read on its own: a host holds one part of one parameter at a time.

    Args:
      shapes: nested dict of jax.ShapeDtypeStruct, the parameters to fill; any source type is cast to theirs.
      shardings: the same tree of jax.sharding.Sharding.
      spare: see `plan`.
    Returns:
      Nested dict of jax.Array: `shapes` without the parameters that are `Initialised` by the rules.
    Raises:
      ValueError: source, rules and parameters do not fit together; lists everything that is wrong.
    """
    flat, flat_shardings = flatten_dict(shapes, sep="/"), flatten_dict(shardings, sep="/")
    parameters = {path: leaf.shape for path, leaf in flat.items()}
    recipes = plan(rules, source.shapes, parameters, name=source.name, spare=spare)
    untied = tying.difference(rules, source)
    if untied is not None:
        raise ValueError(f"{source.name}: {untied}. {tying.REMEDY}")
    shown = tqdm.tqdm(recipes.items(), desc=f"reading {source.name}", unit="parameter", delay=2)
    return unflatten_dict(
        {path: _load(recipe, source, flat[path], flat_shardings[path]) for path, recipe in shown}, sep="/"
    )


def plan(
    rules: Rules,
    tensors: Mapping[str, tuple[int, ...]],
    parameters: Mapping[str, tuple[int, ...]],
    name: str = "checkpoint",
    *,
    spare: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Recipe]:
    """Match shapes of source tensors with shapes of parameters, without touching any data.

    Every tensor must match exactly one rule, and every parameter be filled once, in all its layers, in the right shape.

    Args:
      tensors: tensor name -> shape. parameters: path -> shape.
      name: of the checkpoint, for the message.
      spare: path -> shape of parameters that the rules know and nobody asks for. Their tensors may be there, and have
        to fit if they are; they are not read.
    Returns:
      path -> recipe for every parameter that is not `Initialised`.
    Raises:
      ValueError: lists everything that is wrong.
    """
    problems = _Problems()
    filled, used = _assign(rules, tensors, {**(spare or {}), **parameters}, problems)
    recipes = {}
    for path, shape in parameters.items():
        if any(isinstance(rule, Initialised) and re.search(rule.target, path) for rule in rules):
            continue
        rule = used.get(path) or next((r for r in rules if isinstance(r, Rule) and r.target == path), None)
        if rule is None:
            problems.add("parameters that no rule fills", path, list(shape))
            continue
        layers = range(shape[0]) if rule.is_stacked else [None]
        for layer in layers:
            if (path, layer) not in filled:
                detail = f"{_source_shape(rule, shape)}, for {path}"
                detail += "; is it the token table? Then config.json says tie_word_embeddings" * path.endswith(_HEAD)
                problems.add("tensors that are missing", rule.name(layer), detail)
        tensors_of_layers = tuple(filled.get((path, layer), "") for layer in layers)
        recipes[path] = Recipe(tensors_of_layers, _rearrange(rule, shape), rule.is_stacked)
    problems.raise_if_any(name)
    return recipes


def _assign(
    rules: Rules,
    tensors: Mapping[str, tuple[int, ...]],
    parameters: Mapping[str, tuple[int, ...]],
    problems: _Problems,
) -> tuple[dict[tuple[str, int | None], str], dict[str, Rule]]:
    """Give each tensor its place: (path, layer) -> tensor, and path -> the rule that filled it."""
    filled: dict[tuple[str, int | None], str] = {}
    used: dict[str, Rule] = {}
    for tensor, found in _heads_last(rules, tensors).items():
        is_fallback = _is_fallback(rules, tensor)
        matches = _matches(rules, canonical(rules, tensor))
        if not _is_whole(matches):
            kind = "tensors that several rules match" if matches else "tensors that no rule matches"
            problems.add(kind, tensor, list(found))
            continue
        for rule, layer in matches:
            if isinstance(rule, Ignore):
                continue
            if isinstance(rule, Tied):
                rule = next(other for other in rules if isinstance(other, Rule) and other.target == rule.table)
                if (rule.target, None) in filled and list(found) == _source_shape(rule, parameters[rule.target]):
                    continue
            path = rule.target
            if is_fallback and (path, layer) in filled:
                continue
            if path not in parameters:
                problems.add("tensors of parameters the model does not have", tensor, f"{list(found)}, for {path}")
                continue
            shape = parameters[path]
            if layer is not None and layer >= shape[0]:
                problems.add("tensors of layers the model does not have", tensor, f"{path} has {shape[0]} layers")
                continue
            expected = _source_shape(rule, shape)
            if list(found) != expected:
                problems.add("tensors of another shape", tensor, f"found {list(found)}, expected {expected} for {path}")
            if (path, layer) in filled:
                detail = f"{path} is filled by {filled[path, layer]} already"
                problems.add("tensors that fill a parameter twice", tensor, detail)
            filled[path, layer] = tensor
            used[path] = rule
    return filled, used


def _heads_last(rules: Rules, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same tensors, in an order in which a tied head comes when its token table, if stored, has its place, and
    those that only fill what others leave empty come after those."""
    rows = [rule for rule in rules if isinstance(rule, Tied)]

    def turn(name: str) -> tuple[bool, bool]:
        return any(rule.match(canonical(rules, name)) for rule in rows), _is_fallback(rules, name)

    return {name: tensors[name] for name in sorted(tensors, key=turn)}  # a stable order


def _is_fallback(rules: Rules, tensor: str) -> bool:
    return any(isinstance(rule, Fallback) and rule.match(normalize(tensor)) for rule in rules)


def _is_whole(matches: list[tuple[Rule | Tied | Ignore, int | None]]) -> bool:
    """One rule for the tensor, or one for each of its parts."""
    if len(matches) == 1 and isinstance(matches[0][0], (Ignore, Tied)):
        return True
    parts = [rule.part if isinstance(rule, Rule) else None for rule, _ in matches]
    return len(parts) > 0 and None not in parts and sorted(parts) == [(i, len(parts)) for i in range(len(parts))]


def _matches(rules: Rules, tensor: str) -> list[tuple[Rule | Tied | Ignore, int | None]]:
    matches = []
    for rule in rules:
        if isinstance(rule, Rule):
            is_match, layer = rule.match(tensor)
            if is_match:
                matches.append((rule, layer))
        elif (isinstance(rule, Ignore) and re.fullmatch(rule.source, tensor)) or (
            isinstance(rule, Tied) and rule.match(tensor)
        ):
            matches.append((rule, None))
    return matches


def _rearrange(rule: Rule, shape: tuple[int, ...]) -> Rearrange:
    return Rearrange.parse(rule.pattern, len(shape) - rule.is_stacked)


def _source_shape(rule: Rule, shape: tuple[int, ...]) -> list[int]:
    return list(_rearrange(rule, shape).source_shape(shape[1:] if rule.is_stacked else shape))


def _load(
    recipe: Recipe, source: Source, parameter: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.Array:
    shape = parameter.shape[1:] if recipe.is_stacked else parameter.shape

    def read(tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        return recipe.rearrange.forward(lambda cut: _read(source, tensor, cut), shape, index)

    def part(index: tuple[slice, ...], bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        out = np.empty([stop - start for start, stop in bounds], parameter.dtype)
        if recipe.is_stacked:
            for row, layer in enumerate(range(*bounds[0])):
                out[row] = read(recipe.tensors[layer], index[1:])
                _require_finite(out[row], recipe.tensors[layer], source.name)
        else:
            out[...] = read(recipe.tensors[0], index)
            _require_finite(out, recipe.tensors[0], source.name)
        return out

    # Part by part, and each on its devices before the next is read; devices that hold the same part share one reading.
    holders: dict[tuple, list[tuple[jax.Device, tuple[slice, ...]]]] = {}
    for device, index in sharding.addressable_devices_indices_map(parameter.shape).items():
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, parameter.shape))
        holders.setdefault(bounds, []).append((device, index))
    arrays = []
    for bounds, devices in holders.items():
        x = part(devices[0][1], bounds)
        arrays += jax.block_until_ready([jax.device_put(x, device) for device, _ in devices])
    return jax.make_array_from_single_device_arrays(parameter.shape, sharding, arrays)


def _read(source: Source, tensor: str, cut: tuple[slice, ...]) -> np.ndarray:
    x = source.read(tensor, cut)
    if x.dtype.kind in "biu" or x.dtype.itemsize < 2:
        raise ValueError(
            f"{source.name} holds {tensor} in {x.dtype}; expected float32, float16 or bfloat16. Are these weights "
            "quantised? Take the ones they were made from."
        )
    return x


def _require_finite(x: np.ndarray, tensor: str, name: str) -> None:
    """Raise ValueError where numbers are NaN or infinite."""
    if x.dtype.itemsize == 2:  # of these types NumPy's functions are slow: all bits of the exponent mean no number
        exponent = np.uint16(0x7F80 if x.dtype == ml_dtypes.bfloat16 else 0x7C00)
        wrong = np.count_nonzero((x.view(np.uint16) & exponent) == exponent)
    else:
        with np.errstate(all="ignore"):
            # The sum first: it is faster than looking at each number, which only a doubt asks for.
            wrong = 0 if np.isfinite(np.sum(x)) else np.count_nonzero(~np.isfinite(x))
    if wrong:
        raise ValueError(
            f"{name} holds {tensor} with {wrong} of the {x.size} numbers read NaN or infinite (as {x.dtype}); the "
            "training that wrote it diverged, or the file is damaged. Take an earlier checkpoint, or download it again."
        )


class _Problems:
    """What does not fit, collected by kind; names that differ only in their layer share a line."""

    def __init__(self):
        self._kinds: dict[str, dict[tuple[str, str], list[int]]] = collections.defaultdict(
            lambda: collections.defaultdict(list)
        )

    def add(self, kind: str, name: str, detail: Any) -> None:
        layer = re.search(r"\.(\d+)\.", name)
        template = name if layer is None else f"{name[: layer.start()]}.*.{name[layer.end() :]}"
        layers = self._kinds[kind][template, re.sub(r"\.\d+\.", ".*.", str(detail))]
        if layer is not None:
            layers.append(int(layer[1]))

    def raise_if_any(self, name: str) -> None:
        if not self._kinds:
            return
        lines = [f"{name} does not fit the model:"]
        for kind, entries in self._kinds.items():
            lines.append(f"  {kind}:")
            for (template, detail), layers in entries.items():
                lines.append(f"    {template}  {detail}" + (f"  (* = {_ranges(sorted(layers))})" if layers else ""))
        lines.append("Is this the checkpoint of another model, or of another size than its config.json says?")
        raise ValueError("\n".join(lines))


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
