"""Vision tower + connector + language decoder = VLM, its configuration, and the registry of published models."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.inputs.images import ImageSpec, read_image_spec
from robovlms_jax.nn.attention import Cache
from robovlms_jax.nn.decoder import Decoder, DecoderConfig
from robovlms_jax.nn.linear import Lora
from robovlms_jax.nn.perceiver import Perceiver, PerceiverConfig
from robovlms_jax.nn.vit import ViT, ViTConfig
from robovlms_jax.types import Tokens
from robovlms_jax.weights.rules import Rules


class ConnectorConfig(Protocol):
    """A frozen dataclass that makes the module between vision tower and decoder."""

    def build(self, text: DecoderConfig, lora: Lora) -> nn.Module:
        """Module: (float[B, P', vision width], deterministic=...) -> float[B, P, D]."""

    def tiny(self) -> ConnectorConfig:
        """A shrunken twin for tests."""


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """Everything a vision-language model is, weights apart."""

    model_type: str
    """Family, by the name its config.json has."""
    vision: ViTConfig
    text: DecoderConfig
    connector: ConnectorConfig
    image: ImageSpec
    """How frames are prepared for the vision tower."""
    prompt: str
    """Text around the instruction, with {instruction} in it; the tokenizer adds its special tokens."""
    bos_id: int
    """First token of every prompt; image tokens follow it."""
    eos_id: int
    """Last token of every prompt; action queries come before it."""
    pad_id: int
    rules: Rules = dataclasses.field(repr=False)
    """How published checkpoints become parameters."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters, norms and softmax stay float32."""
    remat: bool = False
    """Recompute layer activations in the backward pass."""
    resampler: PerceiverConfig | None = None
    """Put behind the connector, per image: a fixed number of tokens, learned by attention, whatever comes out of it."""
    lora_rank: int = 0
    """> 0 adds low-rank adapters to every matrix."""
    lora_alpha: float = 16.0
    """Adapters are scaled by lora_alpha / lora_rank."""

    @property
    def width(self) -> int:
        """D, the width of embeddings and hidden states."""
        return self.text.width

    @property
    def lora(self) -> Lora:
        """Adapters as the blocks take them."""
        return Lora(self.lora_rank, self.lora_alpha)

    def tiny(self) -> VLMConfig:
        """A shrunken twin: the same architecture, small enough for a test."""
        vision = self.vision.tiny()
        image = dataclasses.replace(self.image, size=vision.image_size)
        return dataclasses.replace(
            self, vision=vision, text=self.text.tiny(), connector=self.connector.tiny(), image=image
        )


class VLM(nn.Module):
    """Images, text and action queries in, hidden states out. Parameters: `vision/`, `connector/`, `text/`."""

    config: VLMConfig

    def setup(self):
        c = self.config
        self.vision = ViT(c.vision, c.lora, c.remat)
        self.connector = c.connector.build(c.text, c.lora)
        self.text = Decoder(c.text, c.lora, c.remat)
        if c.resampler is not None:
            self.resampler = Perceiver(c.resampler, c.lora, c.remat)

    def embed(
        self,
        images: Mapping[str, jax.Array],
        text_ids: jax.Array,
        text_mask: jax.Array,
        queries: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Tokens:
        """One sequence per sample: [first text token] [images] [rest of the text] [queries].

        Queries lie in the last slots, but their positions put them right before the last real text token (eos), which
        moves behind them. Seen through positions that is upstream's [bos][images][text][queries][eos] for a single
        prompt, and it stays so for a padded one, where upstream's queries would come after eos and padding.

        Args:
          images: camera -> float[B, size, size, 3], prepared as `config.image` says; their tokens follow in this order.
            (jit sorts the keys of its dict arguments: order the cameras inside.)
          text_ids: int32[B, T], special tokens included, padded on the right. text_mask: bool[B, T], True = real token.
          queries: float[Q, D], or float[B, Q, D] where they differ between samples, or None for a plain prompt.
        Returns:
          Tokens with S = T + P * cameras + Q slots in runs "bos", "image", "text" and, with queries, "query".
        """
        batch, text_length = text_ids.shape
        chex.assert_shape(text_mask, (batch, text_length))
        text = self.text.embed(text_ids).astype(self.config.dtype)
        image = self.encode_images(images, deterministic=deterministic) if images else text[:, :0]
        num_image = image.shape[1]
        num_queries = 0 if queries is None else queries.shape[-2]

        order = jnp.cumsum(text_mask, axis=1) - 1  # place among the real text tokens; padding repeats the last one's
        last = jnp.maximum(order[:, -1:], 1)  # never the first token: images follow it whatever the prompt
        text_positions = (
            jnp.maximum(order, 0) + jnp.where(order > 0, num_image, 0) + jnp.where(order == last, num_queries, 0)
        )
        image_positions = jnp.broadcast_to(1 + jnp.arange(num_image), (batch, num_image))

        embeds = [text[:, :1], image, text[:, 1:]]
        mask = [text_mask[:, :1], jnp.ones((batch, num_image), bool), text_mask[:, 1:]]
        positions = [text_positions[:, :1], image_positions, text_positions[:, 1:]]
        layout = [("bos", 1), ("image", num_image), ("text", text_length - 1)]
        if queries is not None:
            queries = jnp.broadcast_to(queries.astype(text.dtype), (batch, num_queries, self.config.width))
            embeds.append(queries)
            mask.append(jnp.ones((batch, num_queries), bool))
            positions.append(last + num_image + jnp.arange(num_queries))
            layout.append(("query", num_queries))
        embeds, mask, positions = (jnp.concatenate(parts, axis=1) for parts in (embeds, mask, positions))
        return Tokens(embeds, mask, positions.astype(jnp.int32), tuple(layout))

    def encode_images(self, images: Mapping[str, jax.Array], *, deterministic: bool = True) -> jax.Array:
        """camera -> float[B, size, size, 3] to float[B, P * cameras, D], cameras in the order given."""
        # Beside each other in the batch, so that the vision tower runs once and samples stay on their devices.
        pixels = jnp.stack(list(images.values()), axis=1).astype(self.config.dtype)
        batch, cameras = pixels.shape[:2]
        features = self.vision(pixels.reshape(batch * cameras, *pixels.shape[2:]))
        tokens = self.connector(features, deterministic=deterministic)
        if self.config.resampler is not None:
            tokens = self.resampler(tokens)
        return tokens.reshape(batch, -1, self.config.width)

    def decode(
        self, tokens: Tokens, cache: Cache | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states float[B, S, D], and the cache extended by these tokens where one is given."""
        return self.text(
            tokens.embeds, tokens.mask, tokens.positions, cache, group=tokens.group, deterministic=deterministic
        )

    def embed_ids(self, ids: jax.Array) -> jax.Array:
        """int32[...] -> float[..., D], token embeddings as `decode` takes them."""
        return self.text.embed(ids).astype(self.config.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float[B, S, D] -> float32[B, S, V]."""
        return self.text.logits(hidden)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens."""
        return self.text.init_cache(batch, length, jnp.dtype(self.config.dtype))

    def __call__(self, images: Mapping[str, jax.Array], text_ids: jax.Array, text_mask: jax.Array) -> jax.Array:
        """Logits float32[B, S, V] of a plain prompt; touches every parameter, so `init` makes them all."""
        hidden, _ = self.decode(self.embed(images, text_ids, text_mask))
        return self.logits(hidden)


def build(config: VLMConfig) -> VLM:
    """The module for a configuration."""
    return VLM(config)


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a config.json and the configuration dataclass it fills."""

    name: str
    """Key of the part, such as "vision_config"."""
    fields: Mapping[str, tuple[str, ...]]
    """Field of the dataclass -> its names in the file; the first is written, any is read (legacy and new spellings)."""
    fixed: Mapping[str, Any]
    """Fields of the file that the model can only have with this value."""

    def read(self, values: Mapping[str, Any], default: Any) -> Any:
        """`default` with what the file says. Raises ValueError where it asks for a variant the model does not have."""
        part = {key: value for key, value in (values.get(self.name) or {}).items() if value is not None}
        for key, supported in self.fixed.items():
            if part.get(key, supported) != supported:
                raise ValueError(f"{self.name}.{key}={part[key]!r} is not supported; this model has {supported!r}.")
        found = {}
        for field, keys in self.fields.items():
            key = next((key for key in keys if key in part), None)
            if key is not None:
                found[field] = self._number(key, part[key])
        return dataclasses.replace(default, **found)

    def write(self, config: Any) -> dict[str, Any]:
        """The part of a config.json that `read` turns into `config`."""
        return {keys[0]: getattr(config, field) for field, keys in self.fields.items()} | dict(self.fixed)

    def _number(self, key: str, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        if len(set(value)) != 1:
            raise ValueError(f"{self.name}.{key}={value} is not supported; expected one number, or equal ones.")
        return value[0]


_MODELS: dict[str, Callable[[], VLMConfig]] = {}
_FAMILIES: dict[str, tuple[Callable, Callable]] = {}


def register(name: str) -> Callable:
    """Decorator: `@register("kosmos-2")` on a function that returns the published configuration."""

    def decorate(function: Callable[[], VLMConfig]) -> Callable[[], VLMConfig]:
        if name in _MODELS:
            raise ValueError(f"backbone {name!r} is registered already, by {_MODELS[name].__module__}.")
        _MODELS[name] = function
        return function

    return decorate


def register_family(
    model_type: str, read: Callable[[Mapping[str, Any]], VLMConfig], write: Callable[[VLMConfig], dict[str, Any]]
) -> None:
    """Make a `model_type` known: how its config.json becomes a configuration, and back."""
    if model_type in _FAMILIES:
        raise ValueError(f"model_type {model_type!r} is registered already, by {_FAMILIES[model_type][0].__module__}.")
    _FAMILIES[model_type] = (read, write)


def names() -> list[str]:
    """Names of all registered backbones."""
    return sorted(_MODELS)


def get(name: str) -> VLMConfig:
    """The published configuration of a registered backbone. Raises ValueError listing the known names."""
    if name not in _MODELS:
        raise ValueError(f"no backbone {name!r}; registered: {names()}.")
    return _MODELS[name]()


def from_hf_config(values: Mapping[str, Any]) -> VLMConfig:
    """Configuration from the contents of a Hugging Face config.json.

    Raises ValueError when its model_type is unknown (lists the known ones) or it asks for what the model cannot do.
    """
    model_type = values.get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(f"model_type {model_type!r} is unknown; known: {sorted(_FAMILIES)}.")
    return _FAMILIES[model_type][0](values)


def to_hf_config(config: VLMConfig) -> dict[str, Any]:
    """Contents of the config.json that `from_hf_config`, and transformers, turn into this architecture."""
    return _FAMILIES[config.model_type][1](config) | {"model_type": config.model_type}


def from_directory(directory: str | pathlib.Path) -> VLMConfig:
    """Configuration of a published model's directory: its config.json, and its image processor's file if there is one.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: a file is not JSON, names an unknown model_type, or asks for something the model cannot do.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a backbone directory holds config.json, safetensors and tokenizer files."
        )
    try:
        config = from_hf_config(json.loads(path.read_text()))
    except ValueError as error:  # JSONDecodeError is one
        raise ValueError(f"{path}: {error}") from error
    try:
        image = read_image_spec(directory)
    except FileNotFoundError:
        return config
    if image.size != config.image.size:
        raise ValueError(
            f"{directory}: the image processor makes {image.size} pixels but config.json says the vision tower reads "
            f"{config.image.size}; the files belong to different models."
        )
    return dataclasses.replace(config, image=image)
