"""Language decoder: one stack for Magneto (KOSMOS-2), Llama, Qwen, Gemma, Phi, MPT, OPT and BART."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Attention, Cache, causal_mask
from robovlms_jax.nn.gated import GatedConfig, GatedCrossAttention
from robovlms_jax.nn.linear import Einsum, Embed, Kernel
from robovlms_jax.nn.mlp import ACTIVATIONS, MLP
from robovlms_jax.nn.norms import NORMS, NormKind, make_norm
from robovlms_jax.nn.positions import Rotary, alibi_slopes, rotary, sinusoid
from robovlms_jax.nn.stack import Step, scan_groups, scan_layers
from robovlms_jax.types import Media, Tokens


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Size and form of a language decoder. The defaults are Llama's form (Touvron et al. 2023, arXiv:2302.13971)."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    vocab_size: int
    activation: str
    norm_epsilon: float
    num_kv_heads: int | None = None
    """Heads of keys and values; None = num_heads."""
    own_head_dim: int | None = None
    """H where it is not width / num_heads."""
    norm: NormKind = "rms"
    residual: Literal["sequential", "sandwich", "parallel", "post"] = "sequential"
    """sandwich: a second norm on what attention and MLP add (Gemma 2); parallel: both read one norm (Phi); post: norms
    come after the sums (BART)."""
    cross: bool = False
    """Every layer attends to the media beside the sequence, between its attention and its MLP (encoder-decoders)."""
    embed_norm: bool = False
    """A norm on embeddings and positions, before the first layer."""
    final_norm: bool = True
    """A norm behind the last layer."""
    sub_norm: bool = False
    """LayerNorms inside attention and MLP, before their output projections (Magneto, arXiv:2210.06423)."""
    is_gated: bool = True
    """The MLP has a gate."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    mlp_bias: bool = False
    positions: Literal["rotary", "alibi", "sinusoid", "learned"] = "rotary"
    max_positions: int = 0
    """Of learned positions: how many there are; tokens beyond become NaN."""
    rope_theta: float = 10_000.0
    rotary_fraction: float = 1.0
    """Share of each head's channels that is turned."""
    mrope_sections: tuple[int, ...] = ()
    """Frequencies per coordinate (time, height, width) where tokens have several (M-RoPE); empty: one coordinate."""
    mrope_interleaved: bool = False
    """The coordinates take turns from one frequency to the next (Qwen3-VL), instead of one block each."""
    qk_norm: bool = False
    """Every head's queries and keys are normed, in the decoder's kind (Qwen 3, Gemma 3)."""
    norm_all_heads: bool = False
    """That norm goes over all heads' queries at once, and over all heads' keys (MPT-1B)."""
    query_scalar: int | None = None
    """Queries are multiplied by its power -0.5; None = H."""
    softcap: float | None = None
    """Bound of the attention scores (Gemma 2)."""
    logit_softcap: float | None = None
    """Bound of the logits (Gemma 2)."""
    sliding_window: int | None = None
    """Sliding layers see only this many tokens back (Gemma 2 and 3)."""
    sliding_period: int = 2
    """With a sliding window: every so many-th layer sees everything, the others slide."""
    window_over_blocks: bool = True
    """Tokens that see each other in both directions do so in sliding layers, too, however far apart (PaliGemma 2)."""
    local_rope_theta: float | None = None
    """`rope_theta` of sliding layers, whose places are not scaled; None: as in the others."""
    rope_factor: float = 1.0
    """Rotary embeddings read places divided by it (linear scaling)."""
    head: Literal["tied", "linear", "linear_bias"] = "linear"
    """How logits are made: with the token table, or with a matrix (and bias) of their own."""
    norm_in_head: bool = False
    """The final norm belongs to the logits, and hidden states are those before it (MoonDream2's published code)."""
    embed_scale: bool = False
    """Multiply embeddings (of text, images and queries alike) by sqrt(width)."""
    gated: GatedConfig | None = None
    """Layers between the decoder's that attend to the media beside the sequence (Flamingo)."""
    dropout: float = 0.0
    """On embeddings and on what attention and MLP add to the residual stream."""
    attention_dropout: float = 0.0
    """On attention weights."""

    def __post_init__(self):
        # One spelling per architecture, so that equal models have equal configurations.
        if self.num_kv_heads == self.num_heads:
            object.__setattr__(self, "num_kv_heads", None)
        if self.own_head_dim is not None and self.own_head_dim * self.num_heads == self.width:
            object.__setattr__(self, "own_head_dim", None)
        if (self.own_head_dim is None and self.width % self.num_heads) or self.width % 2:
            raise ValueError(f"text width={self.width} must be even and divide over num_heads={self.num_heads}.")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"text num_heads={self.num_heads} must divide over num_kv_heads={self.num_kv_heads}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"text activation {self.activation!r} is unknown; known: {sorted(ACTIVATIONS)}.")
        if self.norm not in NORMS:
            raise ValueError(f"text norm {self.norm!r} is unknown; known: {list(NORMS)}.")
        if self.positions == "rotary" and (self.rotary_channels % 2 or self.rotary_channels < 2):
            raise ValueError(f"rotary_fraction={self.rotary_fraction} of head_dim={self.head_dim} must be even.")
        if self.cross and (self.gated is not None or self.residual == "parallel"):
            raise ValueError(
                "text cross=True attends to media in every layer; gated must be None, residual not parallel."
            )
        if self.gated is not None and self.depth % self.gated.every:
            raise ValueError(f"text depth={self.depth} must be a multiple of gated every={self.gated.every}.")
        if self.mrope_sections and 2 * sum(self.mrope_sections) != self.rotary_channels:
            raise ValueError(
                f"mrope_sections={self.mrope_sections} must add up to {self.rotary_channels // 2}, half of head_dim."
            )

    @property
    def head_dim(self) -> int:
        """H."""
        return self.own_head_dim or self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """K, heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that rotary embeddings turn."""
        return int(self.head_dim * self.rotary_fraction)

    def tiny(self) -> DecoderConfig:
        """A shrunken twin for tests: same switches, sizes that differ from each other so that swapped axes fail."""
        small = {"width": 32, "depth": 3, "mlp_dim": 56, "num_heads": 4, "vocab_size": 128}
        if self.num_kv_heads is not None:
            small["num_kv_heads"] = 1 if self.num_kv_heads == 1 else 2
        if self.own_head_dim is not None:
            small["own_head_dim"] = 12
        if self.query_scalar is not None:
            small["query_scalar"] = 16
        if self.sliding_window is not None:
            small |= {"sliding_window": 8, "sliding_period": min(self.sliding_period, 3)}
        if self.max_positions:
            small["max_positions"] = 300
        if self.mrope_sections:
            small["mrope_sections"] = (1, 1, 2) if self.own_head_dim is None else (1, 2, 3)
        if self.gated is not None:
            small |= {"gated": self.gated.tiny(), "depth": 2 * self.gated.every}
        return dataclasses.replace(self, **small)


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
    remat: bool = False

    def setup(self):
        c = self.config
        self.embed = Embed(
            c.vocab_size, c.width, self.kernel
        )  # unscaled and without positions; those are added when decoding
        # KOSMOS-2's published code drops them twice.
        self.embed_drop = nn.Dropout(c.dropout if c.embed_norm else 1 - (1 - c.dropout) ** 2)
        self.layers = Block(c, self.kernel)
        if c.gated is not None:
            self.cross_layers = GatedCrossAttention(c.gated, self.kernel)
        self.final_norm = make_norm(c.norm, c.norm_epsilon) if c.final_norm else lambda x: x
        if c.embed_norm:
            self.embed_norm = make_norm(c.norm, c.norm_epsilon)
        if c.positions == "learned":  # the first two rows are for padding (fairseq, OPT)
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed"))
            self.positions = self.param("positions", init, (c.max_positions + 2, c.width))
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
        c, mask, positions = self.config, tokens.mask, tokens.positions
        offsets = tokens.offsets
        if offsets is None:
            offsets = 0 if cache is None else cache.last_offset()[:, None, None]
        places = jnp.broadcast_to(positions[..., None] + offsets, (*positions.shape, len(c.mrope_sections) or 1))
        x = self._enter(tokens.embeds, places[..., 0], deterministic=deterministic)
        near, everywhere, key_places = self._visible(positions, places[..., 0], mask, cache, tokens.group)
        local, angles = self._angles(places)
        bias = None
        if c.positions == "alibi":  # counted from the first token instead of from the query: softmax sees no difference
            bias = alibi_slopes(c.num_heads)[:, None, None] * key_places[:, None, None, :].astype(jnp.float32)

        def step(block, x, layer):
            number, kept = layer
            attend, turn = everywhere, angles
            if c.sliding_window is not None:
                is_sliding = (number + 1) % c.sliding_period != 0
                attend, turn = jax.tree.map(functools.partial(jnp.where, is_sliding), (near, local), (attend, turn))
            x, new = block(x, mask=attend, bias=bias, rotary=turn, cache=kept, deterministic=deterministic)
            return x if tokens.deep is None else x + _of_layer(tokens.deep, number).astype(x.dtype), new

        number, kept = jnp.arange(c.depth), None if cache is None else (cache.key, cache.value)
        x, new, media = self._layers(step, x, (number, kept), tokens, None if cache is None else cache.media)
        if new is not None:
            new = Cache(*new, positions, mask, places[..., 0], jnp.int32(positions.shape[1]), media)
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
        x = self.embed.logits(hidden) if c.head == "tied" else self.head(hidden).astype(jnp.float32)
        return x if c.logit_softcap is None else c.logit_softcap * jnp.tanh(x / c.logit_softcap)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of `length` slots."""
        c = self.config
        return Cache.create(c.depth, batch, length, c.kv_heads, c.head_dim, dtype)
