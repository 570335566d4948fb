"""Open a trained policy: `load_policy(checkpoint_dir)`."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import jax

from robovlms_jax import schema
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.inputs import tokenizers
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import confidence, embodiments
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.serving import BatchedVLAPolicy, EncodeText, VLAPolicy
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build, saved, served
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import checkpoints, items
from robovlms_jax.weights import quantize

log = logging.getLogger(__name__)

Weights = Literal["float32", "bfloat16", "int8", "w8a8"]
_ROUNDED = ("int8", "w8a8")


def load_policy(
    path: str | pathlib.Path,
    policy: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    robot: str = "",
) -> VLAPolicy:
    """A policy for one robot, on this process's first device.

    Args:
      path: a run directory (its newest checkpoint is taken), one of its checkpoints/<step> folders, or hf://OWNER/NAME
        to download a shared one (`runs.sharing`); nothing else is needed.
      policy: fields of `PolicyConfig` that control may choose anew, such as {"reencode_every": 0} or
        {"head": {"num_steps": 4}}.
      weights: how the backbone's parameters are kept in memory; None: in the type it computes in. int8: its matrices
        with a scale per output channel, a quarter of float32 (see `weights.quantize`); adapters stay beside them. A
        policy that was trained on int8 (backbone.storage) keeps it where nothing else is asked for.
        w8a8: the same, and what they multiply is rounded to int8 at every step (see `nn.linear.Kernel`).
      robot: one of the other robots that it was trained on (`policy.others`); empty: its own.
    Raises:
      FileNotFoundError, ValueError: no or another model's checkpoint; says what was looked for.
    """
    # What was calibrated is its own robot's.
    calibration = None if robot else _calibration(path, weights)
    return VLAPolicy(*_served(*open_model(path, policy, weights, robot=robot)), calibration=calibration)


def load_batched_policy(
    path: str | pathlib.Path,
    slots: int,
    policy: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    prompt_lengths: Sequence[int] = (),
) -> BatchedVLAPolicy:
    """The same for `slots` robots or simulators at once; what one of them sends or is asked changes nothing for the
    others. prompt_lengths: see `BatchedVLAPolicy`."""
    opened = _served(*open_model(path, policy, weights))
    calibration = _calibration(path, weights)
    return BatchedVLAPolicy(*opened, slots=slots, calibration=calibration, prompt_lengths=prompt_lengths)


def _served(model: VLA, params: Any, encode: EncodeText) -> tuple[VLA, Any, EncodeText]:
    """As control steps read them fastest (`runs.served`); the parameters given are used up."""
    model = served.model(model)
    return model, served.parameters(model, params, take=True), encode


def _calibration(path: str | pathlib.Path, weights: Weights | None) -> confidence.Calibration | None:
    """How the checkpoint was calibrated; weights that were rounded only afterwards are not in that, which is logged."""
    calibration = saved.read_calibration(checkpoints.locate(path))
    if calibration is not None and weights in _ROUNDED and load_config(path).backbone.storage != weights:
        log.warning(
            "%s: its intervals of %.0f %% were calibrated without weights=%s, with which they were not measured",
            *(path, 100 * calibration.coverage, weights),
        )
    return calibration


def load_config(path: str | pathlib.Path) -> ExperimentConfig:
    """The resolved configuration a checkpoint was trained with."""
    return saved.read_checkpoint(checkpoints.locate(path))[0]


def open_backbone(settings: BackboneConfig, directory: pathlib.Path, assets: Mapping[str, str]) -> build.Backbone:
    """Architecture, tokenizer and preprocessing from the small files inside a checkpoint; how it computes, from
    `settings`.

    Raises ValueError naming the checkpoint and the files that it lacks, or cannot be read.
    """
    expected = {"config.json": ("config.json",), "a tokenizer": tokenizers.TOKENIZER_FILES}
    lacks = [what for what, names in expected.items() if not set(names) & set(assets)]
    if lacks:
        raise ValueError(
            f"{directory / 'serving'}: the backbone's small files lack {' and '.join(lacks)} (found {sorted(assets)}; "
            f"a tokenizer is one of {list(tokenizers.TOKENIZER_FILES)}). Copy the checkpoint again, or name another."
        )
    return build.backbone_from_assets(settings, assets, origin=f"{directory / 'serving'}, assets")


def open_model(
    path: str | pathlib.Path,
    policy: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    robot: str = "",
) -> tuple[VLA, Any, EncodeText]:
    """The model of a checkpoint, its parameters and what encodes its instructions. Arguments as for `load_policy`.

    dtype: the type to compute in, "float32" or "bfloat16"; None: as it was trained.
    """
    if weights not in (None, *get_args(Weights)):
        raise ValueError(f"weights={weights!r} is none of {list(get_args(Weights))}; None is the backbone's own type.")
    directory = checkpoints.locate(path)
    experiment, assets = saved.read_checkpoint(directory)
    if policy:
        values = _merge(schema.to_dict(experiment.policy), policy)
        changed = schema.from_dict(PolicyConfig, values, "policy")
        experiment = dataclasses.replace(experiment, policy=changed)
    if dtype:
        experiment = dataclasses.replace(experiment, backbone=dataclasses.replace(experiment.backbone, dtype=dtype))
    backbone = open_backbone(experiment.backbone, directory, assets)
    model = build.make_model(experiment, backbone.vlm)
    mesh = meshes.make_mesh((1, 1, 1), jax.local_devices()[:1])
    shapes, shardings = build.abstract_params(model, mesh)
    dtype, trained = experiment.backbone.dtype, backbone.vlm.storage
    if trained == "int8":
        types = jax.tree.map(lambda x: x.dtype, shapes)
    elif weights in _ROUNDED:  # rounded once, from all the digits there are
        types = quantize.stored_types(shapes, dtype, matrices="float32")
    else:
        types = quantize.stored_types(shapes, weights or dtype)
    params = items.read_params(directory, _abstract(shapes, types, shardings))
    if trained == "int8" and weights in ("float32", "bfloat16"):
        model, params = build.in_float(model), quantize.dequantize(params)
        params = jax.tree.map(lambda x, kind: x.astype(kind), params, quantize.stored_types(params, weights))
    elif weights in _ROUNDED and weights != trained:
        if trained == "int8":
            params = quantize.dequantize(params)
        storage = cast(Literal["int8", "w8a8"], weights)
        model = build.make_model(experiment, dataclasses.replace(backbone.vlm, storage=storage))
        shapes, shardings = build.abstract_params(model, mesh)
        params = quantize.quantize(params, _abstract(shapes, jax.tree.map(lambda x: x.dtype, shapes), shardings))
    if robot:
        params = embodiments.parameters(model.config, params, robot)
        model = VLA(embodiments.view(model.config, robot), model.vlm)
    return model, params, backbone.encoder(experiment.data.text_length)


def _abstract(shapes: Any, types: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, dtype, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes, types, shardings
    )


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        merged[name] = _merge(values[name], change) if isinstance(change, Mapping) and name in values else change
    return merged
