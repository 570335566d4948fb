"""What the benchmarks of models measure: KOSMOS-2 with an LSTM head in two sizes, synthetic inputs, and its FLOPs.

FLOPs are counted in closed form: a matrix product [m, k] x [k, n] is 2 m k n, everything else is nothing. Norms,
softmax, activations and image preprocessing are left out, and so is what rematerialisation computes again: these are
the FLOPs the model needs, the numerator of MFU (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import jax
import numpy as np

from robovlms_jax.backbones import kosmos2, registry
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.data.config import DataConfig
from robovlms_jax.nn import stack
from robovlms_jax.nn.decoder_config import DecoderConfig
from robovlms_jax.nn.linear import AttentionKernel
from robovlms_jax.nn.vit import ViTConfig
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.policies import objective
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.policies.heads.mlp import MLPHeadConfig
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build, steps
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import optimizer, state
from robovlms_jax.training.config import OptimizerConfig, TrainConfig
from robovlms_jax.training.state import TrainState
from robovlms_jax.types import Batch, Inputs

Size = Literal["small", "full"]

TEXT_LENGTH = 16
"""Prompt tokens; CALVIN's longest instruction in KOSMOS-2's prompt needs about as many."""
IMAGE_SIZES = {"static": (200, 200), "wrist": (84, 84)}
"""Pixels, as CALVIN stores them."""


def experiment(
    size: Size,
    *,
    window: int = 1,
    windows_per_segment: int = 1,
    batch_size: int,
    mesh: MeshConfig | None = None,
    backbone: str = "kosmos-2",
    attention_kernel: AttentionKernel = "auto",
) -> ExperimentConfig:
    """The configuration `runs/run.py` would train with.

    full: the published model as the `kosmos_lstm` preset computes it, all parameters trained.
    small: float32 and no rematerialisation, for a CPU.
    """
    full = size == "full"
    small_head = LSTMHeadConfig(hidden_size=128, num_layers=2, trunk=(128, 64))
    return ExperimentConfig(
        backbone=BackboneConfig(
            name=backbone,
            dtype="bfloat16" if full else "float32",
            remat="dots" if full else "none",
            attention_kernel=attention_kernel,
        ),
        policy=PolicyConfig(window=window, head=LSTMHeadConfig() if full else small_head),
        data=DataConfig(windows_per_segment=windows_per_segment),
        optimizer=OptimizerConfig(),
        train=TrainConfig(batch_size=batch_size),
        mesh=mesh or MeshConfig(),
    )


def interleaved(config: ExperimentConfig, window: int, *, reencode_every: int) -> ExperimentConfig:
    """The same experiment with `interleaved` history over `window` frames and an MLP head of the same width."""
    head = MLPHeadConfig(hidden_size=config.policy.head.hidden_size, trunk=config.policy.head.trunk)
    policy = dataclasses.replace(
        config.policy, history="interleaved", window=window, head=head, reencode_every=reencode_every
    )
    return dataclasses.replace(config, policy=policy)


def make_model(size: Size, config: ExperimentConfig) -> VLA:
    """The policy, architecture by `size`, everything else by the configuration.

    small: sizes chosen so that, as at full size, both towers matter and the policy head and the optimizer hardly do.
    """
    vlm = registry.get("kosmos-2")
    if size == "small":
        vision = {"image_size": 112, "width": 192, "depth": 3, "mlp_dim": 768, "num_heads": 6}
        text = {"width": 192, "depth": 4, "mlp_dim": 768, "num_heads": 6, "vocab_size": 1024}
        vlm = dataclasses.replace(
            vlm,
            vision=dataclasses.replace(vlm.vision, **vision),
            text=dataclasses.replace(vlm.text, **text),
            connector=kosmos2.LatentConnectorConfig(num_latents=16),
            image=dataclasses.replace(vlm.image, size=112),
        )
    return VLA(config.policy, dataclasses.replace(vlm, dtype=config.backbone.dtype, remat=config.backbone.remat))


def make_batch(config: ExperimentConfig, num_segments: int) -> Batch:
    """`num_segments` segments of noise in which every action counts."""
    rng = np.random.default_rng(0)
    frames = config.policy.window + config.data.windows_per_segment - 1
    steps = frames + config.policy.chunk - 1
    return Batch(
        inputs=Inputs(
            images={
                camera: rng.integers(0, 256, (num_segments, frames, *IMAGE_SIZES[camera], 3), np.uint8)
                for camera in config.policy.cameras
            },
            text_ids=rng.integers(4, 500, (num_segments, TEXT_LENGTH), np.int32),  # twins know 512 words
            text_mask=np.ones((num_segments, TEXT_LENGTH), bool),
            step_mask=np.ones((num_segments, frames), bool),
        ),
        actions=rng.uniform(-0.5, 0.5, (num_segments, steps, config.policy.action_dim)).astype(np.float32),
        action_mask=np.ones((num_segments, steps), bool),
        window_mask=np.ones((num_segments, config.data.windows_per_segment), bool),
        episode=np.zeros(num_segments, np.int32),
        corrupt=np.full(num_segments, -1, np.int32),
    )


def training_step(config: ExperimentConfig) -> tuple[jax.stages.Wrapped, VLA, TrainState, dict[str, Batch]]:
    """`config`'s training step on all devices, not compiled yet; its model; the state and batch to call it with."""
    mesh = meshes.make_mesh(config.mesh_sizes(jax.device_count()))
    model = VLA(config.policy, build.with_settings(config.backbone, registry.get(config.backbone.name)))
    tx = optimizer.make_optimizer(config.optimizer, config.train.steps)
    train_state = state.create(build.init_params(model, mesh, seed=0), config.train.trainable, tx, 0, mesh)
    batch = meshes.put_batch({objective.ROBOT: make_batch(config, config.segments_per_batch)}, mesh)
    return steps.make_step(config, model, train_state, mesh), model, train_state, batch


