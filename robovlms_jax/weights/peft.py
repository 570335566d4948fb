"""Adapters in the files of Hugging Face's PEFT (adapter_config.json, adapter_model.safetensors), out and in.

PEFT names a matrix by its module in transformers 5, stores A as [r, inputs] and B as [outputs, r] (of a convolution
A as [r, C, x, y] and B as [outputs, r, 1, 1]), and DoRA's magnitude as lengths of output channels; ours is a factor of
the kernel's own. Biases beside them: peft_biases.py.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from robovlms_jax import atomic, json_files
from robovlms_jax.nn.linear import Lora
from robovlms_jax.weights import peft_biases, peft_settings, sources
from robovlms_jax.weights import rules as rules_of
from robovlms_jax.weights.rearrange import Rearrange
from robovlms_jax.weights.rules import Rule, Rules

logger = logging.getLogger(__name__)

CONFIG, TENSORS = peft_settings.CONFIG, "adapter_model.safetensors"

_MODULES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
"""From the published names of `rules.HUB_NAMES` families to modules of transformers 5."""

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>A|B|magnitude_vector)(?:\.default)?(?:\.weight)?"
)

_Places = dict[str, list[tuple[str, int | None]]]
"""Tensor in PEFT's file -> paths and layers of the parameters that it belongs to."""


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How one kernel's adapters are laid out in torch. parts: how many kernels share the tensor."""

    rule: Rule
    down: Rearrange
    up: Rearrange
    lengths: Rearrange

    @classmethod
    def of(cls, rule: Rule, kernel_ndim: int, contracted: int) -> _Layout | None:
        """None where torch has no module of outputs by inputs there, so that PEFT has no adapter for it.

        kernel_ndim: axes of one layer's kernel, of which the first `contracted` meet the inputs.
        """
        whole = Rearrange.parse(rule.pattern, kernel_ndim)
        inputs, outputs = whole.target[:contracted], whole.target[contracted:]
        first, *rest = whole.source
        if not rule.source.endswith(".weight") or {axis for group in rest for axis in group} != set(inputs):
            return None
        ones = tuple(() for _ in rest[1:])  # of a convolution's B
        return cls(
            rule,
            Rearrange((("R",), *rest), (*inputs, "R")),
            Rearrange((first, ("R",), *ones), ("R", *outputs)),
            Rearrange((first,), outputs),
        )


def export(
    params: Mapping[str, Any],
    rules: Rules,
    lora: Lora,
    directory: str | pathlib.Path,
    base_model: str = "",
    trained: Collection[str] = (),
) -> None:
    """Write the adapters of a backbone as a directory that `peft.PeftModel.from_pretrained(model, directory)` opens.

    Kernels that share a tensor (a fused projection of queries, keys and values) become one adapter of their ranks'
    sum.

    Args:
      params: of the backbone, nested, adapters included.
      rules: those its weights are loaded by. lora: as the modules were built.
      base_model: where the base's weights are, for whoever opens the directory.
      trained: paths of the base's biases that learned beside the adapters. All are written then (PEFT's bias="all"),
        or, where each is of a module with an adapter, those of such modules ("lora_only").
    Raises:
      ValueError: there are no adapters, or adapters or trained biases that PEFT has no place for; names them.
      FileExistsError: the directory holds an adapter.
    """
    flat, directory = flatten_dict(params, sep="/"), pathlib.Path(directory)
    layouts = _layouts(flat, rules)
    if not any(path.endswith("lora_a") for path in flat):
        raise ValueError("there are no adapters (lora_a) in the parameters; was it trained with backbone.lora_rank?")
    unknown = sorted(path for path in flat if path.endswith("lora_a") and path not in layouts)
    if unknown:
        raise ValueError(
            f"PEFT has no adapters for {unknown}: in torch they are no modules of their own. Merge the adapters and "
            "export the whole model."
        )
    if (directory / CONFIG).exists():
        raise FileExistsError(f"{directory} holds an adapter already; export to an empty directory.")
    by_tensor: dict[tuple[str, int], list[str]] = {}
    for path, layout in sorted(layouts.items(), key=lambda item: item[1].rule.part):
        # Layers that differ in turns share names, but no tensors: they begin at different numbers.
        by_tensor.setdefault((layout.rule.source, layout.rule.first), []).append(path)
    tensors, modules, fused = {}, [], {}
    for _, paths in sorted(by_tensor.items()):
        layers = flat[paths[0]].shape[0] if layouts[paths[0]].rule.is_stacked else None
        for layer in [None] if layers is None else range(layers):
            module = _module(layouts[paths[0]].rule.name(layer), rules)
            modules.append(module)
            if len(paths) > 1:
                fused[module] = len(paths)
            for name, value in _tensors(flat, [layouts[path] for path in paths], layer, lora).items():
                tensors[f"base_model.model.{module}.{name}"] = np.ascontiguousarray(value, np.float32)
    bias, more = peft_biases.tensors(flat, rules, lambda name: _module(name, rules), set(modules), set(trained))
    tensors |= more
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(peft_settings.written(lora, modules, fused, base_model) | {"bias": bias}, indent=2)
    atomic.write_text(directory / CONFIG, text + "\n")
    with atomic.becoming(directory / TENSORS) as file:
        save_file(tensors, file, metadata={"format": "pt"})


