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
from robovlms_jax import cli
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.control.execution import Execution
from robovlms_jax.data.config import DataConfig, FurtherConfig
from robovlms_jax.evaluation.config import EvaluationConfig, RolloutConfig
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.policies.config import PolicyConfig, ProprioConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "calvin_sample"
TWIN = ROOT / "robovlms_jax" / "demo" / "twin"
"""The demonstration's policy: the default's, trained and bundled."""

# Released RoboVLMs checkpoints (upstream's configs): both cameras, W = 16, C = 10, lr 2e-5 without weight decay.
KOSMOS = ExperimentConfig(
    backbone=BackboneConfig(name="kosmos-2", dtype="bfloat16", remat="dots"),
    policy=PolicyConfig(window=16, chunk=10, head=LSTMHeadConfig()),
    data=DataConfig(windows_per_segment=16),
    optimizer=OptimizerConfig(learning_rate=2e-5, weight_decay=0.0, warmup_epochs=0.25),
    train=TrainConfig(output="runs/kosmos_lstm", epochs=5, batch_size=128),
)

FIXTURE_TASKS = (
    *("open_drawer", "close_drawer", "move_slider_left", "move_slider_right"),
    *("turn_on_lightbulb", "turn_off_lightbulb", "turn_on_led", "turn_off_led"),
)

# The embedded default: what moves on PlayTable by its handles, seen on tables A to C, asked on table D.
FIXTURES = ExperimentConfig(
    backbone=BackboneConfig(name="kosmos-2-twin"),
    policy=PolicyConfig(
        window=1,
        chunk=10,
        head=LSTMHeadConfig(hidden_size=128, num_layers=1, trunk=(256, 128)),
        proprio=ProprioConfig(enabled=True),
        action_low=(-1.0,) * 6,
        action_high=(1.0,) * 6,
    ),
    data=DataConfig(
        root="data/playtable_fixtures",
        windows_per_segment=1,
        static_shift=1,
        wrist_shift=1,
        num_threads=2,
        prefetch=4,
        decoded_gb=3.0,  # all of it is 2.5
    ),
    optimizer=OptimizerConfig(learning_rate=4e-4, weight_decay=0.01, schedule="cosine", warmup_steps=100),
    train=TrainConfig(
        output="runs/playtable_fixtures",
        steps=4600,
        batch_size=64,
        log_every=100,
        eval_every=0,
        checkpoint_every=1000,
    ),
    evaluation=EvaluationConfig(batches=10, episodes=2),
    demonstrations=DemonstrationConfig(
        episodes=1600,
        validation_episodes=40,
        tasks=FIXTURE_TASKS,
        random_scenes=1597,
        chain_length=1,
        max_steps=160,
        disturbance=0.25,
        start_spread=0.25,
        image_size=(96, 64),
        tables=40,  # as many as roll out, so that they run the same compiled programs
    ),
    rollouts=RolloutConfig(
        trials=200,
        tasks=FIXTURE_TASKS,
        max_steps=160,
        execution=Execution("receding", horizon=5),
        image_size=(96, 64),
        tables=40,
        films=8,
    ),
)

# The same policy for the real simulator: half of every batch is what `record_calvin` recorded there on tables A to C,
# half the default's own demonstrations, whose tables are all different. `evaluate` tries it on D (docs/calvin.md).
# Colours are changed at random, because three tables have three kinds of wood alone.
CALVIN_FIXTURES = dataclasses.replace(
    FIXTURES,
    data=dataclasses.replace(
        FIXTURES.data,
        root="data/calvin_fixtures",
        decoded_gb=0.0,
        further=FurtherConfig(roots={"playtable": FIXTURES.data.root}),
        augment=AugmentConfig(brightness=0.15, contrast=0.2, saturation=0.3, hue=0.03),
    ),
    train=dataclasses.replace(
        FIXTURES.train, output="runs/calvin_fixtures_cpu", steps=2000, sources={"robot": 1.0, "playtable": 1.0}
    ),
    demonstrations=DemonstrationConfig(),
    rollouts=RolloutConfig(execution=FIXTURES.rollouts.execution, max_steps=160),
)

# All 34 tasks, chains of five. First on PlayTable alone, from what the bundled twin knows of fixtures: demonstrations
# cost a tenth there of what the real simulator takes to render.
PLAYTABLE_SMALL = dataclasses.replace(
    FIXTURES,
    data=dataclasses.replace(
        FIXTURES.data, root="data/playtable_small", decoded_gb=0.0, augment=CALVIN_FIXTURES.data.augment
    ),
    train=dataclasses.replace(FIXTURES.train, output="runs/playtable_small", steps=3500, init_from=str(TWIN)),
    demonstrations=dataclasses.replace(
        FIXTURES.demonstrations,
        episodes=600,
        validation_episodes=10,
        tasks=(),
        random_scenes=597,
        chain_length=5,
        max_steps=200,
    ),
    rollouts=dataclasses.replace(FIXTURES.rollouts, trials=40, tasks=(), max_steps=360),
)

