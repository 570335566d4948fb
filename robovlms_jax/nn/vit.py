"""Vision transformer: one pre-norm tower for CLIP, SigLIP, Qwen-VL's, UForm's and Qwen3-VL's."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attended import spare
from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.linear import Einsum, Kernel
from robovlms_jax.nn.mlp import ACTIVATIONS, MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.positions import Rotary, grid_rotary, resize_positions
from robovlms_jax.nn.stack import Remat, scan_layers


class PatchedConfig(Protocol):
    """What `embed_patches` asks of a tower: patches along an edge, their pixels, their frames, channels."""

    side: int
    patch_size: int
    frames: int
    width: int


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Size and form of a vision tower. The defaults are SigLIP's form (Zhai et al. 2023, arXiv:2303.15343)."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    activation: str
    norm_epsilon: float
    cls: Literal["none", "keep", "drop"] = "none"
    """Class token: none; first of the features; or seen by the layers and dropped from the features."""
    cls_position: bool = True
    """The class token has a row of the position table, its first."""
    patch_bias: bool = True
    pre_norm: bool = False
    """A LayerNorm before the first layer (CLIP)."""
    post_norm: bool = True
    """A LayerNorm after the last."""
    unused_layers: int = 0
    """Layers at the end that are parameters of the checkpoint but not run; the features then miss `post_norm` too."""
    layer_scale: bool = False
    """What attention and MLP add is multiplied per channel (Touvron et al. 2021, arXiv:2103.17239)."""
    is_ragged: bool = False
    """The image may be a little larger than its patches; what is over at the right and the bottom is not seen."""
    position_side: int | None = None
    """Side of the stored position table where it is not the image's; it is resized at every pass."""
    position_offset: float = 0.0
    """Sampling points of that resize follow (side + offset) / stored side, DINO's way, unless 0."""
    position_resize: Literal["bicubic", "bilinear"] = "bicubic"
    """Kernel of that resize."""
    grid_rotary: bool = False
    """Attention turns queries and keys by the rows and columns of their patches."""
    frames: int = 1
    """Frames of a patch, where the tower was made for films; a picture is shown as often."""
    taps: tuple[int, ...] = ()
    """Layers whose features are given out beside the last one's (DeepStack, arXiv:2406.04334)."""

    def __post_init__(self):
        if self.position_side == self.image_size // self.patch_size:
            object.__setattr__(self, "position_side", None)  # one spelling per architecture
        if self.image_size % self.patch_size and not self.is_ragged:
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}.")
        if self.width % self.num_heads:
            raise ValueError(f"vision width={self.width} does not divide over num_heads={self.num_heads}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"vision activation {self.activation!r} is unknown; known: {sorted(ACTIVATIONS)}.")

    @property
    def side(self) -> int:
        """Patches along an edge of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Features per image: patches, and the class token where it is kept."""
        return self.side**2 + (self.cls == "keep")

    def build(self, kernel: Kernel, remat: Remat) -> nn.Module:
        """The module."""
        return ViT(self, kernel, remat)

    def tiny(self) -> ViTConfig:
        """A shrunken twin for tests: same switches, sizes that differ from each other so that swapped axes fail."""
        small = {"image_size": 28, "patch_size": 14, "width": 24, "depth": 2, "mlp_dim": 40, "num_heads": 3}
        if self.position_side is not None:
            small |= {"image_size": 42, "position_side": 2}
        return dataclasses.replace(self, **small)


def embed_patches(images: jax.Array, config: PatchedConfig, kernel: Kernel, *, use_bias: bool) -> jax.Array:
    """float[B, size, size, 3] -> float[B, side * side, D], in a matrix named `patch` of the calling module.

    A convolution whose stride is its size is a matrix product.
    """
    c, patch = config, config.patch_size
    seen = c.side * patch
    x = images[:, :seen, :seen].reshape(-1, c.side, patch, c.side, patch, 3)
    shape, axes, equation = (patch, patch, 3, c.width), ("patch", None, None, "embed"), "BUXVYC,XYCD->BUVD"
    if c.frames > 1:
        shape, axes, equation = (c.frames, *shape), (None, *axes), "BTUXVYC,TXYCD->BUVD"
        x = jnp.broadcast_to(x[:, None], (len(x), c.frames, *x.shape[1:]))
    x = Einsum(equation, shape, axes, use_bias=use_bias, kernel=kernel.as_float(), name="patch")(x)
    return x.reshape(-1, c.side**2, c.width)


class Block(nn.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ViTConfig
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array, rotary: Rotary | None = None, length: int | None = None) -> jax.Array:
        """float[B, P, D] -> float[B, P, D]. length: so many of the P are no padding; None: all."""
        c = self.config

        def scaled(name: str, y: jax.Array) -> jax.Array:
            if not c.layer_scale:
                return y
            init = nn.with_logical_partitioning(nn.initializers.constant(1e-5), ("norm",))
            return y * self.param(name, init, (c.width,)).astype(y.dtype)

        attention = Attention(c.num_heads, c.width // c.num_heads, kernel=self.kernel, name="attn")
        y = LayerNorm(c.norm_epsilon, name="attn_norm")(x)
        x = x + scaled("attn_scale", attention(y, rotary=rotary, mask=length)[0])
        mlp = MLP(c.mlp_dim, c.activation, kernel=self.kernel, name="mlp")
        return x + scaled("mlp_scale", mlp(LayerNorm(c.norm_epsilon, name="mlp_norm")(x)))


class ViT(nn.Module):
    """Normalised images to token features."""

    config: ViTConfig
    kernel: Kernel = Kernel()
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float[B, size, size, 3] -> float[B, P, D]: class token if kept, then patches row by row. The type stays.

        With taps float[1 + taps, B, P, D], the last layer's features first.
        """
        c = self.config
        chex.assert_shape(images, (None, c.image_size, c.image_size, 3))
        x = self._place(embed_patches(images, c, self.kernel, use_bias=c.patch_bias))
        rotary = grid_rotary(c.side, c.width // c.num_heads) if c.grid_rotary else None
        if c.pre_norm:
            x = LayerNorm(c.norm_epsilon, name="pre_norm")(x)

        block = Block(c, self.kernel, name="layers")
        tokens, more = x.shape[1], spare(x.shape[1], x.dtype)
        x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
        if more and rotary is not None:
            rotary = jax.tree.map(
                lambda angle: jnp.pad(angle, ((0, 0), (0, more), *[(0, 0)] * (angle.ndim - 2))), rotary
            )

        def step(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array | None]:
            x = block(x, rotary, tokens if more else None)
            return x, x if c.taps else None

        x, every = scan_layers(step, block, x, length=c.depth, unused=c.unused_layers, remat=self.remat)
        if c.post_norm:
            normed = LayerNorm(c.norm_epsilon, name="post_norm")(x)
            x = x if c.unused_layers else normed
        if c.taps:
            x = jnp.concatenate([x[None], every[jnp.asarray(c.taps)]])
        return x[..., 1:tokens, :] if c.cls == "drop" else x[..., :tokens, :]

    def _place(self, x: jax.Array) -> jax.Array:
        """Patches float[B, P, D] with their positions, after the class token."""
        c = self.config
        init = nn.initializers.normal(c.width**-0.5)
        before = int(c.cls != "none" and c.cls_position)
        rows = (c.position_side or c.side) ** 2 + before
        table = nn.with_logical_partitioning(init, ("position", "embed"))
        table = self.param("positions", table, (rows, c.width))
        if c.position_side is not None:
            scale = (c.side + c.position_offset) / c.position_side
            patches = resize_positions(table[before:], c.side, scale=scale, method=c.position_resize)
            table = jnp.concatenate([table[:before], patches])
        table = table.astype(x.dtype)
        x = x + table[before:]
        if c.cls == "none":
            return x
        cls = self.param("cls", nn.with_logical_partitioning(init, ("embed",)), (c.width,)).astype(x.dtype)
        cls = cls + table[0] if c.cls_position else cls
        return jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, c.width)), x], axis=1)