def load(
    directory: str | pathlib.Path, params: Mapping[str, Any], rules: Rules, lora: Lora
) -> dict[str, jax.Array | np.ndarray]:
    """Adapters of a PEFT directory as our parameters: path -> float32 array, and the biases that learned beside them.
    Matrices for which it has none are left out; their own adapters add nothing at first.

    Args:
      params: of the backbone: nested arrays, or shapes where no adapter is a DoRA. lora: as the modules were built;
        smaller ranks are filled up with zeros, another scale goes into B.
    Raises:
      FileNotFoundError, ValueError: no adapter there, of another kind or a larger rank, or of another model; names the
        setting or the module, what was expected, and the flags that fit.
    """
    flat = flatten_dict(params, sep="/")
    settings, layouts, file, places, biases = _opened(pathlib.Path(directory).expanduser(), flat, rules, lora)
    found: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
    for key, paths in places.items():
        value, match = file.read(key, (slice(None),) * len(file.shapes[key])), _KEY.fullmatch(key)
        for path, layer in paths:
            values = found.setdefault(path, {}).setdefault(layer, {"module": match["module"]})
            values[match["part"]] = value.astype(np.float32)
    out = peft_biases.joined(
        {key: file.read(key, (slice(None),) * len(file.shapes[key])) for key, mine in biases.items() if mine},
        *(biases, rules, flat),
    )
    for path, layers in found.items():
        out |= _joined(path, layers, layouts[path], flat, (settings, lora))
    return out


def require_fits(
    directory: str | pathlib.Path, shapes: Mapping[str, Any], rules: Rules, lora: Lora, weights: str = ""
) -> None:
    """Raise what `load` does about an adapter of another kind or another model; no tensor is read. Warns where the
    adapter names another base than the weights are, for sizes may be the same.

    Args:
      shapes: of the backbone's parameters, nested. weights: where the base's are; empty: random ones.
    """
    settings, *_ = _opened(pathlib.Path(directory).expanduser(), flatten_dict(shapes, sep="/"), rules, lora)
    if there := peft_settings.other_base(settings, weights):
        logger.warning(
            "the adapter in %s was made for the base %s, and backbone.weights is %s: with another base than its own it "
            "computes something else.",
            *(directory, there, repr(weights) if weights else "empty (random parameters)"),
        )