# Then in the real one, on A to C: chains of all tasks, chains of those with blocks in the hand, which the benchmark
# asks most, and the fixtures' single demonstrations; half of every batch is PlayTable's.
CALVIN_SMALL = dataclasses.replace(
    CALVIN_FIXTURES,
    data=dataclasses.replace(
        CALVIN_FIXTURES.data,
        root="data/calvin_small",
        further=FurtherConfig(
            roots={
                "blocks": "data/calvin_blocks",
                "fixtures": CALVIN_FIXTURES.data.root,
                "playtable": PLAYTABLE_SMALL.data.root,
            }
        ),
    ),
    train=dataclasses.replace(
        CALVIN_FIXTURES.train,
        output="runs/calvin_small",
        steps=3500,
        sources={"robot": 1.0, "blocks": 1.0, "fixtures": 1.0, "playtable": 3.0},
        init_from=PLAYTABLE_SMALL.train.output,
    ),
    rollouts=dataclasses.replace(CALVIN_FIXTURES.rollouts, max_steps=360),
)

# The same with table D shown, too: what is lost by not having seen it. Rows and weights are those of one recording on
# four tables, so that data alone differ.
CALVIN_SMALL_ABCD = dataclasses.replace(
    CALVIN_SMALL,
    data=dataclasses.replace(
        CALVIN_SMALL.data,
        further=FurtherConfig(
            roots=CALVIN_SMALL.data.further.roots
            | {
                "d": "data/calvin_small_d",
                "d_blocks": "data/calvin_blocks_d",
                "d_fixtures": "data/calvin_fixtures_d",
            }
        ),
    ),
    train=dataclasses.replace(
        CALVIN_SMALL.train,
        output="runs/calvin_small_abcd",
        sources={"robot": 3.0, "blocks": 3.0, "fixtures": 3.0, "d": 1.0, "d_blocks": 1.0, "d_fixtures": 1.0}
        | {"playtable": 12.0},
        source_weights=dict.fromkeys(("robot", "blocks", "fixtures"), 0.75)
        | dict.fromkeys(("d", "d_blocks", "d_fixtures"), 0.25),
    ),
)

# All 34 tasks, all four tables, chains of five: for one GPU. The checkpoint with the longest chains is kept.
FULL = dataclasses.replace(
    FIXTURES,
    backbone=BackboneConfig(name="kosmos-2-mini", dtype="bfloat16"),
    data=dataclasses.replace(FIXTURES.data, root="data/playtable_full", num_threads=8, prefetch=16, decoded_gb=0.0),
    optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.01, schedule="cosine", warmup_steps=500),
    train=TrainConfig(
        output="runs/playtable_full",
        steps=20_000,
        batch_size=512,
        log_every=100,
        eval_every=5000,
        checkpoint_every=5000,
    ),
    demonstrations=DemonstrationConfig(
        episodes=3000,
        scenes=("A", "B", "C", "D"),
        disturbance=0.25,
        start_spread=0.25,
        image_size=(112, 84),
        tables=256,
    ),
    rollouts=RolloutConfig(
        trials=200,
        execution=Execution("receding", horizon=5),
        image_size=(112, 84),
        tables=200,
        films=8,
        every=5000,
        select="best",
    ),
)

# The larger policy in the real simulator, on one GPU: half of every batch are recordings of tables A to D, half of
# PlayTable's, all different. Each is several recordings, packed as one (docs/calvin.md).
CALVIN_FULL = dataclasses.replace(
    FULL,
    data=dataclasses.replace(
        FULL.data,
        root="data/calvin_full",
        static_shift=2,
        wrist_shift=2,
        decoded_gb=24.0,
        further=FurtherConfig(roots={"playtable": "data/playtable_random"}),
        augment=CALVIN_FIXTURES.data.augment,
    ),
    train=dataclasses.replace(
        FULL.train,
        output="runs/calvin_full",
        sources={"robot": 1.0, "playtable": 1.0},
        source_weights={"playtable": 0.5},
        eval_every=0,
    ),
    demonstrations=DemonstrationConfig(),
    rollouts=RolloutConfig(execution=FULL.rollouts.execution, max_steps=360),
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
