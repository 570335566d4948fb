"""The one vision-language-action module: history x readout x head around a backbone (Li et al. 2024,
arXiv:2412.14058)."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax

from robovlms_jax import interface
from robovlms_jax.backbones import base as backbones
from robovlms_jax.config import PolicyConfig
from robovlms_jax.policies import encoders, readout
from robovlms_jax.policies import history as histories
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.types import Inputs


class VLA(nn.Module):
    """Observed steps in, predicted action chunks out. Parameters live under `backbone/`, `readout/` and `head/`, and
    under `proprio/` with `policy.proprio.enabled`.

    Images enter preprocessed: float[B, G, size, size, 3] per camera (see `policies.objective.prepare`).
    """

    config: PolicyConfig
    vlm: backbones.VLMConfig

    def setup(self):
        config = self.config
        self.history = histories.HISTORIES[config.history]()
        self.backbone = backbones.build(self.vlm)
        self.readout = readout.ActionQuery(config.num_queries, self.vlm.width)
        self.proprio = encoders.ProprioToken(config.proprio, self.vlm.width) if config.proprio.enabled else None
        self.head = heads.build(
            config.head,
            window=config.window,
            chunk=config.chunk,
            action_dim=interface.ACTION_DIM,
            feature_dim=self.vlm.width,
            num_queries=config.num_queries,
            name="head",
        )

    def features(self, inputs: Inputs, deterministic: bool = True) -> jax.Array:
        """float[B, G, Q, D]: the readout's hidden states of every frame."""
        batch, _ = inputs.step_mask.shape
        images, text_ids, text_mask = self.history.frames(inputs)
        images = {camera: images[camera] for camera in self.config.cameras}
        queries, extra = self.readout.queries(), self._extra(inputs)
        if extra is None:
            tokens = self.backbone.embed(images, text_ids, text_mask, queries, deterministic=deterministic)
        else:
            queries = encoders.before(extra, queries)
            tokens = self.backbone.embed(images, text_ids, text_mask, queries, deterministic=deterministic)
            tokens = encoders.name_runs(tokens, extra.shape[1])
        hidden, _ = self.backbone.decode(self.history.join(tokens, batch), deterministic=deterministic)
        return self.readout(self.history.part(hidden, batch), tokens)

    def _extra(self, inputs: Inputs) -> jax.Array | None:
        """Each frame's tokens between the prompt and the queries, float[B * G, E, D]; None where there are none."""
        if self.proprio is None:
            return None
        return self.proprio(inputs.proprio).reshape(-1, 1, self.vlm.width)

    def __call__(self, inputs: Inputs, deterministic: bool = True) -> Any:
        """Predictions for all K = G - W + 1 windows of each segment; leaves float[B * K, W, C, ...].

        Each frame is encoded once and shared by the windows it is in.
        """
        features = histories.windows(self.features(inputs, deterministic), self.config.window)
        mask = histories.windows(inputs.step_mask, self.config.window)
        chex.assert_equal_shape_prefix([features, mask], 3)
        return self.head(features.reshape(-1, *features.shape[2:]), mask.reshape(-1, mask.shape[-1]))

    def step(self, inputs: Inputs, carry: Any) -> tuple[jax.Array, Any]:
        """One control step. Inputs with G = 1 -> (actions float[B, C, A] in [-1, 1], new carry)."""
        prediction, carry = self.head.step(self.features(inputs)[:, 0], carry)
        return self.head.actions(prediction), carry

    def init_carry(self, batch: int) -> Any:
        """The carry before the first step of an episode; needs no parameters."""
        return self.bind({}).head.init_carry(batch)
