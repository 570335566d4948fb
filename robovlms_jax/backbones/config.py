"""Which vision-language model, and how it computes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from robovlms_jax import schema
from robovlms_jax.nn.linear import AttentionKernel
from robovlms_jax.nn.stack import Remat
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("backbone")
class BackboneConfig:
    """Which vision-language model, and how it computes."""

    FORMER: ClassVar[Mapping[str, Mapping[bool, str]]] = {"remat": {False: "none", True: "dots"}}
    """Field -> what it was -> what is the same today, for configurations and command lines from before."""

    name: str = "kosmos-2"
    """Registered backbone. With `weights`, the architecture comes from that directory's config.json instead of the
    published size."""
    weights: str = ""
    """Directory with config.json, weights and tokenizer files, as published on the Hugging Face hub; or
    hf://OWNER/NAME[@REVISION] to download it. Several, separated by commas, where a model's parts were published apart
    (LLaVA-MPT, then its CLIP); the first has the config.json. Empty: random parameters."""
    attention: Literal["causal", "prefix"] = "causal"
    """causal: RoboVLMs' way for every backbone. prefix: images and prompt see each other in both directions, and action
    queries follow the whole prompt, as PaliGemma was trained."""
    states: Literal["decoder", "encoder"] = "decoder"
    """Of models with an encoder and a decoder, where actions are read. decoder: from the decoder's queries, to which
    all states of the encoder are known. encoder: from the encoder's own states, be it of queries that follow images and
    prompt or of what policy.pool takes; the decoder's layers are left out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products. Parameters, norms, softmax and losses stay float32."""
    attention_kernel: AttentionKernel = "auto"
    """What computes attention in sixteen bits. auto: cuDNN on NVIDIA's GPUs where it can and is faster, XLA's kernels
    otherwise; cudnn, xla: always these."""
    remat: Remat = "none"
    """What of the layers the backward pass computes again instead of keeping it. none: nothing. dots: all but products
    with parameters and results of attention: much less memory for little more compute. offload: as dots, and what that
    keeps waits in the host's memory (GPUs and TPUs; a CPU's is the same). full: everything from each layer's input on:
    least memory, a third more compute."""
    resampler_latents: int = 0
    """> 0: a Perceiver resampler behind the connector turns every image's tokens into this many (upstream's
    `use_vision_resampler`: 64), with random parameters at first."""
    resampler_depth: int = 6
    """Its layers."""
    resampler_heads: int = 8
    """Its attention heads, of 64 channels each."""
    storage: Literal["float", "int8"] = "float"
    """int8: matrices are rounded to eight bits with a scale per output channel when the run begins, and stay as they
    are; adapters beside them learn (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, who have four bits)."""
    lora_rank: int = 0
    """> 0 adds low-rank adapters to every matrix of the backbone; set train.trainable to train only them."""
    lora_alpha: float = 16.0
    """Scale of adapters, as lora_kind says."""
    lora_kind: Literal["lora", "rslora", "dora"] = "lora"
    """lora: adapters are scaled by lora_alpha / lora_rank. rslora: by lora_alpha / sqrt(lora_rank), for ranks of 64 and
    more. dora: as lora, and the length of each output channel is learned apart."""
    lora_dropout: float = 0.0
    """Share of the adapters' inputs that is dropped in training."""
    adapter: str = ""
    """Adapters that training starts from, as PEFT stores them: a directory with adapter_config.json, or
    hf://OWNER/NAME. lora_rank must be theirs or larger, lora_kind theirs. Empty: new ones."""

    def __post_init__(self):
        for field in ("lora_rank", "resampler_latents"):
            require(getattr(self, field) >= 0, f"backbone.{field}={getattr(self, field)} must be 0 (off) or positive.")
        require(
            not self.lora_rank or 0 < self.lora_alpha < math.inf,
            f"backbone.lora_alpha={self.lora_alpha} must be positive and finite; at 0 adapters would add nothing.",
        )
        require(
            self.storage == "float" or self.lora_rank > 0,
            "backbone.storage=int8 has matrices that cannot learn; set backbone.lora_rank, such as 32, for adapters.",
        )
        require(
            not self.adapter or self.lora_rank > 0,
            f"backbone.adapter={self.adapter!r} needs backbone.lora_rank: its adapter_config.json says r.",
        )
        require(0 <= self.lora_dropout < 1, f"backbone.lora_dropout={self.lora_dropout} must lie in [0, 1).")
        for field in ("resampler_depth", "resampler_heads"):
            require(getattr(self, field) >= 1, f"backbone.{field}={getattr(self, field)} must be at least 1.")
