"""Seconds of one attention, by what computes it: ours, XLA's by `jax.nn`, cuDNN's.   python -m benchmarks.attention

Each takes queries, keys and values of the published models' layers, alone and with its gradient. On a CPU cuDNN is left
out. Prints JSON.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import machine
from robovlms_jax import cli
from robovlms_jax.nn import attention


@dataclasses.dataclass(frozen=True)
class Args:
    """Time attention layers."""

    frames: int = 23
    """Pictures, or runs of tokens, side by side."""
    repeats: int = 20
    """Timed calls of each; they take turns, the median counts."""
    dtype: str = "bfloat16"
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""


CALLS = 10
"""Of a program in one timing."""


class Shape(NamedTuple):
    """Of one layer: runs per frame, tokens, heads, heads of keys, channels per head, whether tokens see only those
    before them."""

    runs: int
    tokens: int
    heads: int
    kv_heads: int
    channels: int
    causal: bool


SHAPES = {
    "CLIP ViT-L/14, two cameras": Shape(2, 264, 16, 16, 64, False),
    "KOSMOS-2's decoder": Shape(1, 168, 32, 32, 64, True),
    "SigLIP So400m, two cameras": Shape(2, 256, 16, 16, 72, False),
    "PaliGemma's decoder": Shape(1, 536, 8, 1, 256, True),
}


def main(args: Args) -> None:
    """Print the result as JSON."""
    found = {name: measure(shape, args) for name, shape in SHAPES.items()}
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name != "out"}
    machine.report({"layers": found, "settings": settings}, args.out)


def ways() -> dict[str, Callable]:
    """Name -> attention of q [B, S, N, H], keys and values [B, K, T, H], mask bool[B, S, T] or None."""

    def library(implementation: str) -> Callable:
        def attend(q, keys, values, mask):
            keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
            mask = None if mask is None else mask[:, None]
            return jax.nn.dot_product_attention(q, keys, values, mask=mask, scale=1.0, implementation=implementation)

        return attend

    found = {"ours": lambda q, keys, values, mask: attention.attend(q, [(keys, values)], mask), "xla": library("xla")}
    return found | ({"cudnn": library("cudnn")} if jax.default_backend() == "gpu" else {})


def measure(shape: Shape, args: Args) -> dict[str, Any]:
    """Median seconds of each way, forward and with the gradient of everything; and the largest difference to ours."""
    count, keys = args.frames * shape.runs, jax.random.split(jax.random.key(0), 4)
    q, dy = (jax.random.normal(key, (count, shape.tokens, shape.heads, shape.channels), args.dtype) for key in keys[:2])
    k, v = (
        jax.random.normal(key, (count, shape.kv_heads, shape.tokens, shape.channels), args.dtype) for key in keys[2:]
    )
    q = q * shape.channels**-0.5
    mask = None
    if shape.causal:
        rows = jnp.arange(shape.tokens)
        mask = jnp.broadcast_to(rows[:, None] >= rows, (count, shape.tokens, shape.tokens))

    def gradient(way: Callable) -> Callable:
        def run(q, k, v, dy, mask):
            y, back = jax.vjp(lambda q, k, v: way(q, k, v, mask), q, k, v)
            return y, back(dy)

        return jax.jit(run)

    results: dict[str, Any] = {}
    for name, program, arrays in (
        ("forward", lambda way: jax.jit(way), (q, k, v, mask)),
        ("gradient", gradient, (q, k, v, dy, mask)),
    ):
        compiled = {way: program(attend) for way, attend in ways().items()}
        values = {way: jax.block_until_ready(run(*arrays)) for way, run in compiled.items()}
        seconds: dict[str, list[float]] = {way: [] for way in compiled}
        for _ in range(args.repeats):
            for way, run in compiled.items():
                begin = time.perf_counter()
                for _ in range(CALLS):  # a call is asked for while the one before it is computed
                    done = run(*arrays)
                jax.block_until_ready(done)
                seconds[way].append((time.perf_counter() - begin) / CALLS)
        results[name] = {way: statistics.median(found) for way, found in seconds.items()}
        results[name]["difference"] = {
            way: max(
                float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max())
                for a, b in zip(jax.tree.leaves(values[way]), jax.tree.leaves(values["ours"]), strict=True)
            )
            for way in compiled
            if way != "ours"
        }
    return results


if __name__ == "__main__":
    main(cli.read(Args))
