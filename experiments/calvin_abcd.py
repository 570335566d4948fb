"""CALVIN ABCD -> D: train a VLA on demonstrations, roll it out or evaluate it offline, write a report. What each preset
is: docs/guide.md.

python -m experiments.calvin_abcd                   # PlayTable, the embedded simulator: record, train, roll out
python -m experiments.calvin_abcd --preset sample   # a bundled piece of CALVIN, offline evaluation
python -m experiments.calvin_abcd --preset kosmos_lstm --data.root data/task_ABCD_D --backbone.weights DIR
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from experiments import launch
from experiments.scripted_presets import (
    CALVIN_FIXTURES,
    CALVIN_FULL,
    CALVIN_SEEN,
    CALVIN_SMALL,
    CALVIN_SMALL_ABCD,
    CALVIN_UNSEEN,
    FIXTURES,
    FULL,
    PLAYTABLE_SMALL,
)
from robovlms_jax import cli
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.data.config import DataConfig
from robovlms_jax.evaluation.config import EvaluationConfig
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "calvin_sample"

# Released RoboVLMs checkpoints (upstream's configs): both cameras, W = 16, C = 10, lr 2e-5 without weight decay.
KOSMOS = ExperimentConfig(
    backbone=BackboneConfig(name="kosmos-2", dtype="bfloat16", remat="dots"),
    policy=PolicyConfig(window=16, chunk=10, head=LSTMHeadConfig()),
    data=DataConfig(windows_per_segment=16),
    optimizer=OptimizerConfig(learning_rate=2e-5, weight_decay=0.0, warmup_epochs=0.25),
    train=TrainConfig(output="runs/kosmos_lstm", epochs=5, batch_size=128),
)


def like_upstream(
    preset: str, backbone: str, *, frozen: str = "", readout: str = "action_query", **changes: int
) -> ExperimentConfig:
    """Upstream's CALVIN configs of the other backbones: the static camera alone, W = 8.

    frozen: expression for parameters of the backbone that stay as they are.
    """
    trainable = (rf"^(?!backbone/({frozen})/)",) if frozen else KOSMOS.train.trainable
    return dataclasses.replace(
        KOSMOS,
        backbone=dataclasses.replace(KOSMOS.backbone, name=backbone, **changes),
        policy=dataclasses.replace(KOSMOS.policy, window=8, cameras=("static",), readout=readout),
        data=dataclasses.replace(KOSMOS.data, windows_per_segment=8),
        train=dataclasses.replace(KOSMOS.train, output=f"runs/{preset}", trainable=trainable),
    )


OTHERS = {
    "paligemma_lstm": ("paligemma-3b-224", {}),
    "llava_mpt_lstm": ("llava-mpt-7b", {"frozen": "text/embed"}),
    "qwen_vl_lstm": ("qwen-vl", {"frozen": "vision|connector"}),
    "moondream_lstm": ("moondream2", {"resampler_latents": 64}),
    "uform_lstm": ("uform-gen2-qwen-500m", {"readout": "pool"}),
    "flamingo_lstm": ("flamingo-mpt-1b", {"frozen": "vision|text/(layers|final_norm)", "readout": "pool"}),
    # Not among upstream's.
    "otter_lstm": ("otter-mpt-7b", {"frozen": "vision|text/(layers|final_norm)"}),
    "paligemma2_lstm": ("paligemma2-3b-224", {}),
    "llava_lstm": ("llava-1.5-7b", {}),
    "qwen2_5_vl_lstm": ("qwen2.5-vl-3b", {}),
    "qwen3_vl_lstm": ("qwen3-vl-2b", {}),
    "gemma3_lstm": ("gemma-3-4b", {}),
    "internvl3_lstm": ("internvl3-1b", {}),
    "idefics3_lstm": ("idefics3-8b-llama3", {}),
    "blip2_lstm": ("blip2-opt-2.7b", {}),
    "blip2_t5_lstm": ("blip2-flan-t5-xl", {}),
    "instructblip_lstm": ("instructblip-vicuna-7b", {}),
    "instructblip_t5_lstm": ("instructblip-flan-t5-xl", {}),
    "janus_lstm": ("janus-pro-1b", {}),
    "florence2_lstm": ("florence-2-large", {}),
    "smolvlm_lstm": ("smolvlm2-500m", {}),
}

PRESETS = {
    "playtable_fixtures": FIXTURES,
    "playtable_full": FULL,
    "playtable_small": PLAYTABLE_SMALL,
    "calvin_fixtures_cpu": CALVIN_FIXTURES,
    "calvin_small": CALVIN_SMALL,
    "calvin_small_abcd": CALVIN_SMALL_ABCD,
    "calvin_seen": CALVIN_SEEN,
    "calvin_unseen": CALVIN_UNSEEN,
    "calvin_full": CALVIN_FULL,
    "sample": ExperimentConfig(
        backbone=BackboneConfig(name="kosmos-2-twin"),
        policy=PolicyConfig(window=8, chunk=10, head=LSTMHeadConfig(hidden_size=128, num_layers=2, trunk=(256, 128))),
        data=DataConfig(
            root=str(SAMPLE), windows_per_segment=8, static_shift=4, wrist_shift=2, num_threads=2, prefetch=4
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.01, schedule="cosine", warmup_steps=20),
        train=TrainConfig(
            output="runs/sample", steps=300, batch_size=32, log_every=20, eval_every=150, checkpoint_every=150
        ),
        evaluation=EvaluationConfig(batches=0, episodes=3),
    ),
    "kosmos_lstm": KOSMOS,
    # What the paper's appendix states instead: lr 1e-4, weight decay 0.01.
    "kosmos_lstm_paper": dataclasses.replace(
        KOSMOS,
        optimizer=dataclasses.replace(KOSMOS.optimizer, learning_rate=1e-4, weight_decay=0.01),
        train=dataclasses.replace(KOSMOS.train, output="runs/kosmos_lstm_paper"),
    ),
    # One 24 GB GPU: adapters, policy head and query train; the backbone stays.
    "kosmos_lstm_lora": dataclasses.replace(
        KOSMOS,
        backbone=dataclasses.replace(KOSMOS.backbone, lora_rank=16),
        optimizer=dataclasses.replace(KOSMOS.optimizer, learning_rate=1e-4),
        train=dataclasses.replace(
            KOSMOS.train, output="runs/kosmos_lstm_lora", trainable=("lora_", "^head/", "^readout/"), batch_size=32
        ),
    ),
    # Upstream's adapters, as `lora_enable` makes them in its released CALVIN configuration (which has it off): word
    # embeddings are learned beside them, and no bias.
    "kosmos_lstm_upstream_lora": dataclasses.replace(
        KOSMOS,
        backbone=dataclasses.replace(KOSMOS.backbone, lora_rank=64, lora_alpha=16.0, lora_dropout=0.05),
        train=dataclasses.replace(
            KOSMOS.train,
            output="runs/kosmos_lstm_upstream_lora",
            trainable=("lora_", "^(?!backbone/)", "^backbone/text/embed/"),
        ),
    ),
    # The same with the backbone's matrices in eight bits beneath the adapters: a quarter of their memory.
    "kosmos_lstm_qlora": dataclasses.replace(
        KOSMOS,
        backbone=dataclasses.replace(KOSMOS.backbone, storage="int8", lora_rank=16),
        optimizer=dataclasses.replace(KOSMOS.optimizer, learning_rate=1e-4),
        train=dataclasses.replace(
            KOSMOS.train, output="runs/kosmos_lstm_qlora", trainable=("lora_", "^head/", "^readout/"), batch_size=32
        ),
    ),
    **{preset: like_upstream(preset, name, **changes) for preset, (name, changes) in OTHERS.items()},
}


def default_preset(arguments: Sequence[str]) -> str:
    """`playtable_fixtures`; `kosmos_lstm` with weights of one's own, for which the real size is meant.

    A dataset of one's own alone ends the process: it does not say which model shall learn from it, and the difference
    is a factor of three thousand in parameters.
    """
    return chosen_by_data(arguments, small="sample", default="playtable_fixtures")


def chosen_by_data(arguments: Sequence[str], *, small: str, default: str) -> str:
    """See `default_preset`. small: the preset for a dataset of one's own on a CPU."""
    if cli.names_flag(arguments, "backbone.weights"):
        return "kosmos_lstm"
    if cli.names_flag(arguments, "data.root") and not {"--help", "-h"} & set(arguments):
        sys.exit(
            f"error: --data.root names a dataset, and no --preset says which model shall learn from it. Choose one: "
            f"--preset {small} (half a million parameters, for a CPU), or --preset kosmos_lstm with --backbone.weights "
            "hf://microsoft/kosmos-2-patch14-224 (1.7 billion, for GPUs or TPUs; python -m experiments.plan says how "
            "much memory each device needs). --help lists all presets."
        )
    return default


if __name__ == "__main__":
    launch.main(PRESETS, default_preset, description=__doc__)
