"""How parameters are kept in memory for serving: one table, and matrices rounded to eight bits.

A matrix becomes int8 and one float32 scale per output channel, so that the largest value of a channel is 127
(symmetric, round to nearest): matrix = int8 * scale, at most scale / 2 away from what it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

STORAGE: tuple[tuple[str, str], ...] = (
    # One percent of the bytes, computed in float32 whatever the backbone's type; rounding here shows in every action.
    (r"^(?!backbone/)", "kept"),
    (r"norm[^/]*/(scale|bias)$", "kept"),
    (r"/patch/kernel$", "cast"),
    (r"/(kernel|table)$", "matrix"),
    (r"/(lora_m|attn_gate|mlp_gate|relative)$", "kept"),
    (r"/(bias|lora_[ab])$", "cast"),
    (r"/(positions|rows|columns|taps|cls|latents|queries|attn_scale|mlp_scale)$", "cast"),
    (r"[/_]scale$", "kept"),  # of a matrix in int8
)
"""Pattern of a parameter's path -> how it is stored; the first that is found in the path counts.

kept: in its own type. cast: in the type of computation, which blocks cast it to at every use, so that storing it so
changes no number and halves what a bfloat16 control step reads. matrix: the same, or int8 when that is asked for.
"""


def stored_as(path: str) -> str:
    """kept, cast or matrix. Raises ValueError for a parameter that no line of the table speaks about."""
    for pattern, kind in STORAGE:
        if re.search(pattern, path):
            return kind
    raise ValueError(
        f"no line of STORAGE in weights/quantize.py says how {path} is stored for serving; add one ('matrix' if "
        "nn.linear.Kernel makes it, 'kept' if it is computed in float32, 'cast' otherwise)."
    )


def stored_types(shapes: Mapping[str, Any], dtype: str, matrices: str | None = None) -> dict[str, Any]:
    """The type each parameter of a policy is stored in: a tree like `shapes`.

    Args:
      shapes: nested dict of arrays or shapes, matrices in float.
      dtype: of what is cast. matrices: of matrices; None = `dtype`.
    """
    types = {"cast": dtype, "matrix": matrices or dtype}
    flat = flatten_dict(shapes, sep="/")
    return unflatten_dict({path: types.get(stored_as(path), x.dtype) for path, x in flat.items()}, sep="/")


def quantize(params: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The same policy with its matrices in int8.

    Args:
      params: nested dict of float arrays; adapters stay as they are, beside the matrices.
      shapes: jax.ShapeDtypeStruct of every parameter of the model built with `storage="int8"`, with shardings if the
        result has to lie somewhere. Axes along which a scale has size 1 are those that the product contracts.
    Raises:
      ValueError: the table and the model disagree about a parameter, or a matrix is not finite; names them.
    """
    flat, wanted = flatten_dict(params, sep="/"), flatten_dict(shapes, sep="/")
    matrices = {path for path, x in wanted.items() if x.dtype == jnp.int8}
    scales = {path: scale_of(path) for path in matrices}
    problems = [
        f"{path}: the table says {stored_as(path)!r}, the model {'int8' if path in matrices else 'float'}"
        for path in sorted(set(flat) & set(wanted))
        if (stored_as(path) == "matrix") != (path in matrices)
    ]
    problems += [f"{path}: not a parameter of both" for path in sorted(set(flat) ^ (set(wanted) - {*scales.values()}))]
    problems += [
        f"{path}: {list(flat[path].shape)}, but the model has {list(wanted[path].shape)}"
        for path in sorted(set(flat) & set(wanted))
        if flat[path].shape != wanted[path].shape
    ]
    if problems:
        raise ValueError("these parameters cannot be quantised for this model:\n  " + "\n  ".join(problems))
    for path, scale in scales.items():
        places = getattr(wanted[path], "sharding", None), getattr(wanted[scale], "sharding", None)
        contracted = tuple(axis for axis, size in enumerate(wanted[scale].shape) if size == 1)
        rounded = jax.jit(quantize_matrix, static_argnums=1, out_shardings=places)(flat[path], contracted)
        if not jnp.isfinite(rounded[1]).all():
            raise ValueError(f"{path} holds values that are not finite, which no scale can express.")
        flat[path], flat[scale] = rounded
    return unflatten_dict(flat, sep="/")


def quantize_matrix(matrix: jax.Array, contracted: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """float[...] -> int8[...] and float32 scales, of size 1 along the `contracted` axes."""
    matrix = matrix.astype(jnp.float32)
    largest = jnp.abs(matrix).max(contracted, keepdims=True)
    scale = jnp.maximum(largest / 127, jnp.finfo(jnp.float32).tiny)  # a channel of zeros stays zeros
    return jnp.round(matrix / scale).astype(jnp.int8), scale


def dequantize(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same policy with its int8 matrices in float32, and without their scales; the other parameters as they are."""
    flat = flatten_dict(params, sep="/")
    for path in [path for path, x in flat.items() if x.dtype == jnp.int8]:
        flat[path] = flat[path] * flat.pop(scale_of(path))
    return unflatten_dict(flat, sep="/")


def scale_of(path: str) -> str:
    """Where `nn.linear.Kernel` puts the scale of a matrix: "q/kernel" -> "q/scale", "input_kernel" -> "input_scale"."""
    parent, slash, name = path.rpartition("/")
    return f"{parent}{slash}{name[: name.rfind('_') + 1]}scale"
