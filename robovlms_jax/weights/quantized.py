"""Quantised weights: recognised, and refused with what to take instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_REMEDY = (
    "Only float32, float16 and bfloat16 weights are read. Take the repository it was quantised from (its name usually "
    "lacks the -AWQ, -GPTQ, -bnb-4bit, -FP8 or -4bit at the end), or write float weights with transformers: "
    "model.dequantize().save_pretrained(DIR)."
)
_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "mxfp4": "MXFP4",
    "torchao": "torchao",
}
_TENSORS = (
    (r"(qweight|qzeros|g_idx)", "GPTQ or AWQ"),
    (r"(SCB|weight_format)", "bitsandbytes in 8 bits"),
    (r"(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)", "bitsandbytes in 4 bits"),
    (r"weight_scale_inv", "FP8 in blocks"),
    (r"(weight_packed|weight_scale|weight_zero_point|weight_global_scale)", "compressed-tensors (llm-compressor)"),
    (r"weight\._(data|scale)", "quanto"),
    (r"scales", "MLX or another method with `scales` beside its weights"),
)
"""What the last part of a tensor's name tells -> who writes such names."""


def require_float_config(values: Mapping[str, Any]) -> None:
    """Raise ValueError where a config.json says that its weights are quantised: which method, and what to do."""
    parts = {"": values} | {f"{key}.": part for key, part in values.items() if isinstance(part, Mapping)}
    for prefix, part in parts.items():
        for key in ("quantization_config", "compression_config", "quantization"):
            found = part.get(key)
            if found and isinstance(found, Mapping):
                raise ValueError(f"{prefix}{key}: the weights are quantised by {_method(key, found)}. {_REMEDY}")


def require_float_tensors(name: str, dtypes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where a checkpoint's tensors are quantised, told by their names, or by types of few bits.

    Args:
      name: of the checkpoint, for the message.
      dtypes: tensor name -> stored type. shapes: of the same tensors.
    """
    for tensor in shapes:
        last = next((kind for pattern, kind in _TENSORS if re.search(rf"\.{pattern}$", tensor)), None)
        if last is not None:
            raise ValueError(f"{name} holds weights quantised by {last}, see {tensor}. {_REMEDY}")
    for tensor, dtype in dtypes.items():
        is_float = dtype.lower() in ("float64", "float32", "float16", "bfloat16", "f64", "f32", "f16", "bf16")
        if tensor.endswith(".weight") and len(shapes[tensor]) > 1 and not is_float:
            raise ValueError(f"{name} holds {tensor} in {dtype}: the weights are quantised. {_REMEDY}")


def _method(key: str, found: Mapping[str, Any]) -> str:
    if key == "quantization":
        return f"MLX ({found.get('bits', '?')} bits)"
    method = str(found.get("quant_method", "a method it does not name"))
    bits = found.get("bits") or (4 if found.get("load_in_4bit") else 8 if found.get("load_in_8bit") else None)
    return _METHODS.get(method, method) + (f" ({bits} bits)" if bits else "")
