"""DaViT (Ding et al. 2022, arXiv:2204.03645): attention over windows of patches and over channels, in turns."""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from robovlms_jax.nn.attention import Attention, attend
from robovlms_jax.nn.linear import Einsum, Kernel
from robovlms_jax.nn.mlp import ACTIVATIONS, MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.nn.stack import Remat, scan_layers


@dataclasses.dataclass(frozen=True)
class DaViTConfig:
    """Size and form; tuples have an entry per stage. The defaults are Florence-2-base's."""

    image_size: int = 768
    depths: tuple[int, ...] = (1, 1, 9, 1)
    """Pairs of layers: one over windows, one over channels."""
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    num_groups: tuple[int, ...] = (4, 8, 16, 32)
    """Groups of channels, which attend to those of their own group alone."""
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    """Edge of what one patch sees of the stage before."""
    strides: tuple[int, ...] = (4, 2, 2, 2)
    paddings: tuple[int, ...] = (3, 1, 1, 1)
    prenorms: tuple[bool, ...] = (False, True, True, True)
    """The norm of the patches comes before the convolution that makes them."""
    window: int = 12
    """Edge of a window, in patches."""
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        for field in ("num_heads", "num_groups", "patch_sizes", "strides", "paddings", "prenorms", "depths"):
            if len(getattr(self, field)) != len(self.widths):
                raise ValueError(
                    f"vision {field}={getattr(self, field)} needs one entry per stage, {len(self.widths)}."
                )
        for field in ("num_heads", "num_groups"):
            if any(width % count for width, count in zip(self.widths, getattr(self, field), strict=True)):
                raise ValueError(f"vision widths={self.widths} do not divide over {field}={getattr(self, field)}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"vision activation {self.activation!r} is unknown; known: {sorted(ACTIVATIONS)}.")

    @property
    def width(self) -> int:
        """Of the features."""
        return self.widths[-1]

    @property
    def side(self) -> int:
        """Patches along an edge of the last stage."""
        side = self.image_size
        for size, stride, padding in zip(self.patch_sizes, self.strides, self.paddings, strict=True):
            side = (side + 2 * padding - size) // stride + 1
        return side

    def build(self, kernel: Kernel, remat: Remat) -> nn.Module:
        """The module."""
        return DaViT(self, kernel, remat)

    def tiny(self) -> DaViTConfig:
        """A shrunken twin for tests: windows with a rest, sizes that differ from each other."""
        small = {"image_size": 36, "depths": (1, 1, 2, 1), "widths": (8, 12, 16, 24), "num_heads": (2, 3, 4, 2)}
        return dataclasses.replace(self, **small, num_groups=(4, 2, 2, 3), window=4, mlp_ratio=2.0)


class Nearby(nn.Module):
    """x + a 3 x 3 convolution of each channel by itself: where a patch is, its neighbours tell."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, U, V, D] -> the same."""
        rows, columns, width = x.shape[1:]
        init = nn.with_logical_partitioning(nn.initializers.normal(1 / 3), (None, None, "norm"))
        taps = self.param("taps", init, (3, 3, width)).astype(x.dtype)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",))
        y = x + self.param("bias", zeros, (width,)).astype(x.dtype)
        wide = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        # Nine sums compile to one pass over the patches; a grouped convolution does not, on most devices.
        for row in range(3):
            for column in range(3):
                y += wide[:, row : row + rows, column : column + columns] * taps[row, column]
        return y


class ChannelAttention(nn.Module):
    """Attention between the channels of a group; what a channel is, is all of its patches."""

    groups: int
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, P, D] -> float[B, P, D]."""
        width, size = x.shape[-1], x.shape[-1] // self.groups

        def project(name: str) -> jax.Array:
            shape, axes = (width, self.groups, size), ("embed", "heads", "head_dim")
            return Einsum("BPD,DGC->BPGC", shape, axes, use_bias=True, kernel=self.kernel, name=name)(x)

        q, k, v = project("q") * x.shape[1] ** -0.5, project("k"), project("v")
        keys, values = (y.transpose(0, 2, 3, 1) for y in (k, v))  # [B, G, C, P]
        y = attend(q.transpose(0, 3, 2, 1), [(keys, values)]).transpose(0, 3, 2, 1)
        shape, axes = (self.groups, size, width), ("heads", "head_dim", "embed")
        return Einsum("BPGC,GCD->BPD", shape, axes, use_bias=True, kernel=self.kernel, name="o")(y)


class Layer(nn.Module):
    """Neighbours, attention, neighbours, MLP; norms come before attention and MLP."""

    config: DaViTConfig
    stage: int
    over: str
    """windows or channels."""
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, U, V, D] -> the same."""
        c, shape = self.config, x.shape
        x = Nearby(name="nearby")(x)
        y = LayerNorm(c.norm_epsilon, name="attn_norm")(x)
        if self.over == "windows":
            heads = c.num_heads[self.stage]
            attention = Attention(heads, shape[-1] // heads, kernel=self.kernel, name="attn")
            y = from_windows(attention(to_windows(y, c.window))[0], shape, c.window)
        else:
            attention = ChannelAttention(c.num_groups[self.stage], self.kernel, name="attn")
            y = attention(y.reshape(shape[0], -1, shape[-1])).reshape(shape)
        x = Nearby(name="nearby_mlp")(x + y)
        y = LayerNorm(c.norm_epsilon, name="mlp_norm")(x).reshape(shape[0], -1, shape[-1])
        mlp = MLP(int(c.mlp_ratio * shape[-1]), c.activation, kernel=self.kernel, name="mlp")
        return x + mlp(y).reshape(shape)


class Pair(nn.Module):
    """A layer over windows, then one over channels."""

    config: DaViTConfig
    stage: int
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for over in ("windows", "channels"):
            x = Layer(self.config, self.stage, over, self.kernel, name=over)(x)
        return x


class Stage(nn.Module):
    """Patches of the stage before, and the layers on them."""

    config: DaViTConfig
    number: int
    kernel: Kernel = Kernel()
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, U', V', D'] -> float[B, U, V, D]."""
        c, i = self.config, self.number
        norm, size, stride = LayerNorm(c.norm_epsilon, name="patch_norm"), c.patch_sizes[i], c.strides[i]
        x = norm(x) if c.prenorms[i] else x
        x = jnp.pad(x, [(0, 0), *[(c.paddings[i], c.paddings[i])] * 2, (0, 0)])
        side = (x.shape[1] - size) // stride + 1
        # A convolution as the product that it is, so that adapters and 8-bit storage are those of every matrix.
        starts, end = range(size), stride * (side - 1) + 1
        seen = [[x[:, u : u + end : stride, v : v + end : stride] for v in starts] for u in starts]
        x = jnp.stack([jnp.stack(row, axis=3) for row in seen], axis=3)
        shape, axes = (size, size, x.shape[-1], c.widths[i]), ("patch", None, None, "embed")
        matrix = Einsum("BUVXYC,XYCD->BUVD", shape, axes, use_bias=True, kernel=self.kernel.as_float(), name="patch")
        x = matrix(x)
        x = x if c.prenorms[i] else norm(x)
        pair = Pair(c, i, self.kernel, name="layers")
        return scan_layers(lambda pair, x, _: (pair(x), None), pair, x, length=c.depths[i], remat=self.remat)[0]


class DaViT(nn.Module):
    """Normalised images to features of patches."""

    config: DaViTConfig
    kernel: Kernel = Kernel()
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float[B, size, size, 3] -> float[B, P, D], row by row. The type stays."""
        c, x = self.config, images
        chex.assert_shape(images, (None, c.image_size, c.image_size, 3))
        for number in range(len(c.widths)):
            x = Stage(c, number, self.kernel, self.remat, name=f"stage{number}")(x)
        return x.reshape(len(x), -1, c.width)


def to_windows(x: jax.Array, side: int) -> jax.Array:
    """float[B, U, V, D] -> float[B * windows, side * side, D]; zeros, which are attended to, fill those at the edge."""
    rows, columns = x.shape[1:3]
    x = jnp.pad(x, [(0, 0), (0, -rows % side), (0, -columns % side), (0, 0)])
    x = x.reshape(len(x), x.shape[1] // side, side, x.shape[2] // side, side, x.shape[3])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side, x.shape[-1])


def from_windows(x: jax.Array, shape: tuple[int, ...], side: int) -> jax.Array:
    """The way back, to float[B, U, V, D] of `shape`."""
    batch, rows, columns, width = shape
    x = x.reshape(batch, -(-rows // side), -(-columns // side), side, side, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, x.shape[1] * side, x.shape[3] * side, width)[:, :rows, :columns]
