"""LIBERO: train on its published demonstrations, in any of the three forms they come in; evaluate with vla-eval.

python -m experiments.libero --preset libero_lstm --data.root data/modified_libero_rlds --backbone.weights DIR
python -m experiments.libero --preset libero_flow --data.dataset lerobot --data.conventions libero --data.root DIR
python -m experiments.libero --preset libero_lstm --data.dataset libero_hdf5 --data.root data/libero_goal

The forms, their conventions and the evaluation: docs/how_to/libero.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments import bridge, launch
from robovlms_jax.policies.config import PolicyConfig, ProprioConfig
from robovlms_jax.policies.heads.flow import FlowHeadConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

# The paper's best structure on CALVIN, on LIBERO's two cameras; actions within their 1 % and 99 % quantiles.
LSTM = dataclasses.replace(
    bridge.KOSMOS,
    policy=PolicyConfig(
        window=8, chunk=10, cameras=("static", "wrist"), head=LSTMHeadConfig(), action_scaling="quantile"
    ),
    data=dataclasses.replace(bridge.KOSMOS.data, dataset="libero_goal_no_noops", windows_per_segment=8),
    train=TrainConfig(output="runs/libero_lstm", steps=30_000, batch_size=128, eval_every=5_000),
)

# One frame and the robot's state in, half a second of actions out, by flow matching.
FLOW = dataclasses.replace(
    LSTM,
    policy=PolicyConfig(
        history="one_step",
        window=1,
        chunk=10,
        cameras=("static", "wrist"),
        head=FlowHeadConfig(),
        proprio=ProprioConfig(enabled=True),
        action_scaling="quantile",
    ),
    data=dataclasses.replace(LSTM.data, windows_per_segment=1),
    optimizer=OptimizerConfig(learning_rate=5e-5, weight_decay=0.01, schedule="cosine", warmup_steps=1_000),
    train=dataclasses.replace(LSTM.train, output="runs/libero_flow"),
)

PRESETS = {"libero_lstm": LSTM, "libero_flow": FLOW}

REAL_THING = """\
Serve the checkpoint and let a LIBERO container of vla-eval ask it (docs/how_to/libero.md):

    python -m experiments.serve --checkpoint runs/libero_lstm"""


def default_preset(arguments: Sequence[str]) -> str:
    """`libero_lstm`; without data, what the command says is that it needs some."""
    return "libero_lstm"


if __name__ == "__main__":
    launch.main(PRESETS, default_preset, description=__doc__, title="LIBERO", closing=REAL_THING)
