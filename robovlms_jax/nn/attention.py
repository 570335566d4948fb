"""Attention for every tower and connector, its masks, and the key-value cache."""

from __future__ import annotations

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from robovlms_jax.nn.linear import Einsum, Lora
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.positions import Rotary, rotate


def causal_mask(
    query_positions: jax.Array, key_positions: jax.Array, key_mask: jax.Array, group: jax.Array | None = None
) -> jax.Array:
    """Who may attend whom, by position instead of by slot: a key that is real and not later than the query.

    Tokens of one position see each other, so a block of equal positions is attended in both directions.

    Args:
      query_positions: int32[B, S]. key_positions: int32[B, T]. key_mask: bool[B, T], True = real token.
      group: int32[B, S], of queries that are the keys, too: a key of a group > 0 is for queries of that group alone.
    Returns:
      bool[B, S, T], True = may attend.
    """
    attend = (key_positions[:, None, :] <= query_positions[:, :, None]) & key_mask[:, None, :]
    if group is not None:
        attend &= (group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None])
    return attend


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens a decoder has seen, in the slots they came in.

    key, value: float[L, B, T, K, H].
    positions: int32[B, T]. mask: bool[B, T], True = real token; unwritten slots are False.
    places: int32[B, T], where position encodings put the tokens (`positions` unless the tokens say otherwise).
    length: int32[], slots written. Decoding more than T slots in all overwrites the last ones: make T the longest use.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    mask: jax.Array
    places: jax.Array
    length: jax.Array

    @classmethod
    def create(cls, layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of `length` slots."""
        shape = (layers, batch, length, heads, head_dim)
        positions, mask = jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, length), bool)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, mask, positions, jnp.int32(0))

    def last_offset(self) -> jax.Array:
        """int32[B]: how far position encodings stand from positions at the last token; 0 when there is none."""
        last = jnp.argmax(jnp.where(self.mask, self.positions, -1), axis=1, keepdims=True)
        offset = jnp.take_along_axis(self.places - self.positions, last, axis=1)[:, 0]
        return jnp.where(self.mask.any(1), offset, 0)

    def extend(self, positions: jax.Array, mask: jax.Array, places: jax.Array | None = None) -> Cache:
        """Note the next tokens, int32[B, S] and bool[B, S]; layers write their keys and values at the old `length`.

        places: int32[B, S]; None = `positions`.
        """
        places = positions if places is None else places
        if positions.shape[1] > self.mask.shape[1]:
            raise ValueError(
                f"{positions.shape[1]} tokens do not fit a cache of {self.mask.shape[1]} slots; make it longer."
            )
        start = (0, self.length)
        return self.replace(
            positions=jax.lax.dynamic_update_slice(self.positions, positions, start),
            mask=jax.lax.dynamic_update_slice(self.mask, mask, start),
            places=jax.lax.dynamic_update_slice(self.places, places, start),
            length=self.length + positions.shape[1],
        )


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), softmax in float32.

    With fewer `num_kv_heads` than `num_heads`, each key/value head serves a group of neighbouring query heads
    (grouped-query, Ainslie et al. 2023). `inner_norm_epsilon` puts a LayerNorm over all heads before the output
    projection (sub-LN, arXiv:2210.06423). `softcap` bends scores into (-softcap, softcap) before they are masked
    (Gemma 2, arXiv:2408.00118).
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    use_bias: bool = True
    use_output_bias: bool | None = None
    """Bias of the output projection; None = `use_bias`."""
    scale: float | None = None
    """Queries are multiplied by it; None = head_dim ** -0.5."""
    softcap: float | None = None
    inner_norm_epsilon: float | None = None
    dropout: float = 0.0
    lora: Lora = Lora()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        values: jax.Array | None = None,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        rotary: Rotary | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        start: jax.Array | int = 0,
        deterministic: bool = True,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attend from `x` to `context`.

        Args:
          x: float[B, S, D].
          context: float[B, T, any width]; None = `x`.
          values: what values are projected from, same shape as `context`; None = `context`.
          mask: bool[B, S, T], True = may attend; None = all. A row without any True averages all values: finite, and
            meaningless.
          bias: float32[B or 1, N, S or 1, T], added to the scores.
          rotary: angles of the tokens of `x`; turns queries and keys, for attention within `x`.
          cache: this layer's keys and values float[B, T, K, H] from earlier calls. The new ones are written at slot
            `start`, and `mask` speaks about all its slots.
        Returns:
          float[B, S, D] and the cache with the new keys and values (None without).
        """
        context = x if context is None else context
        heads, size, width = self.num_heads, self.head_dim, x.shape[-1]
        kv_heads = self.num_kv_heads or heads
        # Few key/value heads stay whole on every device; as many as query heads are split like them.
        kv_axis = "heads" if kv_heads == heads else "kv_heads"

        def project(name: str, inputs: jax.Array, count: int, axis: str) -> jax.Array:
            shape, axes = (inputs.shape[-1], count, size), ("embed", axis, "head_dim")
            return Einsum("BSD,DNH->BSNH", shape, axes, use_bias=self.use_bias, lora=self.lora, name=name)(inputs)

        q = project("q", x, heads, "heads") * (size**-0.5 if self.scale is None else self.scale)
        k = project("k", context, kv_heads, kv_axis)
        v = project("v", context if values is None else values, kv_heads, kv_axis)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, start, 0, 0))
                for old, new in zip(cache, (k, v))
            )
            cache = (k, v)
        chex.assert_equal_shape([k, v])

        batch, length = x.shape[:2]
        q = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
        scores = jnp.einsum("BSKNH,BTKH->BKNST", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        if bias is not None:
            scores += bias.reshape(bias.shape[0], kv_heads, heads // kv_heads, *bias.shape[2:])
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        y = jnp.einsum("BKNST,BTKH->BSKNH", weights, v.astype(x.dtype)).reshape(batch, length, heads, size)

        if self.inner_norm_epsilon is not None:
            norm = LayerNorm(self.inner_norm_epsilon, name="inner_norm")
            y = norm(y.reshape(batch, length, heads * size)).reshape(y.shape)
        shape, axes = (heads, size, width), ("heads", "head_dim", "embed")
        use_bias = self.use_bias if self.use_output_bias is None else self.use_output_bias
        y = Einsum("BSNH,NHD->BSD", shape, axes, use_bias=use_bias, lora=self.lora, name="o")(y)
        return y, cache
