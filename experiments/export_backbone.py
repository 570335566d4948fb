"""Give a policy's vision-language model back: a directory that transformers opens, or its adapters for PEFT.

    python -m experiments.export_backbone --checkpoint runs/mine --out exported            # from_pretrained("exported")
    python -m experiments.export_backbone --checkpoint runs/mine --out adapters --adapters # PeftModel.from_pretrained

The first merges adapters into the matrices and copies tokenizer and image settings beside them. What a robot's policy
adds (head, action query, sensors) is no part of either.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
import sys

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax import atomic, cli, ending
from robovlms_jax.backbones import registry
from robovlms_jax.inputs import tokenizers
from robovlms_jax.nn.linear import merge_lora
from robovlms_jax.runs import build, load, logs, saved
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import checkpoints
from robovlms_jax.weights import convert, export, peft, peft_biases, sources
from robovlms_jax.weights.rules import Rules

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ExportBackboneConfig:
    """What to export, and where to."""

    checkpoint: str
    """Run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME."""
    out: str
    """Directory to write; new or empty."""
    adapters: bool = False
    """Only the low-rank adapters, and the biases that learned beside them, as PEFT stores them, instead of the whole
    model."""
    base: str = ""
    """Weights the run started from, a directory or hf://OWNER/NAME: for parts that the policy does not have, such as
    the head for words of a policy that says none. Empty: the run's backbone.weights."""


def main(config: ExportBackboneConfig) -> pathlib.Path:
    """Writes the directory and returns it. Raises ValueError, FileNotFoundError, FileExistsError with what to do."""
    target = pathlib.Path(config.out).expanduser()
    atomic.require_free(target)
    experiment, assets = saved.read_checkpoint(checkpoints.locate(config.checkpoint, strict=True))
    logger.info("reading %s", config.checkpoint)
    model, params, _ = load.open_model(config.checkpoint, weights="float32")
    logger.info("writing %s", target)
    base = config.base or experiment.backbone.weights
    vlm, params = model.vlm, params["backbone"]
    if config.adapters:
        biases = _trained_biases(experiment, params, vlm.rules)
        with atomic.becoming_folder(target) as folder:
            peft.export(params, vlm.rules, vlm.lora, folder, base, biases)
        ending.show(
            f"{target}: adapters of rank {vlm.lora_rank}, for peft.PeftModel.from_pretrained(model, {str(target)!r})"
        )
        return target
    if vlm.resampler is not None:
        raise ValueError(
            "backbone.resampler_latents adds a part that this model has not in transformers; only --adapters can be "
            "exported."
        )
    if vlm.lora_rank:
        params = merge_lora(params, vlm.lora)
    params = _complete(params, build.spare_params(model, {"backbone": params}), vlm.rules, base)
    described = registry.to_hf_config(vlm)
    with atomic.becoming_folder(target) as folder:
        export.export(params, vlm.rules, folder, described)
        tokenizers.write_assets({name: text for name, text in assets.items() if name != "config.json"}, folder)
    architecture = described["architectures"][0]
    ending.show(f"{target}: {build.count(params):,} parameters, for transformers.{architecture}.from_pretrained")
    return target


def _trained_biases(experiment: ExperimentConfig, params: dict, rules: Rules) -> set[str]:
    """Paths of the biases that learned beside the adapters, which PEFT's files hold, too. Warns where adapters and
    biases on the base's weights are not what the run ended with."""
    own = {f"backbone/{path}": path for path in flatten_dict(params, sep="/") if "lora_" not in path}
    stages = [stage.trainable for stage in experiment.train.stages] or [experiment.train.trainable]
    trained = {path for name, path in own.items() if any(re.search(x, name) for patterns in stages for x in patterns)}
    biases = trained & peft_biases.paths(rules, trained) | {path for path in trained if path.endswith("/bias")}
    others = sorted(trained - biases)
    if others and experiment.backbone.storage == "float":
        logger.warning(
            "the run trained %d of the backbone's own parameters beside the adapters, such as backbone/%s: on the "
            "base's weights adapters and biases alone are another model. Export the whole one, without --adapters.",
            *(len(others), others[0]),
        )
    elif experiment.train.init_from:
        logger.warning(
            "the run began with the backbone of %s, and the adapters are for that one: where it was trained, export "
            "the whole model, without --adapters.",
            experiment.train.init_from,
        )
    return biases


def _complete(params: dict, spare: dict[str, tuple[int, ...]], rules: tuple, base: str) -> dict:
    """`params` with what the policy has not and the whole model has, from the base's weights."""
    flat = flatten_dict(params, sep="/")
    lacking = {path: shape for path, shape in spare.items() if "lora_" not in path}
    if lacking and not base:
        raise ValueError(
            f"this policy has no {sorted(lacking)}, which the whole model has; pass --base with the weights it began "
            "with."
        )
    if lacking:
        source = sources.open_sources([tokenizers.resolve_weights(part) for part in tokenizers.split_weights(base)])
        shapes = unflatten_dict(
            {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in lacking.items()}, sep="/"
        )
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        found = convert.load_params(
            rules,
            source,
            shapes,
            jax.tree.map(lambda _: place, shapes),
            spare={path: x.shape for path, x in flat.items()},
        )
        flat |= flatten_dict(found, sep="/")
    return unflatten_dict(flat, sep="/")


if __name__ == "__main__":
    logs.to_stderr()
    try:
        main(cli.read(ExportBackboneConfig, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
