"""Size and form of a language decoder or encoder, as families' config.json files say it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from robovlms_jax.nn.gated import GatedConfig
from robovlms_jax.nn.mlp import ACTIVATIONS
from robovlms_jax.nn.norms import NORMS, NormKind


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Size and form of a language decoder. The defaults are Llama's form (Touvron et al. 2023, arXiv:2302.13971)."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    vocab_size: int
    activation: str
    norm_epsilon: float
    num_kv_heads: int | None = None
    """Heads of keys and values; None = num_heads."""
    own_head_dim: int | None = None
    """H where it is not width / num_heads."""
    norm: NormKind = "rms"
    residual: Literal["sequential", "sandwich", "parallel", "post"] = "sequential"
    """sandwich: a second norm on what attention and MLP add (Gemma 2); parallel: both read one norm (Phi); post: norms
    come after the sums (BART)."""
    cross: bool = False
    """Every layer attends to the media beside the sequence, between its attention and its MLP (encoder-decoders)."""
    embed_norm: bool = False
    """A norm on embeddings and positions, before the first layer."""
    final_norm: bool = True
    """A norm behind the last layer."""
    sub_norm: bool = False
    """LayerNorms inside attention and MLP, before their output projections (Magneto, arXiv:2210.06423)."""
    is_gated: bool = True
    """The MLP has a gate."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    mlp_bias: bool = False
    positions: Literal["rotary", "alibi", "sinusoid", "learned", "relative"] = "rotary"
    """relative: attention scores have a learned bias per head and bucket of distances (T5)."""
    max_positions: int = 0
    """Of learned positions: how many there are; tokens beyond become NaN."""
    relative_buckets: int = 32
    """Of relative positions: half of them (of each direction's) are of one distance each, the others of ever more."""
    relative_distance: int = 128
    """From this distance on all share the last bucket."""
    relative_both: bool = False
    """Half of the buckets are for tokens that come later: an encoder's."""
    rope_theta: float = 10_000.0
    rotary_fraction: float = 1.0
    """Share of each head's channels that is turned."""
    mrope_sections: tuple[int, ...] = ()
    """Frequencies per coordinate (time, height, width) where tokens have several (M-RoPE); empty: one coordinate."""
    mrope_interleaved: bool = False
    """The coordinates take turns from one frequency to the next (Qwen3-VL), instead of one block each."""
    qk_norm: bool = False
    """Every head's queries and keys are normed, in the decoder's kind (Qwen 3, Gemma 3)."""
    norm_all_heads: bool = False
    """That norm goes over all heads' queries at once, and over all heads' keys (MPT-1B)."""
    query_scalar: int | None = None
    """Queries are multiplied by its power -0.5; None = H."""
    softcap: float | None = None
    """Bound of the attention scores (Gemma 2)."""
    logit_softcap: float | None = None
    """Bound of the logits (Gemma 2)."""
    sliding_window: int | None = None
    """Sliding layers see only this many tokens back (Gemma 2 and 3)."""
    sliding_period: int = 2
    """With a sliding window: every so many-th layer sees everything, the others slide."""
    window_over_blocks: bool = True
    """Tokens that see each other in both directions do so in sliding layers, too, however far apart (PaliGemma 2)."""
    local_rope_theta: float | None = None
    """`rope_theta` of sliding layers, whose places are not scaled; None: as in the others."""
    rope_factor: float = 1.0
    """Rotary embeddings read places divided by it (linear scaling)."""
    head: Literal["tied", "linear", "linear_bias"] = "linear"
    """How logits are made: with the token table, or with a matrix (and bias) of their own."""
    head_scale: bool = False
    """Logits are made of hidden states times width ** -0.5 (T5 with a tied head)."""
    norm_in_head: bool = False
    """The final norm belongs to the logits, and hidden states are those before it (MoonDream2's published code)."""
    embed_scale: bool = False
    """Multiply embeddings (of text, images and queries alike) by sqrt(width)."""
    gated: GatedConfig | None = None
    """Layers between the decoder's that attend to the media beside the sequence (Flamingo)."""
    dropout: float = 0.0
    """On embeddings and on what attention and MLP add to the residual stream."""
    attention_dropout: float = 0.0
    """On attention weights."""

    def __post_init__(self):
        # One spelling per architecture, so that equal models have equal configurations.
        if self.num_kv_heads == self.num_heads:
            object.__setattr__(self, "num_kv_heads", None)
        if self.own_head_dim is not None and self.own_head_dim * self.num_heads == self.width:
            object.__setattr__(self, "own_head_dim", None)
        if (self.own_head_dim is None and self.width % self.num_heads) or self.width % 2:
            raise ValueError(f"text width={self.width} must be even and divide over num_heads={self.num_heads}.")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"text num_heads={self.num_heads} must divide over num_kv_heads={self.num_kv_heads}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"text activation {self.activation!r} is unknown; known: {sorted(ACTIVATIONS)}.")
        if self.norm not in NORMS:
            raise ValueError(f"text norm {self.norm!r} is unknown; known: {list(NORMS)}.")
        if self.positions == "rotary" and (self.rotary_channels % 2 or self.rotary_channels < 2):
            raise ValueError(f"rotary_fraction={self.rotary_fraction} of head_dim={self.head_dim} must be even.")
        if self.cross and (self.gated is not None or self.residual == "parallel"):
            raise ValueError(
                "text cross=True attends to media in every layer; gated must be None, residual not parallel."
            )
        if self.gated is not None and self.depth % self.gated.every:
            raise ValueError(f"text depth={self.depth} must be a multiple of gated every={self.gated.every}.")
        if self.mrope_sections and 2 * sum(self.mrope_sections) != self.rotary_channels:
            raise ValueError(
                f"mrope_sections={self.mrope_sections} must add up to {self.rotary_channels // 2}, half of head_dim."
            )

    @property
    def head_dim(self) -> int:
        """H."""
        return self.own_head_dim or self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """K, heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that rotary embeddings turn."""
        return int(self.head_dim * self.rotary_fraction)

    def tiny(self) -> DecoderConfig:
        """A shrunken twin for tests: same switches, sizes that differ from each other so that swapped axes fail."""
        small = {"width": 32, "depth": 3, "mlp_dim": 56, "num_heads": 4, "vocab_size": 128}
        if self.num_kv_heads is not None:
            small["num_kv_heads"] = 1 if self.num_kv_heads == 1 else 2
        if self.own_head_dim is not None:
            small["own_head_dim"] = 12
        if self.query_scalar is not None:
            small["query_scalar"] = min(self.query_scalar, 16)
        if self.sliding_window is not None:
            small |= {"sliding_window": 8, "sliding_period": min(self.sliding_period, 3)}
        if self.max_positions:
            small["max_positions"] = 300
        if self.mrope_sections:
            small["mrope_sections"] = (1, 1, 2) if self.own_head_dim is None else (1, 2, 3)
        if self.gated is not None:
            small |= {"gated": self.gated.tiny(), "depth": 2 * self.gated.every}
        return dataclasses.replace(self, **small)
