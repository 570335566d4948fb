"""CALVIN ABCD -> D: train a VLA on CALVIN episodes, evaluate it on the validation split, write a report.

python -m experiments.calvin_abcd                                   # bundled sample, small model, a few minutes on a
laptop
python -m experiments.calvin_abcd --preset kosmos_lstm --data.root data/task_ABCD_D --backbone.weights DIR
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from experiments import run
from robovlms_jax import cli, upstream
from robovlms_jax.config import (
    BackboneConfig,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimizerConfig,
    PolicyConfig,
    TrainConfig,
)
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig

SAMPLE = pathlib.Path(__file__).resolve().parents[1] / "data" / "calvin_sample"

# Released RoboVLMs checkpoints (upstream's configs): both cameras, W = 16, C = 10, lr 2e-5 without weight decay.
KOSMOS = ExperimentConfig(
    backbone=BackboneConfig(name="kosmos-2", dtype="bfloat16", remat=True),
    policy=PolicyConfig(window=16, chunk=10, head=LSTMHeadConfig()),
    data=DataConfig(windows_per_segment=16),
    optimizer=OptimizerConfig(learning_rate=2e-5, weight_decay=0.0, warmup_epochs=0.25),
    train=TrainConfig(output="runs/kosmos_lstm", epochs=5, batch_size=128),
)

PRESETS = {
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
}


def default_preset(arguments: Sequence[str]) -> str:
    """`sample`, unless weights or a dataset of one's own are named: then the real size is meant."""
    own = any(cli.names_flag(arguments, flag) for flag in ("data.root", "backbone.weights"))
    return "kosmos_lstm" if own else "sample"


if __name__ == "__main__":
    run.run(*cli.parse(PRESETS, default_preset, description=__doc__, read_json=upstream.load_experiment))
