"""What backbone tests share: Hugging Face models, our parameters converted from them, inputs and the error measure."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import torch
import transformers

from robovlms_jax.backbones import base, registry
from robovlms_jax.weights import convert
from tests.weights.array_source import ArraySource

BATCH, TEXT = 2, 7
IMAGE = 100
"""Id of the placeholder that torch models replace by image features; prompts have smaller ids."""

DISTINCT = list({dataclasses.replace(registry.get(name).tiny(), rules=()): name for name in registry.names()}.values())
"""One model of each kind: those whose tiny twins are equal differ in sizes alone."""


@dataclasses.dataclass
class Twin:
    """The same network twice. `params` is converted from `torch_model`, whose every parameter is random."""

    config: base.VLMConfig
    torch_model: Any
    params: Any

    def apply(self, *args: Any, method: str | None = None, config: base.VLMConfig | None = None) -> Any:
        cameras = tuple(args[0]) if isinstance(args[0], dict) else ()
        return _apply(base.build(config or self.config), method, cameras, self.params, *args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apply(model: base.VLM, method: str | None, cameras: tuple[str, ...], params: Any, *args: Any) -> Any:
    if cameras:  # jit hands dicts over with sorted keys
        args = ({camera: args[0][camera] for camera in cameras}, *args[1:])
    return model.apply({"params": params}, *args, method=method)


def hugging_face(config: base.VLMConfig, **changes: Any) -> torch.nn.Module:
    """transformers' model of the same architecture, from the config.json we write."""
    values = registry.to_hf_config(config) | changes
    model_class = getattr(transformers, values.pop("architectures")[0])
    del values["model_type"]
    return model_class(model_class.config_class(**values)).eval()


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, so that those that begin as zeros or ones matter, too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            is_norm = any(word in name for word in ("norm", "_ln", "ln_", ".ln")) and name.endswith("weight")
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05 + is_norm)
    return model.float().eval()


def from_torch(config: base.VLMConfig, state: dict[str, torch.Tensor]) -> Any:
    """Parameters, or anything else that has a value per torch parameter, by the rules of the backbone."""
    shapes = abstract(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    source = ArraySource({name: value.detach().numpy() for name, value in state.items()})
    return convert.load_params(config.rules, source, shapes, jax.tree.map(lambda _: device, shapes))


def abstract(config: base.VLMConfig) -> Any:
    """Shapes of all parameters."""
    return nn.unbox(boxed(config))


def boxed(config: base.VLMConfig) -> Any:
    """Shapes of all parameters with their logical axis names."""
    return _boxed(dataclasses.replace(config, rules=()))


@functools.lru_cache
def _boxed(config: base.VLMConfig) -> Any:
    images, *text = example(config, cameras=("static",))
    inputs = images, *as_read(config, *text)
    return jax.eval_shape(lambda: base.build(config).init(jax.random.key(0), *inputs))["params"]


def example(config: base.VLMConfig, cameras: tuple[str, ...] = ("wrist", "static"), lengths: tuple[int, ...] = (7, 5)):
    """Random normalised images and prompts [bos] ... [eos] padded on the right."""
    rng = np.random.default_rng(0)
    size = config.image.size
    images = {camera: rng.normal(size=(BATCH, size, size, 3)).astype(np.float32) for camera in cameras}
    mask = np.arange(TEXT) < np.asarray(lengths)[:, None]
    ids = rng.integers(3, min(config.text.vocab_size, IMAGE), (BATCH, TEXT))
    ends = np.asarray([config.bos_id, config.eos_id, config.pad_id]) % config.text.vocab_size  # twins know few tokens
    ids[:, 0] = ends[0]
    ids[np.arange(BATCH), np.asarray(lengths) - 1] = ends[1]
    return images, np.where(mask, ids, ends[2]).astype(np.int32), mask


def question(config: base.VLMConfig, batch: int = BATCH, side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """What a connector with a tokenizer of its own reads: int32[B, T], bool[B, T], unlike the prompt in its lengths."""
    ids = np.random.default_rng(5).integers(1, config.connector.vocab_size, (batch, TEXT)).astype(np.int32)
    mask = np.arange(TEXT) < np.resize([4, 6], batch)[:, None]
    if side == "left":
        ids, mask = (np.stack([np.roll(row, TEXT - n) for row, n in zip(x, mask.sum(1))]) for x in (ids, mask))
    return ids, mask


def as_read(config: base.VLMConfig, ids: np.ndarray, mask: np.ndarray, side: str = "right"):
    """Prompts as `VLM.embed` takes them: as they are, or with what the connector reads beside them."""
    if not config.connector_tokenizer:
        return ids, mask
    beside = (x[:, : ids.shape[1]] for x in question(config, len(ids), side))
    return tuple(np.stack(parts, axis=-1) for parts in zip((ids, mask), beside))


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference as a share of the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
