"""Language decoder: one stack for Magneto (KOSMOS-2), Llama, Qwen, Gemma, Phi, MPT, OPT, BART and T5."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attended import spare
from robovlms_jax.nn.attention import Attention, Cache, causal_mask
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.gated import GatedCrossAttention
from robovlms_jax.nn.linear import Einsum, Embed, Kernel
from robovlms_jax.nn.mlp import MLP
from robovlms_jax.nn.norms import make_norm
from robovlms_jax.nn.positions import Rotary, alibi_slopes, relative_buckets, rotary, sinusoid
from robovlms_jax.nn.stack import Remat, Step, scan_groups, scan_layers
from robovlms_jax.types import Media, Tokens


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the stream."""

    config: DecoderConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array,
        bias: jax.Array | None,
        rotary: tuple | None,
        cache: tuple | None,
        media: jax.Array | tuple[jax.Array, jax.Array] | None = None,
        sees: jax.Array | None = None,
        deterministic: bool,
    ):
        """float[B, S, D] -> float[B, S, D] and the new keys and values; other arguments are those of `Attention`.

        With `cross`, media: float[B, M, E], or keys and values of an earlier call; sees: bool[B, S, M], True = may
        attend, and who may attend to nothing adds nothing. What is returned is then a pair: new keys and values of the
        tokens, and of the media.
        """
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=deterministic)
        inner = c.norm_epsilon if c.sub_norm else None
        attention = self._attention(
            "attn",
            c.kv_heads,
            softcap=c.softcap,
            inner_norm_epsilon=inner,
            head_norm=(c.norm, c.norm_epsilon) if c.qk_norm else None,
            norm_all_heads=c.norm_all_heads,
        )
        mlp = MLP(c.mlp_dim, c.activation, inner, c.is_gated, c.mlp_bias, kernel=self.kernel, name="mlp")
        attend = functools.partial(
            attention, mask=mask, bias=bias, rotary=rotary, cache=cache, deterministic=deterministic
        )

        def norm(name: str) -> nn.Module:
            return make_norm(c.norm, c.norm_epsilon, name=name)

        def add(name: str, part: Callable, x: jax.Array) -> tuple[jax.Array, Any]:
            y, new = part(x if c.residual == "post" else norm(f"{name}_norm")(x))
            x = x + drop(norm(f"{name}_out_norm")(y) if c.residual == "sandwich" else y)
            return norm(f"{name}_norm")(x) if c.residual == "post" else x, new

        if c.residual == "parallel":
            normed = norm("attn_norm")(x)
            y, new = attend(normed)
            return x + drop(y) + drop(mlp(normed)), new
        x, new = add("attn", attend, x)
        if c.cross:
            cross = self._attention("cross")

            def look(x: jax.Array) -> tuple[jax.Array, Any]:
                y, new = cross(x, media, mask=sees, deterministic=deterministic)
                return jnp.where(sees.any(-1, keepdims=True), y, 0), new

            x, keys = add("cross", look, x)
            new = new, keys
        return add("mlp", lambda x: (mlp(x), None), x)[0], new

    def _attention(self, name: str, kv_heads: int | None = None, **more: Any) -> Attention:
        """What the layer's attentions have in common."""
        c = self.config
        biases = {"use_bias": c.attention_bias != "none", "use_output_bias": c.attention_bias == "all"}
        more |= biases | {"scale": (c.query_scalar or c.head_dim) ** -0.5, "dropout": c.attention_dropout}
        return Attention(c.num_heads, c.head_dim, kv_heads, **more, kernel=self.kernel, name=name)


def _of_layer(deep: jax.Array, number: jax.Array) -> jax.Array:
    """float[B, S, n, D], int32[] -> float[B, S, D]: what is added behind layer `number`; zero from layer n on."""
    added = jax.lax.dynamic_index_in_dim(deep, jnp.minimum(number, deep.shape[2] - 1), axis=2, keepdims=False)
    return jnp.where(number < deep.shape[2], added, 0)


