"""Vision transformer: CLIP's form (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Attention
from robovlms_jax.nn.linear import Einsum, Lora
from robovlms_jax.nn.mlp import ACTIVATIONS, MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.stack import scan_layers


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Size of a vision tower."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    activation: str
    norm_epsilon: float

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}.")
        if self.width % self.num_heads:
            raise ValueError(f"vision width={self.width} does not divide over num_heads={self.num_heads}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"vision activation {self.activation!r} is unknown; known: {sorted(ACTIVATIONS)}.")

    @property
    def num_tokens(self) -> int:
        """Patches plus the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def tiny(self) -> ViTConfig:
        """A shrunken twin for tests: same switches, sizes that differ from each other so that swapped axes fail."""
        return dataclasses.replace(self, image_size=28, patch_size=14, width=24, depth=2, mlp_dim=40, num_heads=3)


class Block(nn.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ViTConfig
    lora: Lora = Lora()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, P, D] -> float[B, P, D]."""
        c = self.config
        attention = Attention(c.num_heads, c.width // c.num_heads, lora=self.lora, name="attn")
        x = x + attention(LayerNorm(c.norm_epsilon, name="attn_norm")(x))[0]
        return x + MLP(c.mlp_dim, c.activation, lora=self.lora, name="mlp")(
            LayerNorm(c.norm_epsilon, name="mlp_norm")(x)
        )


class ViT(nn.Module):
    """Normalised images to token features, all of them through the final norm."""

    config: ViTConfig
    lora: Lora = Lora()
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float[B, size, size, 3] -> float[B, P, D]: class token, then patches row by row. The type stays."""
        c = self.config
        chex.assert_shape(images, (None, c.image_size, c.image_size, 3))
        side = c.image_size // c.patch_size
        x = images.reshape(-1, side, c.patch_size, side, c.patch_size, 3)
        # A convolution whose stride is its size is a matrix product.
        shape, axes = (c.patch_size, c.patch_size, 3, c.width), ("patch", None, None, "embed")
        x = Einsum("BUXVYC,XYCD->BUVD", shape, axes, lora=self.lora, name="patch")(x)
        x = x.reshape(-1, side * side, c.width)

        init = nn.initializers.normal(c.width**-0.5)
        cls = self.param("cls", nn.with_logical_partitioning(init, ("embed",)), (c.width,))
        positions = self.param(
            "positions", nn.with_logical_partitioning(init, ("position", "embed")), (c.num_tokens, c.width)
        )
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, c.width)), x], axis=1)
        x = LayerNorm(c.norm_epsilon, name="pre_norm")(x + positions.astype(x.dtype))

        block = Block(c, self.lora, name="layers")
        x, _ = scan_layers(lambda block, x, _: (block(x), None), block, x, length=c.depth, remat=self.remat)
        return LayerNorm(c.norm_epsilon, name="post_norm")(x)
