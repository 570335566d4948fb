"""BridgeData V2: train a VLA on the WidowX robot's episodes, evaluate it on the held-out ones, write a report.

python -m experiments.bridge                                   # bundled episodes, small model, minutes on a laptop
python -m experiments.bridge --preset kosmos_lstm --data.root DIR --backbone.weights DIR
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from experiments import calvin_abcd, launch
from robovlms_jax.data.config import DataConfig
from robovlms_jax.evaluation.config import EvaluationConfig
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training.config import TrainConfig

SAMPLE = pathlib.Path(__file__).resolve().parents[1] / "data" / "bridge_sample"

OWN_SAMPLE = DataConfig(dataset="bridge", root=str(SAMPLE))

# Upstream's image augmentation on RLDS data.
AUGMENT = AugmentConfig(crop_area=0.9, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)

# The released configuration: as on CALVIN (lr 2e-5, no weight decay, W = 16, C = 10, warm-up of a quarter epoch), one
# camera, 50,000 steps, actions scaled by their 1 % and 99 % quantiles.
KOSMOS = dataclasses.replace(
    calvin_abcd.KOSMOS,
    policy=dataclasses.replace(calvin_abcd.KOSMOS.policy, cameras=("static",), action_scaling="quantile"),
    data=DataConfig(dataset="bridge", windows_per_segment=16, static_shift=0, wrist_shift=0, augment=AUGMENT),
    train=TrainConfig(output="runs/bridge_kosmos_lstm", steps=50_000, batch_size=128, eval_every=10_000),
)


def paper(config: ExperimentConfig, output: str) -> ExperimentConfig:
    """What the paper's appendix states for SimplerEnv: lr 1e-4, weight decay 0.01, warm-up of 5,000 steps."""
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=1e-4, weight_decay=0.01, warmup_epochs=0.0, warmup_steps=5_000
        ),
        train=dataclasses.replace(config.train, output=output),
    )


def sample(output: str, data: DataConfig = OWN_SAMPLE) -> ExperimentConfig:
    """A model and a run that fit a laptop, on the bundled episodes."""
    small = calvin_abcd.PRESETS["sample"]
    return dataclasses.replace(
        small,
        policy=dataclasses.replace(small.policy, window=4, chunk=5, cameras=("static",), action_scaling="quantile"),
        data=dataclasses.replace(
            data, windows_per_segment=4, static_shift=0, wrist_shift=0, augment=AUGMENT, num_threads=2, prefetch=4
        ),
        train=TrainConfig(output=output, steps=300, batch_size=32, log_every=20, eval_every=150, checkpoint_every=150),
        evaluation=EvaluationConfig(batches=0, episodes=3),
    )


PRESETS = {
    "sample": sample("runs/bridge_sample"),
    "kosmos_lstm": KOSMOS,
    "kosmos_lstm_paper": paper(KOSMOS, "runs/bridge_kosmos_lstm_paper"),
    # What upstream's loader really fed its released checkpoints.
    "kosmos_lstm_compat": dataclasses.replace(
        KOSMOS,
        data=dataclasses.replace(
            KOSMOS.data, windows_per_segment=1, compat_goal_relabelling=True, compat_second_norm=True
        ),
        train=dataclasses.replace(KOSMOS.train, output="runs/bridge_kosmos_lstm_compat"),
    ),
}

REAL_THING = """\
For the real thing, pass the dataset and the published weights (any preset's field can be overridden the same way):

    python -m experiments.bridge --preset kosmos_lstm \\
        --data.root data/bridge_dataset --backbone.weights hf://microsoft/kosmos-2-patch14-224

How to get Bridge: data/README.md. `--help-all` explains every field."""


def default_preset(arguments: Sequence[str]) -> str:
    """`sample`; see `calvin_abcd.default_preset` for weights or a dataset of one's own."""
    return calvin_abcd.chosen_by_data(arguments, small="sample", default="sample")


if __name__ == "__main__":
    launch.main(PRESETS, default_preset, description=__doc__, title="Bridge", closing=REAL_THING)
