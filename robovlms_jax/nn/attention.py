"""Attention for every tower and connector, its masks, and the key-value cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.nn import attended
from robovlms_jax.nn.attended import Dropout
from robovlms_jax.nn.linear import AttentionKernel, Einsum, Kernel
from robovlms_jax.nn.norms import LayerNorm, NormKind, make_norm
from robovlms_jax.nn.positions import Rotary, rotate
from robovlms_jax.types import Media


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

    key, value: float[L, B, K, T, H], as attention multiplies them.
    positions: int32[B, T]. mask: bool[B, T], True = real token; unwritten slots are False.
    places: int32[B, T], where position encodings put the tokens (`positions` unless the tokens say otherwise).
    length: int32[], slots written. Appending more than T slots in all overwrites the last ones: make T the longest use.
    media: what tokens to come attend to beside the sequence, as keys and values; None: nothing, or it comes with them.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    mask: jax.Array
    places: jax.Array
    length: jax.Array
    media: Media | None = None

    @classmethod
    def create(cls, layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of `length` slots."""
        shape = (layers, batch, heads, length, head_dim)
        positions, mask = jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, length), bool)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, mask, positions, jnp.int32(0))

    def last_offset(self) -> jax.Array:
        """int32[B]: how far position encodings stand from positions at the last token; 0 when there is none."""
        if not self.mask.shape[1]:
            return jnp.zeros(len(self.mask), jnp.int32)
        last = jnp.argmax(jnp.where(self.mask, self.positions, -1), axis=1, keepdims=True)
        offset = jnp.take_along_axis(self.places - self.positions, last, axis=1)[:, 0]
        return jnp.where(self.mask.any(1), offset, 0)

    def append(self, new: Cache) -> Cache:
        """With all slots of `new` behind those written, and its media where it has any."""
        if new.mask.shape[1] > self.mask.shape[1]:
            raise ValueError(
                f"{new.mask.shape[1]} tokens do not fit a cache of {self.mask.shape[1]} slots; make it longer."
            )
        media = self.media if new.media is None else new.media
        return self.put(new, self.length).replace(length=self.length + new.mask.shape[1], media=media)

    def put(self, new: Cache, start: jax.Array) -> Cache:
        """With the slots of `new` in place of those from `start` on, int32[] or int32[B]; `length` stays."""

        def write(old: jax.Array, new: jax.Array, batch: int, slots: int) -> jax.Array:
            if start.ndim == 0:
                return jax.lax.dynamic_update_slice_in_dim(old, new, start, slots)
            # A row has no axis of the batch.
            each = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=slots - 1)
            return jax.vmap(each, in_axes=(batch, batch, 0), out_axes=batch)(old, new, start)

        return self.map(write, new)

    def take(self, start: jax.Array, size: int) -> Cache:
        """The `size` slots from `start` on, int32[] or int32[B]."""

        def read(old: jax.Array, batch: int, slots: int) -> jax.Array:
            if start.ndim == 0:
                return jax.lax.dynamic_slice_in_dim(old, start, size, slots)
            each = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=slots - 1)
            return jax.vmap(each, in_axes=(batch, 0), out_axes=batch)(old, start)

        return self.map(read).replace(length=jnp.int32(size))

    def select(self, rows: jax.Array, other: Cache) -> Cache:
        """These slots where bool[B] `rows`, those of `other` elsewhere."""

        def choose(x: jax.Array, y: jax.Array, batch: int, slots: int) -> jax.Array:
            return jnp.where(jnp.expand_dims(rows, [axis for axis in range(x.ndim) if axis != batch]), x, y)

        return self.map(choose, other)

    def map(self, function: Callable[..., jax.Array], *others: Cache) -> Cache:
        """function(array, the others' arrays..., axis of the batch, axis of the slots) on everything that has slots."""
        axes = {"key": (1, 3), "value": (1, 3), "positions": (0, 1), "mask": (0, 1), "places": (0, 1)}
        return self.replace(
            **{name: function(*(getattr(x, name) for x in (self, *others)), *where) for name, where in axes.items()}
        )