class Decoder(nn.Module):
    """Embeddings to hidden states, causal in `positions`."""

    config: DecoderConfig
    kernel: Kernel = Kernel()
    remat: Remat = "none"

    def setup(self):
        c = self.config
        self.embed = Embed(
            c.vocab_size, c.width, self.kernel
        )  # unscaled and without positions; those are added when decoding
        # KOSMOS-2's published code drops them twice.
        self.embed_drop = nn.Dropout(1 - (1 - c.dropout) ** 2 if c.positions == "sinusoid" else c.dropout)
        self.layers = Block(c, self.kernel)
        if c.gated is not None:
            self.cross_layers = GatedCrossAttention(c.gated, self.kernel)
        self.final_norm = make_norm(c.norm, c.norm_epsilon) if c.final_norm else lambda x: x
        if c.embed_norm:
            self.embed_norm = make_norm(c.norm, c.norm_epsilon)
        if c.positions == "learned":  # the first two rows are for padding (fairseq, OPT)
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed"))
            self.positions = self.param("positions", init, (c.max_positions + 2, c.width))
        if c.positions == "relative":
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "heads"))
            self.relative = self.param("relative", init, (c.relative_buckets, c.num_heads))
        if c.head != "tied":
            shape, axes, bias = (c.width, c.vocab_size), ("embed", "vocab"), c.head == "linear_bias"
            self.head = Einsum("...D,DV->...V", shape, axes, use_bias=bias, kernel=self.kernel)

    def __call__(
        self, tokens: Tokens, cache: Cache | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, Cache | None]:
        """Decode, behind what is in the cache where there is one.

        Args:
          tokens: embeds as `embed` gives them, their type is the type of computation; a `group` only without a cache.
            Without `offsets` they are those of the last token in the cache, zero without one. Without `media` the
            cache's are attended to, if it has any.
        Returns:
          float[B, S, D] after the final norm (before it with `norm_in_head`), and with a cache the same of these tokens
          alone, S slots to be appended to it or put where the caller wants them, and their own media.
        """
        c, length = self.config, tokens.mask.shape[1]
        more = spare(length, tokens.embeds.dtype) if cache is None else 0
        if more:
            tokens = tokens.map_slots(lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2))))
        mask, positions = tokens.mask, tokens.positions
        offsets = tokens.offsets
        if offsets is None:
            offsets = 0 if cache is None else cache.last_offset()[:, None, None]
        places = jnp.broadcast_to(positions[..., None] + offsets, (*positions.shape, len(c.mrope_sections) or 1))
        x = self._enter(tokens.embeds, places[..., 0], deterministic=deterministic)
        near, everywhere, key_places = self._visible(positions, places[..., 0], mask, cache, tokens.group)
        local, angles = self._angles(places)
        bias = self._bias(places[..., 0], key_places)

        def step(block, x, layer):
            number, cached = layer
            attend, turn = everywhere, angles
            if c.sliding_window is not None:
                is_sliding = (number + 1) % c.sliding_period != 0
                attend, turn = jax.tree.map(functools.partial(jnp.where, is_sliding), (near, local), (attend, turn))
            x, new = block(x, mask=attend, bias=bias, rotary=turn, cache=cached, deterministic=deterministic)
            return x if tokens.deep is None else x + _of_layer(tokens.deep, number).astype(x.dtype), new

        number, cached = jnp.arange(c.depth), None if cache is None else (cache.key, cache.value)
        x, new, media = self._layers(step, x, (number, cached), tokens, None if cache is None else cache.media)
        if new is not None:
            new = Cache(*new, positions, mask, places[..., 0], jnp.int32(positions.shape[1]), media)
        x = x[:, :length]
        return x if c.norm_in_head else self.final_norm(x), new

    def _visible(
        self, positions: jax.Array, places: jax.Array, mask: jax.Array, cache: Cache | None, group: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Who may attend whom in sliding layers and in the others, bool[B, S, T]; and int32[B, T], places of the keys,
        those in the cache first."""
        keys, key_places, key_mask = positions, places, mask
        if cache is not None:
            assert group is None, "a cache keeps no groups: decode private tokens apart and drop them afterwards"
            keys = jnp.concatenate([cache.positions, keys], axis=1)
            key_places = jnp.concatenate([cache.places, key_places], axis=1)
            key_mask = jnp.concatenate([cache.mask, key_mask], axis=1)
        everywhere = near = causal_mask(positions, keys, key_mask, group)
        if self.config.sliding_window is not None:
            near = places[:, :, None] - key_places[:, None, :] < self.config.sliding_window
            if self.config.window_over_blocks:
                near |= positions[:, :, None] == keys[:, None, :]
            near &= everywhere
        return near, everywhere, key_places

    def _bias(self, places: jax.Array, key_places: jax.Array) -> jax.Array | None:
        """What is added to attention scores: float32[B, N, S or 1, T]."""
        c = self.config
        if c.positions == "alibi":  # counted from the first token instead of from the query: softmax sees no difference
            return alibi_slopes(c.num_heads)[:, None, None] * key_places[:, None, None, :].astype(jnp.float32)
        if c.positions != "relative":
            return None
        distance = key_places[:, None, :] - places[:, :, None]
        bucket = relative_buckets(distance, c.relative_buckets, c.relative_distance, both=c.relative_both)
        return jnp.moveaxis(jnp.take(self.relative, bucket, axis=0), -1, 1).astype(jnp.float32)

    def _angles(self, places: jax.Array) -> tuple[Rotary | None, Rotary | None]:
        """What turns queries and keys in sliding layers, and in the others."""
        c = self.config
        if c.positions != "rotary":
            return None, None
        turn = functools.partial(rotary, channels=c.rotary_channels, sections=c.mrope_sections)
        far = turn(places / c.rope_factor, theta=c.rope_theta, interleaved=c.mrope_interleaved)
        return (far if c.local_rope_theta is None else turn(places, theta=c.local_rope_theta)), far

    def _layers(
        self, step: Step, x: jax.Array, layers: Any, tokens: Tokens, known: Media | None
    ) -> tuple[jax.Array, Any, Media | None]:
        """All layers: float[B, S, D], what `step` gives of each, and the tokens' own media as keys and values.

        known: media of an earlier call, which tokens without their own attend to.
        """
        c, media = self.config, known if tokens.media is None else tokens.media
        if c.gated is None and not c.cross:
            return *scan_layers(step, self.layers, x, layers, length=c.depth, remat=self.remat), None
        if media is None:
            raise ValueError("this decoder attends to media, and has got none: `Tokens.media`, or those of a cache.")
        may = media.may_attend(tokens.sees)
        if c.cross:

            def look(block: nn.Module, x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
                layer, keys = layer
                seeing = functools.partial(block, media=media.embeds if keys is None else keys, sees=may)
                return step(seeing, x, layer)

            x, (new, keys) = scan_layers(look, self.layers, x, (layers, media.keys), length=c.depth, remat=self.remat)
            return x, new, None if tokens.media is None else media.replace(embeds=None, keys=keys)
        steps = step, lambda block, x, keys: block(x, media.embeds, keys, may)
        sizes = {"length": c.depth, "every": c.gated.every, "remat": self.remat}
        x, (new, keys) = scan_groups(steps, (self.layers, self.cross_layers), x, (layers, media.keys), **sizes)
        return x, new, None if tokens.media is None else media.replace(embeds=None, keys=keys)

    def _enter(self, embeds: jax.Array, places: jax.Array, *, deterministic: bool) -> jax.Array:
        """Embeddings as the first layer reads them: scaled, with positions where these are added, dropped."""
        c = self.config
        # Sum in float32: in bfloat16 the sinusoids would vanish beside the scaled embeddings.
        x = embeds.astype(jnp.float32) * (math.sqrt(c.width) if c.embed_scale else 1.0)
        if c.positions == "sinusoid":
            x += sinusoid(places, c.width)
        if c.positions == "learned":
            x += jnp.take(self.positions, places + 2, axis=0)
        if c.embed_norm:
            x = self.embed_norm(x)
        return self.embed_drop(x.astype(embeds.dtype), deterministic=deterministic)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float[..., D] -> float32[..., V]."""
        c = self.config
        hidden = self.final_norm(hidden) if c.norm_in_head else hidden
        hidden = hidden * c.width**-0.5 if c.head_scale else hidden
        x = self.embed.logits(hidden) if c.head == "tied" else self.head(hidden).astype(jnp.float32)
        return x if c.logit_softcap is None else c.logit_softcap * jnp.tanh(x / c.logit_softcap)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of `length` slots."""
        c = self.config
        return Cache.create(c.depth, batch, length, c.kv_heads, c.head_dim, dtype)
