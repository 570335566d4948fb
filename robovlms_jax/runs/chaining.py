"""Start a run from another run's checkpoint: pre-training, then fine-tuning with other data, actions or statistics."""

from __future__ import annotations

import logging
import pathlib
import tempfile
from collections.abc import Collection, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.backbones import registry
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.inputs import prompts, tokenizers
from robovlms_jax.runs import build, load, played, resuming, robots
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import checkpoints, items
from robovlms_jax.weights import quantize

logger = logging.getLogger(__name__)

COMPUTED = (
    *("backbone.attention", "backbone.states", "backbone.resampler_latents", "backbone.resampler_depth"),
    *("backbone.resampler_heads", "policy.history", "policy.readout"),
)
"""Fields that say how parameters are computed with; no shape tells them."""
ADAPTERS = tuple(f"{part}.lora_{field}" for part in ("backbone", "policy") for field in ("rank", "alpha", "kind"))
"""Fields of adapters, without which those of a checkpoint are lost, or weigh otherwise."""
SEEN = ("policy.cameras", "data.image_size")
"""Fields that say what the policy sees; PlayTable's pictures are `played.Played.image_size`."""
PICTURES = "rollouts.image_size"
"""What `differences` calls PlayTable's pictures, of demonstrations, too."""


def differences(earlier: ExperimentConfig, config: ExperimentConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> its values in the run that parameters are taken from and here, where they differ and no shape of a
    parameter shows it: how the model computes (`COMPUTED`), adapters of the earlier run (`ADAPTERS`), what it sees
    (`SEEN`, and pixels of PlayTable's static and wrist camera where both runs meet it)."""
    names = [*COMPUTED, *SEEN]
    for part in ("backbone", "policy"):
        if getattr(earlier, part).lora_rank:
            names += [name for name in ADAPTERS if name.startswith(part)]
    pairs = {name: (_value(earlier, name), _value(config, name)) for name in names}
    if all(x.demonstrations.episodes or x.rollouts.trials for x in (earlier, config)):
        pairs[PICTURES] = (played.of(earlier).image_size, played.of(config).image_size)
    if not (earlier.backbone.resampler_latents or config.backbone.resampler_latents):
        pairs = {name: pair for name, pair in pairs.items() if not name.startswith("backbone.resampler_")}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def say_differences(config: ExperimentConfig, path: str) -> None:
    """Log what this run does otherwise than the one that its parameters are taken from, `path`: fine-tuning may."""
    earlier = load.load_config(path)
    robots.say_differences(earlier.policy, config.policy, path)
    for field in ("name", "weights", "adapter"):
        here = getattr(config.backbone, field)
        # A preset's own start, or a value on the command line that has no effect; the same one is in the parameters.
        if here and here != getattr(earlier.backbone, field):
            logger.warning(
                "train.init_from %s brings its backbone, %s, which is trained here; backbone.%s=%s has no effect. To "
                "begin with that one, begin anew: --train.init_from ''.",
                *(path, earlier.backbone.name, field, here),
            )
    if found := differences(earlier, config):
        lines = [f"{name}: there {there}, here {here}" for name, (there, here) in found.items()]
        lost = any(name.endswith(("lora_rank", "lora_kind")) for name in found)
        lost = "\n  What its adapters learned is lost; set these fields as there to keep it." if lost else ""
        logger.warning("%s was trained with other settings:\n  %s%s", path, "\n  ".join(lines), lost)


def _value(config: ExperimentConfig, name: str) -> Any:
    part, field = name.split(".")
    return getattr(getattr(config, part), field)


def open_backbone(config: BackboneConfig, path: str) -> build.Backbone:
    """Architecture, tokenizer and preprocessing of the checkpoint's backbone; how it computes, from `config`.

    Raises FileNotFoundError, ValueError.
    """
    directory = checkpoints.locate(path)
    logger.info("backbone and tokenizer as in %s", directory)
    return load.open_backbone(config, directory, items.read_serving(directory)["assets"])


def backbone_of(config: BackboneConfig, point: resuming.Point, sentences: Sequence[str]) -> build.Backbone:
    """The backbone of a run that goes on, from its checkpoint alone. Where today's files would be others, the log says
    so: `config.weights`, or a tokenizer made from today's `sentences`."""
    backbone = load.open_backbone(config, point.directory, point.assets)
    directory = pathlib.Path(config.weights.partition(",")[0].strip()).expanduser()
    if not config.weights and not point.config.train.init_from:
        with tempfile.TemporaryDirectory() as made:
            vlm = registry.get(config.name)
            texts = [prompts.format_prompt(vlm.prompt, sentence) for sentence in sentences]
            build.write_files(vlm, texts, pathlib.Path(made))
            today = tokenizers.read_assets(made)
    elif config.weights and directory.is_dir():
        # What only the weights tell is noted in the checkpoint's config.json.
        today = {name: text for name, text in tokenizers.read_assets(directory).items() if name != "config.json"}
    else:
        return backbone
    others = sorted(name for name, text in today.items() if point.assets.get(name) != text)
    if others:
        source = f"{directory} holds" if config.weights else "today's sentences would make"
        logger.warning("the checkpoint's own %s go on; %s others", ", ".join(others), source)
    return backbone


def take_over(params: Any, path: str) -> Any:
    """`params` with every parameter that the checkpoint has in the same shape; the others are listed in the log.

    Args:
      params: nested arrays in their shardings, all in floating point. Matrices that the checkpoint has in int8 become
        float.
    Raises:
      ValueError: nothing fits.
    """
    directory = checkpoints.locate(path)
    current = flatten_dict(params, sep="/")
    found = items.shapes(directory)
    fitting = {name for name, x in current.items() if found.get(name) == tuple(x.shape)}
    if not fitting:
        raise ValueError(
            f"train.init_from={str(path)!r}: no parameter of {directory} fits this model; it holds "
            f"{sorted(found)[:3]} ... Was it trained with another backbone?"
        )
    wanted: dict[str, Any] = {name: current[name] for name in fitting}
    scales = {name: quantize.scale_of(name) for name in fitting if _in_int8(name, found)}
    for name, scale in scales.items():
        whole = jax.sharding.NamedSharding(current[name].sharding.mesh, jax.sharding.PartitionSpec())
        wanted[scale] = jax.ShapeDtypeStruct(found.pop(scale), "float32", sharding=whole)
    loaded = items.read_some(directory, wanted)
    for name, scale in scales.items():
        loaded[name] = jax.device_put(loaded[name] * loaded.pop(scale), current[name].sharding)
    kept = sum(current[name].size for name in fitting)
    total = sum(x.size for x in current.values())
    lines = [
        f"{name}: {'not in the checkpoint' if name not in found else f'there {found[name]}, here {tuple(x.shape)}'}"
        for name, x in sorted(current.items())
        if name not in fitting
    ]
    lines += [f"{name}: {found[name]}, which this model lacks" for name in sorted(set(found) - set(current))]
    logger.info("train.init_from %s: %.1f %% of %s parameters", path, 100 * kept / total, f"{total:,}")
    if lines:
        shown = lines[:40] + [f"... and {len(lines) - 40} more"] * (len(lines) > 40)
        logger.info("what does not fit starts anew:\n  %s", "\n  ".join(shown))
    return unflatten_dict({**current, **loaded}, sep="/")


def _in_int8(name: str, found: Collection[str]) -> bool:
    """Whether a checkpoint of these parameters has this one in int8, with its scale beside it."""
    return name.startswith("backbone/") and quantize.stored_as(name) == "matrix" and quantize.scale_of(name) in found