def _opened(
    directory: pathlib.Path, flat: Mapping[str, Any], rules: Rules, lora: Lora
) -> tuple[dict[str, Any], dict[str, _Layout], sources.SafetensorsSource, _Places, _Places]:
    """An adapter's settings, layouts by path, its file, and where each of its adapters, and of its biases, belongs."""
    settings = json_files.read_object(directory / CONFIG, "PEFT's settings")
    peft_settings.require_kind(directory, settings, lora)
    layouts = _layouts(flat, rules)
    file = sources.SafetensorsSource([directory / TENSORS], str(directory / TENSORS))
    biases = peft_biases.places(file.shapes, rules, flat) if settings.get("bias", "none") != "none" else {}
    found: _Places = {}
    for key in file.shapes.keys() - biases.keys():
        match = _KEY.fullmatch(key)
        name = rules_of.canonical(rules, f"{match['module']}.weight") if match else ""
        places = [(path, layout.rule.match(name)) for path, layout in layouts.items()]
        found[key] = [(path, layer) for path, (fits, layer) in places if fits]
    unknown = [key for key, paths in found.items() if not paths]
    if unknown or not found:
        raise ValueError(
            f"{directory / TENSORS} is not an adapter of this backbone: it has no matrices for {sorted(unknown)[:4]} "
            f"({len(unknown)} of them); it has, for example, {sorted(x.rule.source for x in layouts.values())[:2]}. Is "
            f"it one of {settings.get('base_model_name_or_path') or 'another model'}?"
        )
    # Kernels that share a tensor have parts of its rank, which are told apart when they are read.
    ranks = {key: file.shapes[key][0] for key in found if ".lora_A" in key}
    own = [-(-rank // _sharing(found[key])) for key, rank in ranks.items()]
    peft_settings.require_rank(directory, max(own, default=1), settings, lora)
    for key, places in found.items():
        for path, _ in places:
            _require_shape(key, file.shapes[key], layouts[path], flat)
    peft_biases.require_shapes(file.shapes, biases, rules, flat)
    return settings, layouts, file, found, biases


def _shape(layout: _Layout, flat: Mapping[str, Any], name: str, rank: int) -> tuple[int, ...]:
    """Of one layer's lora_a or lora_b ("a", "b") with another rank than ours has."""
    shape = list(flat[re.sub(r"kernel$", f"lora_{name}", layout.rule.target)].shape[int(layout.rule.is_stacked) :])
    shape[0 if name == "b" else -1] = rank
    return tuple(shape)


def _require_shape(key: str, stored: Sequence[int], layout: _Layout, flat: Mapping[str, Any]) -> None:
    """Raise ValueError where PEFT's A or B is one for a matrix of another size."""
    part = _KEY.fullmatch(key)["part"]
    if part not in ("A", "B"):
        return
    rearrange, rank = (layout.down, stored[0]) if part == "A" else (layout.up, stored[1])
    wanted = rearrange.source_shape(_shape(layout, flat, part.lower(), rank))
    if wanted != tuple(stored):
        raise ValueError(
            f"the adapter's {key} is {list(stored)}; the backbone's matrix wants {list(wanted)}. It is one of another "
            "model."
        )


def _layouts(flat: Mapping[str, Any], rules: Rules) -> dict[str, _Layout]:
    """Path of each lora_a that PEFT has a place for -> its layout."""
    found = {}
    for rule in rules:
        path = re.sub(r"kernel$", "lora_a", rule.target) if isinstance(rule, Rule) else ""
        if path.endswith("lora_a") and path in flat and path not in found:
            stack = int(rule.is_stacked)
            contracted = len(flat[path].shape) - 1 - stack
            added = len(flat[path[:-1] + "b"].shape) - 1 - stack
            found[path] = _Layout.of(rule, contracted + added, contracted)
    return {path: layout for path, layout in found.items() if layout is not None}


def _module(tensor: str, rules: Rules) -> str:
    name = tensor.removesuffix(".weight") + "."
    if rules_of.HUB_NAMES[0] in rules:
        for pattern, replacement in _MODULES:
            name = re.sub(pattern, replacement, name)
    return name.removesuffix(".")


def _tensors(flat: Mapping[str, Any], layouts: list[_Layout], layer: int | None, lora: Lora) -> dict[str, np.ndarray]:
    """What PEFT stores for one module, of the kernels that share its tensor."""

    def of(layout: _Layout, name: str) -> np.ndarray:
        value = flat[re.sub(r"kernel$", name, layout.rule.target)]
        return np.asarray(value if layer is None else value[layer], np.float32)

    downs, ups, lengths = [], [], []
    for layout in layouts:
        downs.append(layout.down.backward(of(layout, "lora_a")))
        up = of(layout, "lora_b")
        ups.append(
            layout.up.backward(*(up if other is layout else np.zeros_like(of(other, "lora_b")) for other in layouts))
        )
        if lora.kind == "dora":
            kernel, contracted = of(layout, "kernel"), of(layout, "lora_a").ndim - 1
            lengths.append(
                of(layout, "lora_m") * np.linalg.norm(kernel.reshape(-1, *kernel.shape[contracted:]), axis=0)
            )
    out = {"lora_A.weight": np.concatenate(downs), "lora_B.weight": np.concatenate(ups, axis=1)}
    if lengths:
        length = layouts[0].lengths.backward(*lengths)
        spatial = ups[0].ndim - 2  # of a convolution, whose lengths are [1, outputs, 1, 1]
        out["lora_magnitude_vector"] = length.reshape(1, -1, *[1] * spatial) if spatial else length
    return out


def _sharing(places: Sequence[tuple[str, int | None]]) -> int:
    """How many kernels share a tensor, of the paths and layers that it belongs to."""
    return max(collections.Counter(layer for _, layer in places).values())


def _joined(
    path: str,
    layers: Mapping[int | None, Mapping[str, Any]],
    layout: _Layout,
    flat: Mapping[str, Any],
    origin: tuple[Mapping[str, Any], Lora],
) -> dict[str, Any]:
    """lora_a, lora_b and lora_m of one kernel from its layers. origin: PEFT's settings, and how ours are built."""
    prefix, stacked, (settings, lora) = path.removesuffix("a"), layout.rule.is_stacked, origin
    expected = list(range(flat[path].shape[0])) if stacked else [None]
    if sorted(layers, key=str) != sorted(expected, key=str):
        raise ValueError(
            f"the adapter has {layout.rule.source} in layers {sorted(layers)}, the backbone in {expected[0]} to "
            f"{expected[-1]}; it was made for some layers only, or for a model of another depth."
        )
    out: dict[str, list[np.ndarray]] = {}
    for layer in expected:
        values = layers[layer]
        module, names = values["module"], ["A", "B"] + ["magnitude_vector"] * (lora.kind == "dora")
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"the adapter's {module} has no lora_{missing[0]}; the file is incomplete.")
        rank = values["A"].shape[0]
        up = values["B"] * (peft_settings.scale(settings, module, rank) / lora.scale)
        pair: dict[str, np.ndarray] = {}
        pairs = [("a", layout.down, values["A"]), ("b", layout.up, up)]
        for name, rearrange, value in pairs:
            shape = _shape(layout, flat, name, rank)
            mine = rearrange.forward(lambda cut, value=value: value[cut], shape, (slice(None),) * len(shape))
            pair[name] = np.moveaxis(mine, 0 if name == "b" else -1, 0)
        used = np.any(pair["b"].reshape(rank, -1) != 0, axis=1)
        if rank > lora.rank:  # of a tensor that kernels share each uses its own part of the rank
            if used.sum() > lora.rank:
                raise ValueError(
                    f"the adapter's {module} has rank {rank}, of which {prefix[:-5]} uses {used.sum()}; pass "
                    f"--backbone.lora_rank {used.sum()}."
                )
            pair = {name: np.concatenate([x[used], x[~used]])[: lora.rank] for name, x in pair.items()}
        for name, x in pair.items():
            padded = np.pad(x, [(0, lora.rank - len(x)), *[(0, 0)] * (x.ndim - 1)])
            out.setdefault(prefix + name, []).append(np.moveaxis(padded, 0, 0 if name == "b" else -1))
        if lora.kind == "dora":
            out.setdefault(prefix + "m", []).append(_gain(values["magnitude_vector"], layout, flat, path, layer))
    return {name: np.stack(values) if stacked else values[0] for name, values in out.items()}


def _gain(value: np.ndarray, layout: _Layout, flat: Mapping[str, Any], path: str, layer: int | None) -> np.ndarray:
    """DoRA's magnitude of one layer as a factor of the kernel's own channel lengths."""
    kernel = flat[path.removesuffix("lora_a") + "kernel"]
    kernel = kernel if layer is None else kernel[layer]
    shape = kernel.shape[flat[path].ndim - 1 - int(layer is not None) :]
    magnitude = layout.lengths.forward(lambda cut: value.reshape(-1)[cut], shape, (slice(None),) * len(shape))
    return magnitude / np.asarray(jnp.linalg.norm(jnp.reshape(kernel, (-1, *shape)).astype(jnp.float32), axis=0))