def attend(
    q: jax.Array,
    kv_blocks: Sequence[tuple[jax.Array, jax.Array]],
    mask: jax.Array | int | None = None,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    drop: Dropout | None = None,
    kernel: AttentionKernel = "xla",
) -> jax.Array:
    """Softmax attention over keys that lie in several arrays.

    They are never put into one, which would move all that is kept from earlier calls, in every layer. Sums are divided
    by the weights' total at the end, when they are small (as in FlashAttention, arXiv:2205.14135). In sixteen bits
    keys of one array have a gradient of their own, `nn.attended`.

    Args:
      q: float[B, S, N, H], scaled.
      kv_blocks: keys and values float[B, K, T_i, H]; N / K neighbouring heads share a key.
      mask: bool[B, S, T], T the sum of all T_i; or of keys of one array, how many are no padding. bias: float32[B or 1,
        N, S or 1, T].
      drop: dropout of weights; None: none.
      kernel: what computes it in sixteen bits, see `nn.attended.by`.
    Returns:
      float[B, S, N, H] in the type of q.
    """
    shape, kv_heads = q.shape, kv_blocks[0][0].shape[1]
    plain = softcap is None and bias is None and len(kv_blocks) == 1 and jnp.dtype(q.dtype).itemsize == 2
    if plain and drop is None and attended.by(kernel, shape):
        return attended.fused(q, *(x.astype(q.dtype) for x in kv_blocks[0]), mask)
    q = jnp.swapaxes(q, 1, 2).reshape(shape[0], kv_heads, shape[2] // kv_heads, shape[1], shape[3])
    if plain:
        keys, values = (x.astype(q.dtype) for x in kv_blocks[0])
        return jnp.moveaxis(attended.attended(q, keys, values, mask, drop), 3, 1).reshape(shape)
    if isinstance(mask, int):
        columns = kv_blocks[0][0].shape[2]
        mask = jnp.broadcast_to(jnp.arange(columns) < mask, (1, shape[1], columns))
    splits = np.cumsum([keys.shape[2] for keys, _ in kv_blocks])[:-1]
    # Products in the order that the sums are wanted in: einsum would hand them over transposed.
    axes = (((4,), (3,)), ((0, 1), (0, 1)))
    scores = [jax.lax.dot_general(q, x.astype(q.dtype), axes, preferred_element_type=jnp.float32) for x, _ in kv_blocks]
    if softcap is not None:
        scores = [softcap * jnp.tanh(x / softcap) for x in scores]
    if bias is not None:
        bias = bias.reshape(bias.shape[0], *q.shape[1:3], *bias.shape[2:])
        scores = [x + part for x, part in zip(scores, jnp.split(bias, splits, axis=-1))]
    if mask is not None:
        parts = jnp.split(mask[:, None, None], splits, axis=-1)
        scores = [jnp.where(part, x, jnp.finfo(x.dtype).min) for x, part in zip(scores, parts)]
    largest = functools.reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in scores if x.shape[-1]))
    weights = [jnp.exp(x - jax.lax.stop_gradient(largest)) for x in scores]
    total = functools.reduce(jnp.add, (x.sum(-1, keepdims=True) for x in weights))
    if drop is not None:
        keys = jax.random.split(drop.key, len(weights))
        weights = [Dropout(drop.rate, key)(x) for x, key in zip(weights, keys)]
    sums = (
        jax.lax.dot_general(x.astype(q.dtype), values.astype(q.dtype), (((4,), (2,)), ((0, 1), (0, 1))))
        for x, (_, values) in zip(weights, kv_blocks)
    )
    y = (functools.reduce(jnp.add, sums) / total).astype(q.dtype)
    return jnp.moveaxis(y, 3, 1).reshape(shape)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), softmax in float32.

    With fewer `num_kv_heads` than `num_heads`, each key/value head serves a group of neighbouring query heads
    (grouped-query, Ainslie et al. 2023). `inner_norm_epsilon` puts a LayerNorm over all heads before the output
    projection (sub-LN, arXiv:2210.06423). `softcap` bends scores into (-softcap, softcap) before they are masked
    (Gemma 2, arXiv:2408.00118).
    `head_norm`, a kind of norm and its epsilon, is put on the channels of every query and key head (Qwen 3, Gemma 3).
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
    head_norm: tuple[NormKind, float] | None = None
    norm_all_heads: bool = False
    """`head_norm` goes over the channels of all heads at once, before they are split (MPT-1B)."""
    dropout: float = 0.0
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | tuple[jax.Array, jax.Array] | None = None,
        *,
        values: jax.Array | None = None,
        mask: jax.Array | int | None = None,
        bias: jax.Array | None = None,
        rotary: Rotary | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attend from `x` to `context`.

        Args:
          x: float[B, S, D].
          context: float[B, T, any width]; or keys and values float[B, K, T, H] that an earlier call made of it; None =
            `x`.
          values: what values are projected from, same shape as `context`; None = `context`.
          mask: bool[B, S, T], True = may attend; a number: so many slots of `context`, the first ones, are no padding;
            None = all. A row without any True averages all values: finite, and meaningless.
          bias: float32[B or 1, N, S or 1, T], added to the scores.
          rotary: angles of the tokens of `x`; turns queries and keys, for attention within `x`.
          cache: this layer's keys and values float[B, K, T, H] from earlier calls, to be attended to beside the new
            ones; `mask` and `bias` speak about its T slots and then about the S new ones.
        Returns:
          float[B, S, D] and, with a cache or a context, the new keys and values float[B, K, S or T, H], in the type of
          the cache.
        """
        heads, size, width = self.num_heads, self.head_dim, x.shape[-1]
        scale = size**-0.5 if self.scale is None else self.scale
        if self.kernel.joint and context is None and values is None:
            q, k, v = self._project_jointly(x, rotary)
        else:
            q = self._shape("q", self._project("q", x), rotary)
            if not isinstance(context, tuple):
                source = x if context is None else context
                k = self._shape("k", self._project("k", source), rotary)
                v = self._project("v", source if values is None else values)
        q = q * scale
        if isinstance(context, tuple):
            k, v = context
        else:
            chex.assert_equal_shape([k, v])
            k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        if cache is not None:
            k, v = k.astype(cache[0].dtype), v.astype(cache[1].dtype)
        kv_blocks = [(k, v)] if cache is None else [cache, (k, v)]
        drop = Dropout(self.dropout, self.make_rng("dropout")) if self.dropout and not deterministic else None
        y = attend(q, kv_blocks, mask, bias, self.softcap, drop, self.kernel.attention)

        if self.inner_norm_epsilon is not None:
            norm = LayerNorm(self.inner_norm_epsilon, name="inner_norm")
            y = norm(y.reshape(*x.shape[:2], heads * size)).reshape(y.shape)
        shape, axes = (heads, size, width), ("heads", "head_dim", "embed")
        use_bias = self.use_bias if self.use_output_bias is None else self.use_output_bias
        y = Einsum("BSNH,NHD->BSD", shape, axes, use_bias=use_bias, kernel=self.kernel, name="o")(y)
        is_new = cache is not None or not (context is None or isinstance(context, tuple))
        return y, (k, v) if is_new else None

    def _project(self, name: str, x: jax.Array) -> jax.Array:
        """Queries, keys ("k") or values of float[B, S, any width]: float[B, S, N or K, H]."""
        heads, axis = self.num_heads, "heads"
        if name != "q" and self.num_kv_heads not in (None, heads):
            # Few key/value heads stay whole on every device; as many as query heads are split like them.
            heads, axis = self.num_kv_heads, "kv_heads"
        shape, axes = (x.shape[-1], heads, self.head_dim), ("embed", axis, "head_dim")
        return Einsum("BSD,DNH->BSNH", shape, axes, use_bias=self.use_bias, kernel=self.kernel, name=name)(x)

    def _project_jointly(self, x: jax.Array, rotary: Rotary | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of the same tokens by one product, normed and turned."""
        heads, kv_heads = self.num_heads, self.num_kv_heads or self.num_heads
        shape, axes = (x.shape[-1], heads + 2 * kv_heads, self.head_dim), ("embed", None, "head_dim")
        y = Einsum("BSD,DNH->BSNH", shape, axes, use_bias=self.use_bias, kernel=self.kernel, name=JOINT)(x)
        q, k, v = jnp.split(y, (heads, heads + kv_heads), axis=2)
        return self._shape("q", q, rotary), self._shape("k", k, rotary), v

    def _shape(self, name: str, y: jax.Array, rotary: Rotary | None) -> jax.Array:
        """Queries or keys ("k") normed and turned."""
        if self.head_norm is not None:
            norm = make_norm(*self.head_norm, name=f"{name}_norm")
            y = norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape) if self.norm_all_heads else norm(y)
        return y if rotary is None else rotate(y, rotary)


JOINT = "qkv"
"""Name of the matrix that makes queries, keys and values together, and of its bias and scale."""


def joint(params: Mapping[str, Any], shapes: Mapping[str, Any], *, take: bool = False) -> dict[str, Any]:
    """Parameters with queries', keys' and values' matrices behind each other wherever `shapes` (nested, of the model
    with `Kernel.joint`) has them so: one product of a few hundred tokens keeps a GPU busier than three. Layers are
    stacked or not. take: what was put together is deleted where it was."""
    flat = flatten_dict(dict(params), sep="/")
    for path in flatten_dict(dict(shapes), sep="/"):
        parent, _, name = path.rpartition("/")
        if parent.endswith(f"/{JOINT}"):
            where = parent.removesuffix(JOINT)
            # Of kernel [D, N, H], its scale [1, N, H] and the bias [N, H] alike.
            parts = [flat.pop(f"{where}{part}/{name}") for part in "qkv"]
            flat[path] = jnp.concatenate(parts, axis=-2)
            if take:
                jax.block_until_ready(flat[path])
                for part in parts:
                    part.delete()
    return unflatten_dict(flat, sep="/")
