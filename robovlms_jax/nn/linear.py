"""Matrix products. `Einsum` is the one place a kernel gets its axis names, and all the LoRA there is."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): kernel + alpha / rank * lora_a @ lora_b. rank 0: none."""

    rank: int = 0
    alpha: float = 16.0


class Einsum(nn.Module):
    """einsum(equation, x, kernel) + bias, computed in the type of `x`; parameters stay float32.

    The kernel lists the axes it contracts with `x` first, then the axes it adds: "BSD,DNH->BSNH", "BSNH,NHD->BSD".
    With `lora`, `lora_a` (contracted axes, R) and `lora_b` (R, added axes) lie beside the kernel; letter R is theirs.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical name of each kernel axis; None is never split over devices."""
    use_bias: bool = False
    lora: Lora = Lora()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, letters, outputs = re.split(",|->", self.equation)
        split = sum(letter not in outputs for letter in letters)  # axes before it are contracted, the others added
        if any(letter in outputs for letter in letters[:split]) or not outputs.endswith(letters[split:]):
            raise ValueError(
                f"Einsum {self.equation!r}: kernel axes must be the contracted ones, then the output's last ones."
            )
        contracted, added = tuple(range(split)), tuple(range(split, len(letters)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=contracted, out_axis=added)
        kernel = self._parameter("kernel", init, self.shape, self.axes, x)
        y = jnp.einsum(self.equation, x, kernel)
        if self.lora.rank > 0:
            rank = (self.lora.rank,)
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=contracted, out_axis=-1)
            a = self._parameter("lora_a", init, self.shape[:split] + rank, (*self.axes[:split], "lora"), x)
            # Zero, so that training starts from the model without adapters.
            zeros = nn.initializers.zeros_init()
            b = self._parameter("lora_b", zeros, rank + self.shape[split:], ("lora", *self.axes[split:]), x)
            kept = "".join(letter for letter in inputs if letter in outputs)
            low = jnp.einsum(f"{inputs},{letters[:split]}R->{kept}R", x, a)
            y += (self.lora.alpha / self.lora.rank) * jnp.einsum(f"{kept}R,R{letters[split:]}->{outputs}", low, b)
        if self.use_bias:
            y += self._parameter("bias", nn.initializers.zeros_init(), self.shape[split:], self.axes[split:], x)
        return y

    def _parameter(self, name, init, shape, axes, x):
        return self.param(name, nn.with_logical_partitioning(init, axes), shape).astype(x.dtype)


class Embed(nn.Module):
    """Token table: look-up going in, tied logits coming out."""

    vocab_size: int
    width: int

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), ("vocab", "embed"))
        self.table = self.param("table", init, (self.vocab_size, self.width))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32[...] -> float32[..., D]. An id outside the table gives NaN."""
        return jnp.take(self.table, ids, axis=0)

    def logits(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float32[..., V]."""
        return jnp.einsum("...D,VD->...V", x, self.table.astype(x.dtype), preferred_element_type=jnp.float32)


def merge_lora(params: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """The same network without adapters: every lora_a, lora_b is multiplied out into the kernel beside it.

    Args:
      params: nested dict of parameters, layers stacked or not.
      lora: what the modules were built with; `alpha` is not stored in the parameters.
    """
    merged = {name: merge_lora(value, lora) if isinstance(value, Mapping) else value for name, value in params.items()}
    if "lora_a" in merged:
        a, b, kernel = merged.pop("lora_a"), merged.pop("lora_b"), merged["kernel"]
        product = functools.partial(jnp.tensordot, axes=1)
        if a.ndim + b.ndim - 2 > kernel.ndim:  # besides R, all three share the axis of stacked layers
            product = jax.vmap(product)
        merged["kernel"] = kernel + (lora.alpha / lora.rank) * product(a, b)
    return merged
