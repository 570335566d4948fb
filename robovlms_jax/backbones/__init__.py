"""Importing the package registers every backbone."""

from robovlms_jax.backbones import (
    deepseek_vl,
    flamingo,
    kosmos2,
    llava,
    llava_mpt,
    moondream,
    otter,
    paligemma,
    qwen2_5_vl,
    qwen3_vl,
    qwen_vl,
    smolvlm,
    uform,
)

__all__ = [
    "deepseek_vl",
    "flamingo",
    "kosmos2",
    "llava",
    "llava_mpt",
    "moondream",
    "otter",
    "paligemma",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen_vl",
    "smolvlm",
    "uform",
]
