"""What a vision-language model is, weights apart: one frozen dataclass, and what its parts must offer."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import flax.linen as nn

from robovlms_jax.inputs.images import ImageSpec
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.linear import AttentionKernel, Kernel, Lora, Storage
from robovlms_jax.nn.perceiver import PerceiverConfig
from robovlms_jax.nn.stack import Remat
from robovlms_jax.weights.rules import Rules


class VisionConfig(Protocol):
    """A frozen dataclass that makes a vision tower; `nn.vit.ViTConfig` is one."""

    image_size: int

    def build(self, kernel: Kernel, remat: Remat) -> nn.Module:
        """Module: float[B, size, size, 3] -> float[B, P', vision width], or what else the family's connector reads."""

    def tiny(self) -> VisionConfig:
        """A shrunken twin for tests."""


class ConnectorConfig(Protocol):
    """A frozen dataclass that makes the module between vision tower and decoder."""

    def build(self, text: DecoderConfig, kernel: Kernel) -> nn.Module:
        """Module: (what the tower gives, deterministic=...) -> float[B, P, D], or a pair of that and
        float[B, P, n, D], what the tokens add behind the decoder's first n layers (DeepStack). Where
        `VLMConfig.connector_tokenizer` is set, it takes question=(ids int32[B, U], mask bool[B, U]), too."""

    def tiny(self) -> ConnectorConfig:
        """A shrunken twin for tests."""


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """Everything a vision-language model is, weights apart."""

    model_type: str
    """Family, by the name its config.json has."""
    vision: VisionConfig
    text: DecoderConfig
    connector: ConnectorConfig
    image: ImageSpec
    """How frames are prepared for the vision tower."""
    prompt: str
    """Text around the instruction, with {instruction} in it."""
    bos_id: int
    """The tokenizer's begin-of-text token."""
    eos_id: int
    """The tokenizer's end-of-text token."""
    pad_id: int
    rules: Rules = dataclasses.field(repr=False)
    """How published checkpoints become parameters."""
    special_tokens: bool = True
    """The tokenizer adds its special tokens to the prompt."""
    lead: Literal[0, 1] = 1
    """Tokens of the prompt before the images."""
    tail: Literal[0, 1] = 1
    """Tokens of the prompt after the action queries."""
    image_start: tuple[int, ...] = ()
    """Token ids before each image."""
    image_end: tuple[int, ...] = ()
    """Token ids after each image."""
    image_grid: tuple[int, int] | None = None
    """Rows and columns of an image's tokens, where the decoder reads them (M-RoPE)."""
    image_block: bool = False
    """The tokens of an image see each other in both directions (Gemma 3); `image_start` comes before them."""
    attention: Literal["causal", "prefix"] = "causal"
    """prefix: images and text see each other in both directions, and queries follow the whole prompt (PaliGemma's own
    training); causal: upstream's way for every backbone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters, norms and softmax stay float32."""
    remat: Remat = "none"
    """What layers compute again in the backward pass instead of keeping it (`nn.stack`)."""
    encoder: DecoderConfig | None = None
    """Reads images and text in both directions. Its states stand beside the decoder's sequence."""
    connector_tokenizer: str = ""
    """Where the connector reads the instruction, too: the directory, beside the tokenizer's files, of the tokenizer
    that makes its tokens. Empty: it does not."""
    states: Literal["decoder", "encoder"] = "decoder"
    """With an encoder: whose hidden states `decode` gives. encoder: it reads sensors and queries, too, behind images
    and prompt, and the decoder's layers are left out."""
    start_id: int = 0
    """With an encoder: the token that the decoder's sequence begins with."""
    resampler: PerceiverConfig | None = None
    """Put behind the connector, per image: a fixed number of tokens, learned by attention, whatever comes out of it."""
    lora_rank: int = 0
    """> 0 adds low-rank adapters to every matrix."""
    lora_alpha: float = 16.0
    """Scale of adapters, as lora_kind says."""
    lora_kind: Literal["lora", "rslora", "dora"] = "lora"
    """lora: adapters are scaled by lora_alpha / lora_rank. rslora: by lora_alpha / sqrt(lora_rank), for ranks of 64 and
    more. dora: as lora, and the length of each output channel is learned apart."""
    lora_dropout: float = 0.0
    """Share of the adapters' inputs that is dropped in training."""

    def __post_init__(self):
        if self.states == "encoder" and self.encoder is None:
            raise ValueError(
                f"backbone.states='encoder': a {self.model_type} has a decoder alone. Leave it at 'decoder'."
            )
        if self.encoder is not None and self.attention == "prefix":
            raise ValueError(
                f"backbone.attention='prefix' means nothing in a {self.model_type}: its encoder reads images and text "
                "in both directions as it is. Leave it at 'causal'."
            )
        if (self.encoder is not None) != self.text.cross:
            raise ValueError("an encoder needs a decoder with text.cross=True, which needs an encoder.")

    @property
    def width(self) -> int:
        """D, the width of embeddings and hidden states."""
        return self.text.width

    @property
    def beside(self) -> bool:
        """Images stand beside the sequence, for the decoder's layers to attend to: as they are, or as encoded."""
        return self.text.gated is not None or self.encodes

    @property
    def encodes(self) -> bool:
        """An encoder's states of images and text stand beside the decoder's sequence."""
        return self.encoder is not None and self.states == "decoder"

    storage: Storage = "float"
    """Of matrices and token table; int8 is for serving and for training adapters alone, w8a8 for serving."""
    joint: bool = False
    """Queries, keys and values come from one matrix, as control steps are served (`nn.attention.joint`)."""
    attention_kernel: AttentionKernel = "auto"
    """What computes attention in sixteen bits (`nn.attended.by`)."""

    def text_shape(self, length: int) -> tuple[int, ...]:
        """Of prompts of `length` tokens: (length,), or (length, 2) where the connector has tokens of its own."""
        return (length, 2) if self.connector_tokenizer else (length,)

    @property
    def lora(self) -> Lora:
        """Adapters as the blocks take them."""
        return Lora(self.lora_rank, self.lora_alpha, self.lora_kind, self.lora_dropout)

    @property
    def kernel(self) -> Kernel:
        """How matrices are stored, as the blocks take it."""
        joint = self.joint and self.lora_rank == 0  # adapters stand beside matrices of their own
        return Kernel(self.storage, self.lora, joint, self.attention_kernel)

    def tiny(self) -> VLMConfig:
        """A shrunken twin: the same architecture, small enough for a test."""
        text = self.text.tiny()
        start, end = (tuple(i % (text.vocab_size - 39) for i in ids) for ids in (self.image_start, self.image_end))
        return dataclasses.replace(
            self.resized(self.vision.tiny()),
            text=text,
            encoder=None if self.encoder is None else dataclasses.replace(self.encoder.tiny(), depth=2),
            connector=self.connector.tiny(),
            image_start=start,
            image_end=end,
        )

    def resized(self, vision: VisionConfig) -> VLMConfig:
        """With another vision tower, and images and image grid of its size."""
        grid = None if self.image_grid is None else vision.grid
        image = dataclasses.replace(self.image, size=vision.image_size)
        return dataclasses.replace(self, vision=vision, image=image, image_grid=grid)