def train_flops(model: VLA, *, frames: int, windows: int, loops_once: bool = False) -> int:
    """FLOPs of one update: forward, gradients by inputs and gradients by parameters, each as much as the forward pass.

    Images have no gradient, so the patch embedding is counted twice instead of three times.

    Args:
      frames, windows: per update.
      loops_once: count one pass through each loop (layers of a tower, steps of the recurrence), as XLA's cost analysis
        does; only for comparing with it.
    """
    window = model.config.window
    head = _head(model, decoded_steps=window, loops_once=loops_once)
    return frames * (2 * _patches(model) + 3 * _frame(model, loops_once=loops_once)) + windows * 3 * head


def control_flops(model: VLA, *, slots: int, loops_once: bool = False) -> int:
    """FLOPs of one control step: per slot one frame, the head over its window, and the newest step decoded.

    With `interleaved` history the frame also attends to the window's frames before it, and a window that is decoded
    again at every step (`reencode_every` = 1) goes through the decoder once more.
    """
    head = _head(model, decoded_steps=1, loops_once=loops_once)
    context, policy = 0, model.config
    if policy.history == "interleaved":
        text, tokens = model.vlm.text, _tokens(model)
        depth = _depth(text, loops_once)
        context = depth * 4 * tokens * (policy.window - 1) * tokens * text.width
        if policy.reencode_every == 1:
            context += depth * _layer(text, policy.window * tokens)
    return slots * (_patches(model) + _frame(model, loops_once=loops_once) + context + head)


def _patches(model: VLA) -> int:
    vision = model.vlm.vision
    pixels = 3 * vision.image_size**2
    return len(model.config.cameras) * 2 * pixels * vision.width


def _depth(tower: ViTConfig | DecoderConfig, loops_once: bool) -> int:
    """Layers that are counted: few are no loop."""
    return 1 if loops_once and tower.depth > stack.UNROLLED else tower.depth


def _frame(model: VLA, *, loops_once: bool) -> int:
    """Forward FLOPs of the backbone for one frame of every camera, patch embedding left out."""
    vision, text, latents = model.vlm.vision, model.vlm.text, model.vlm.connector.num_latents
    cameras = len(model.config.cameras)
    tower = _layer(vision, vision.num_tokens) * _depth(vision, loops_once)
    keys = vision.num_tokens + latents
    connector = 2 * vision.num_tokens * vision.width * text.width  # dense
    connector += 2 * (2 * latents + 2 * keys) * text.width**2  # q and o of the latents, k and v of latents and features
    connector += 4 * latents * keys * text.width
    decoder = _layer(text, _tokens(model)) * _depth(text, loops_once)
    return cameras * (tower + connector) + decoder


def _tokens(model: VLA) -> int:
    """Of one frame: prompt, images, queries."""
    policy = model.config
    return TEXT_LENGTH + len(policy.cameras) * model.vlm.connector.num_latents + policy.num_queries


def _layer(config: ViTConfig | DecoderConfig, tokens: int) -> int:
    """One transformer layer on one sequence: q, k, v, o; up, down; scores and weighted sum over all pairs of tokens."""
    products = 4 * config.width**2 + 2 * config.width * config.mlp_dim
    return 2 * tokens * products + 4 * tokens**2 * config.width


def _head(model: VLA, *, decoded_steps: int, loops_once: bool) -> int:
    """Forward FLOPs of an LSTM head on one window of which `decoded_steps` steps go through the trunks, or of an MLP
    head on those steps."""
    config, policy = model.config.head, model.config
    hidden = config.hidden_size * policy.num_queries
    trunks = 0
    for columns in (policy.predicted.scaled, policy.predicted.binary):
        widths = (hidden, *config.trunk, policy.chunk * len(columns))
        trunks += sum(2 * a * b for a, b in itertools.pairwise(widths))
    if isinstance(config, MLPHeadConfig):
        width = model.vlm.width * policy.num_queries
        return decoded_steps * (2 * width * (width // 2) + 2 * (width // 2) * hidden + trunks)
    inputs = [model.vlm.width * policy.num_queries, *[hidden] * (config.num_layers - 1)]
    recurrent_steps = 1 if loops_once else policy.window
    lstm = sum(2 * 4 * hidden * (policy.window * width + recurrent_steps * hidden) for width in inputs)
    return lstm + decoded_steps * trunks
