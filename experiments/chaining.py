"""Start a run from another run's checkpoint: pre-training, then fine-tuning with other data, actions or statistics."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax import build
from robovlms_jax.config import BackboneConfig
from robovlms_jax.training import checkpoints

logger = logging.getLogger(__name__)


def open_backbone(config: BackboneConfig, path: str) -> build.Backbone:
    """Architecture, tokenizer and preprocessing of the checkpoint's backbone; how it computes, from `config`.

    Raises FileNotFoundError, ValueError.
    """
    directory = checkpoints.locate(path)
    logger.info("backbone and tokenizer as in %s", directory)
    return build.backbone_from_assets(config, checkpoints.read_serving(directory)["assets"])


def take_over(params: Any, path: str) -> Any:
    """`params` with every parameter that the checkpoint has in the same shape; the others are listed in the log.

    Args:
      params: nested arrays in their shardings.
    Raises:
      ValueError: nothing fits.
    """
    directory = checkpoints.locate(path)
    current = flatten_dict(params, sep="/")
    found = checkpoints.shapes(directory)
    fitting = {name for name, x in current.items() if found.get(name) == tuple(x.shape)}
    if not fitting:
        raise ValueError(
            f"train.init_from={str(path)!r}: no parameter of {directory} fits this model; it holds "
            f"{sorted(found)[:3]} ... Was it trained with another backbone?"
        )
    loaded = checkpoints.read_some(directory, {name: current[name] for name in fitting})
    kept = sum(current[name].size for name in fitting)
    total = sum(x.size for x in current.values())
    lines = [
        f"{name}: {'not in the checkpoint' if name not in found else f'there {found[name]}, here {tuple(x.shape)}'}"
        for name, x in sorted(current.items())
        if name not in fitting
    ]
    lines += [f"{name}: {found[name]}, which this model lacks" for name in sorted(set(found) - set(current))]
    logger.info("train.init_from %s: %.1f %% of %s parameters", pathlib.Path(path), 100 * kept / total, f"{total:,}")
    if lines:
        shown = lines[:40] + [f"... and {len(lines) - 40} more"] * (len(lines) > 40)
        logger.info("what does not fit starts anew:\n  %s", "\n  ".join(shown))
    return unflatten_dict({**current, **loaded}, sep="/")
