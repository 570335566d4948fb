"""Open a trained policy: `load_policy(checkpoint_dir)`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from robovlms_jax import schema
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.inputs import tokenizers
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.rollout import BatchedVLAPolicy, VLAPolicy
from robovlms_jax.runs import build, saved
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import checkpoints, items


def load_policy(path: str | pathlib.Path, policy: Mapping[str, Any] | None = None) -> VLAPolicy:
    """A policy for one robot, on this process's first device.

    Args:
      path: a run directory (its newest checkpoint is taken) or one of its checkpoints/<step> folders; nothing else is
        needed.
      policy: fields of `PolicyConfig` that control may choose anew, such as {"reencode_every": 0} or
        {"head": {"num_steps": 4}}.
    Raises:
      FileNotFoundError, ValueError: no or another model's checkpoint; says what was looked for.
    """
    return VLAPolicy(*_open(path, policy))


def load_batched_policy(
    path: str | pathlib.Path, slots: int, policy: Mapping[str, Any] | None = None
) -> BatchedVLAPolicy:
    """The same for `slots` robots or simulators at once; what one of them sends or is asked changes nothing for the
    others."""
    return BatchedVLAPolicy(*_open(path, policy), slots=slots)


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


def _open(path: str | pathlib.Path, policy: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    directory = checkpoints.locate(path)
    experiment, assets = saved.read_checkpoint(directory)
    if policy:
        values = _merge(schema.to_dict(experiment.policy), policy)
        changed = schema.from_dict(PolicyConfig, values, "policy")
        experiment = dataclasses.replace(experiment, policy=changed)
    backbone = open_backbone(experiment.backbone, directory, assets)
    model = build.make_model(experiment, backbone.vlm)
    shapes, shardings = build.abstract_params(model, meshes.make_mesh((1, 1, 1), jax.local_devices()[:1]))
    types = serving_types(shapes, experiment.backbone.dtype)
    abstract = jax.tree.map(
        lambda x, dtype, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes, types, shardings
    )
    return model, items.read_params(directory, abstract), backbone.encoder(experiment.data.text_length)


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        merged[name] = _merge(values[name], change) if isinstance(change, Mapping) and name in values else change
    return merged


def serving_types(shapes: Any, dtype: str) -> Any:
    """The type each parameter is served in.

    Blocks cast their parameters to the type of the activations at every use, norms excepted, so storing them in that
    type changes no number and halves what a bfloat16 control step reads from memory.
    """

    def choose(path: tuple, x: Any) -> Any:
        keys = [key.key for key in path]
        return dtype if keys[0] == "backbone" and not any("norm" in key for key in keys) else x.dtype

    return jax.tree_util.tree_map_with_path(choose, shapes)
