"""Vision tower + connector + language decoder = VLM; its configuration is in vlm_config.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.backbones import sequence
from robovlms_jax.backbones.vlm_config import ConnectorConfig, VisionConfig, VLMConfig
from robovlms_jax.nn.attention import Cache
from robovlms_jax.nn.decoder import Decoder
from robovlms_jax.nn.perceiver import Perceiver
from robovlms_jax.types import Tokens

__all__ = ["VLM", "ConnectorConfig", "VLMConfig", "VisionConfig", "build"]


class VLM(nn.Module):
    """Images, text and action queries in, hidden states out. Parameters: `vision/`, `connector/`, `text/`, and
    where there is one `encoder/`."""

    config: VLMConfig

    def setup(self):
        c = self.config
        self.vision = c.vision.build(c.kernel, c.remat)
        self.connector = c.connector.build(c.text, c.kernel)
        self.text = Decoder(c.text, c.kernel, c.remat)
        if c.encoder is not None:
            self.encoder = Decoder(c.encoder, c.kernel, c.remat)
        if c.resampler is not None:
            self.resampler = Perceiver(c.resampler, c.kernel, c.remat)

    def embed(
        self,
        images: Mapping[str, jax.Array],
        text_ids: jax.Array,
        text_mask: jax.Array,
        runs: Sequence[sequence.Run] = (),
        *,
        image_mask: jax.Array | None = None,
        count_padding: bool = False,
        queries_last: bool = False,
        deterministic: bool = True,
    ) -> Tokens:
        """One sequence per sample: [first text token, if `lead`] [images] [rest of the text] [runs].

        The runs lie in the last slots, but their positions put them right before the last `tail` real text tokens
        (eos); see `sequence.layout`.

        Args:
          images: camera -> float[B, size, size, 3], prepared as `config.image` says; their tokens follow in this order.
            (jit sorts the keys of its dict arguments: order the cameras inside.)
          text_ids: int32[B, T], special tokens included, padded on the right; with a `connector_tokenizer`
            int32[B, T, 2], see `types.Inputs`. text_mask: bool of the same shape, True = real token.
          runs: sensors and queries, float[B, n, D] each.
          image_mask: bool[B, cameras], True = there is an image; tokens of others are masked and keep their places.
          count_padding, queries_last: as upstream's training batches have it, see `sequence.Order`.
        Returns:
          Tokens in runs "bos", "image", "text", then those given; P slots per camera, what is around an image included.
          With an encoder "text" is the decoder's first token alone, and all of the prompt stands beside the sequence;
          with `states="encoder"` it stands in the sequence, and sees itself in both directions.
        """
        c = self.config
        chex.assert_shape(text_mask, text_ids.shape)
        chex.assert_rank(text_ids, 1 + len(c.text_shape(1)))
        question = None
        if c.connector_tokenizer:
            question = text_ids[..., 1], text_mask[..., 1]
            text_ids, text_mask = text_ids[..., 0], text_mask[..., 0]
        text = self.text.embed(text_ids).astype(c.dtype)
        attend = "prefix" if c.attention == "prefix" or c.encoder is not None else "causal"

        def text_run(name: str, part: slice) -> sequence.Run:
            return sequence.Run(text[:, part], text_mask[:, part], name, "text", attend)

        image = self._image_run(images, image_mask, len(text), attend, question, deterministic=deterministic)
        prompt = [text_run("bos", slice(0, c.lead)), image, text_run("text", slice(c.lead, None))]
        runs = [run.replace(embeds=run.embeds.astype(c.dtype)) for run in runs]
        if c.encodes:
            prompt = self._encode(prompt, deterministic=deterministic)
        tail = 0 if attend == "prefix" else c.tail
        return sequence.layout([*prompt, *runs], sequence.Order(tail, count_padding, queries_last))

    def _encode(self, prompt: Sequence[sequence.Run], *, deterministic: bool) -> list[sequence.Run]:
        """What the decoder reads in place of images and text: the encoder's states beside it, and its first token."""
        tokens = sequence.layout(prompt)
        self._require_places(tokens.mask.shape[1])
        states, _ = self.encoder(tokens, deterministic=deterministic)
        start, real = self.embed_ids(jnp.full((len(states), 1), self.config.start_id)), jnp.ones((len(states), 1), bool)
        return [
            sequence.Run(states, tokens.mask, "image", "image", beside=True),
            sequence.Run(start[:, :0], real[:, :0], "bos", "text"),
            sequence.Run(start, real, "text", "text"),
        ]

    def _require_places(self, length: int) -> None:
        """Raises ValueError where the encoder has learned fewer positions than it is to read."""
        limit = self.config.encoder.max_positions
        if self.config.encoder.positions == "learned" and length > limit:
            raise ValueError(
                f"pictures and prompt take {length} places, and the encoder of this {self.config.model_type} has "
                f"learned {limit}. Take fewer cameras, backbone.resampler_latents (64, say), or a larger model."
            )

    def embed_conversation(
        self,
        images: jax.Array,
        text_ids: jax.Array,
        image_slots: jax.Array,
        text_mask: jax.Array,
        prompt_mask: jax.Array,
        question: tuple[jax.Array, jax.Array] | None = None,
        *,
        deterministic: bool = True,
    ) -> Tokens:
        """One sequence per sample, with pictures wherever `image_slots` has them: a run "text" of S slots.

        Args:
          images: float[B, N, size, size, 3], prepared as `config.image` says.
          text_ids, image_slots, text_mask: as in `types.Pairs`.
          prompt_mask: bool[B, S], True = before the first answer; with `prefix` these see each other.
          question: what the connector reads, ids int32[B, U] and mask bool[B, U], where it has a tokenizer of its own.
        """
        c = self.config
        run = self._image_run(
            {number: images[:, number] for number in range(images.shape[1])},
            None,
            len(images),
            "causal",
            question,
            deterministic=deterministic,
        )
        is_image, chosen = image_slots >= 0, jnp.maximum(image_slots, 0)
        seen = jnp.take_along_axis(run.embeds, chosen[..., None], axis=1)
        embeds = jnp.where(is_image[..., None], seen, self.text.embed(text_ids).astype(c.dtype))
        deep = None
        if run.deep is not None:
            deep = jnp.take_along_axis(run.deep, chosen[..., None, None], axis=1)
            deep = jnp.where(is_image[..., None, None], deep, 0)
        positions = jnp.cumsum(text_mask, axis=1) - 1
        places = positions[..., None]  # what position encodings read
        if run.grid is not None:
            # Patches have a row and a column each, counted from where their picture begins.
            size = run.length // images.shape[1]
            grid, advance = self._image_grid(1)
            within = jnp.where(is_image, image_slots % size, 0)
            step = jnp.where(is_image, jnp.where(within == size - 1, advance, 0), text_mask)
            first = jnp.cumsum(step, axis=1) - step
            places = first[..., None] + jnp.where(is_image[..., None], jnp.asarray(grid)[within], 0)
        if c.image_block and c.attention == "causal":  # the tokens of a picture see each other, as in `embed`
            size = run.length // images.shape[1]
            order = np.asarray(self._image_order(size, 1)) - np.arange(size)
            positions += jnp.where(is_image, jnp.asarray(order)[image_slots % size], 0)
        if c.attention == "prefix":
            last = jnp.max(jnp.where(prompt_mask & text_mask, positions, 0), axis=1, keepdims=True)
            positions = jnp.where(prompt_mask, last, positions)
        counted = run.grid is None and c.attention == "causal" and not c.image_block  # one after the other
        offsets = None if counted else places - positions[..., None]
        positions, layout = positions.astype(jnp.int32), (("text", text_ids.shape[1]),)
        return Tokens(embeds, text_mask, positions, layout, offsets=offsets, deep=deep)

    def _image_run(
        self,
        images: Mapping[str, jax.Array],
        image_mask: jax.Array | None,
        batch: int,
        attend: Literal["causal", "prefix"],
        question: tuple[jax.Array, jax.Array] | None,
        *,
        deterministic: bool,
    ) -> sequence.Run:
        """Tokens of all cameras, each image between `image_start` and `image_end`: P * cameras slots, or as many beside
        the sequence."""
        c, beside = self.config, self.config.text.gated is not None
        if not images:
            empty = jnp.zeros((batch, 0, c.width), c.dtype)
            if beside:  # attention needs something to look at, masked or not
                empty = jnp.zeros((batch, 1, c.vision.width), c.dtype)
            return sequence.Run(empty, jnp.zeros(empty.shape[:2], bool), "image", "image", attend, beside=beside)
        encoded = self.encode_images(images, question, deterministic=deterministic)
        x, deep = encoded if isinstance(encoded, tuple) else (encoded, None)
        x = x.reshape(batch, len(images), -1, x.shape[-1])

        def around(ids: tuple[int, ...]) -> jax.Array:
            if ids and max(ids) >= c.text.vocab_size:  # jax would look up NaN
                raise ValueError(
                    f"images stand between the tokens {[*c.image_start]} and {[*c.image_end]} of a {c.model_type}, and "
                    f"its vocabulary has {c.text.vocab_size} ids. Name those of its tokenizer in config.json: "
                    "image_start_token_id, boi_token_index or vision_start_token_id, as the family calls it."
                )
            embeds = self.text.embed(jnp.asarray(ids, jnp.int32)).astype(x.dtype)
            return jnp.broadcast_to(embeds, (*x.shape[:2], len(ids), c.width))

        if c.image_start or c.image_end:
            x = jnp.concatenate([around(c.image_start), x, around(c.image_end)], axis=2)
        if deep is not None:
            deep = deep.reshape(batch, len(images), -1, *deep.shape[2:])
            widths = [(0, 0), (0, 0), (len(c.image_start), len(c.image_end)), (0, 0), (0, 0)]
            deep = jnp.pad(deep, widths).reshape(batch, -1, *deep.shape[3:])
        there = jnp.ones((batch, len(images)), bool) if image_mask is None else image_mask
        mask = jnp.repeat(there, x.shape[2], axis=1)
        grid, advance = None, 0
        if c.image_grid is not None and c.resampler is None:
            grid, advance = self._image_grid(len(images))
        order = self._image_order(x.shape[2], len(images)) if c.image_block and attend == "causal" else None
        x, more = x.reshape(batch, -1, x.shape[-1]), {"order": order, "deep": deep, "beside": beside}
        return sequence.Run(x, mask, "image", "image", attend, grid, advance, **more)

    def _image_order(self, length: int, cameras: int) -> tuple[int, ...]:
        """`sequence.Run.order` of images of `length` tokens each, what is around them included."""
        first, last = len(self.config.image_start), length - len(self.config.image_end) - 1
        one = np.r_[np.arange(first), np.full(last + 1 - first, last), np.arange(last + 1, length)]
        return tuple((np.arange(cameras)[:, None] * length + one).reshape(-1).tolist())

    def _image_grid(self, cameras: int) -> tuple[tuple[tuple[int, ...], ...], int]:
        """Time, height, width of image tokens, counted from the first: [P * cameras][3]; and places they take."""
        c = self.config
        rows, columns = c.image_grid
        grid = np.stack([np.zeros((rows, columns), int), *np.indices((rows, columns))], -1).reshape(-1, 3)
        runs, at = [], 0
        for _ in range(cameras):
            for ids in (c.image_start, None, c.image_end):
                count = max(rows, columns) if ids is None else len(ids)
                runs.append(at + (grid if ids is None else np.repeat(np.arange(count)[:, None], 3, axis=1)))
                at += count
        return tuple(map(tuple, np.concatenate(runs).tolist())), at

    def encode_images(
        self,
        images: Mapping[str, jax.Array],
        question: tuple[jax.Array, jax.Array] | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """camera -> float[B, size, size, 3] to float[B, P * cameras, D], cameras in the order given; and with DeepStack
        what they add behind the decoder's first n layers, float[B, P * cameras, n, D]. What stands beside the sequence
        has the connector's own width. question: as in `embed_conversation`."""
        # Beside each other in the batch, so that the vision tower runs once and samples stay on their devices.
        pixels = jnp.stack(list(images.values()), axis=1).astype(self.config.dtype)
        batch, cameras = pixels.shape[:2]
        features = self.vision(pixels.reshape(batch * cameras, *pixels.shape[2:]))
        asked = {}
        if self.config.connector_tokenizer:
            if question is None:
                raise ValueError(
                    f"the connector of a {self.config.model_type} reads the instruction, too, and has got none: pass "
                    f"what its {self.config.connector_tokenizer} makes of it."
                )
            asked["question"] = tuple(jnp.repeat(x, cameras, axis=0) for x in question)  # of each picture the same
        tokens = self.connector(features, deterministic=deterministic, **asked)
        if isinstance(tokens, tuple):
            tokens, deep = tokens
            if self.config.resampler is not None:
                raise ValueError(
                    f"backbone.resampler_latents={self.config.resampler.num_latents} mixes the tokens of an image, but "
                    f"{self.config.model_type} adds features to each of them inside the decoder; set it to 0."
                )
            return tokens.reshape(batch, -1, self.config.width), deep.reshape(batch, -1, *deep.shape[2:])
        if self.config.resampler is not None:
            tokens = self.resampler(tokens)
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def decode(
        self, tokens: Tokens, cache: Cache | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states float[B, S, D], and where a cache is given the same of these tokens, to be appended."""
        if self.config.states == "encoder":
            self._require_places(tokens.mask.shape[1] + (0 if cache is None else cache.mask.shape[1]))
        return self._stack(tokens, cache, deterministic=deterministic)

    @property
    def _stack(self) -> Decoder:
        """What turns a sequence into hidden states."""
        return self.encoder if self.config.states == "encoder" else self.text

    def embed_ids(self, ids: jax.Array) -> jax.Array:
        """int32[...] -> float[..., D], token embeddings as `decode` takes them."""
        return self.text.embed(ids).astype(self.config.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float[B, S, D] -> float32[B, S, V]."""
        return self.text.logits(hidden)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens."""
        return self._stack.init_cache(batch, length, jnp.dtype(self.config.dtype))

    def __call__(self, images: Mapping[str, jax.Array], text_ids: jax.Array, text_mask: jax.Array) -> jax.Array:
        """Logits float32[B, S, V] of a plain prompt; touches every parameter, so `init` makes them all."""
        hidden, _ = self.decode(self.embed(images, text_ids, text_mask))
        return self.logits(hidden)


def build(config: VLMConfig) -> VLM:
    """The module for a configuration."""
    return VLM(config)
