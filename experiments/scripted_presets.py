"""Presets of small policies that learn from scripted demonstrations: on PlayTable, and in the real CALVIN simulator
(docs/calvin.md)."""

from __future__ import annotations

import dataclasses
import pathlib

from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.control.execution import Execution
from robovlms_jax.data.config import DataConfig, FurtherConfig
from robovlms_jax.evaluation.config import EvaluationConfig, RolloutConfig
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.playtable.config import DemonstrationConfig
from robovlms_jax.policies.auxiliary_config import AheadConfig, AuxiliaryConfig, SceneConfig
from robovlms_jax.policies.config import PolicyConfig, ProprioConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

TWIN = pathlib.Path(__file__).resolve().parents[1] / "robovlms_jax" / "demo" / "twin"
"""The demonstration's policy: the default's, trained and bundled."""

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

# Table D alone, and taught where things lie: losses on where blocks, door, drawer and lever are and on where the hand
# will be, beside the actions'; recordings with few pictures of many demonstrations; and other words than the recorded
# ones, for the benchmark asks in sentences that training does not have. Colours stay: there is one table.
CALVIN_SEEN = dataclasses.replace(
    FIXTURES,
    policy=dataclasses.replace(
        FIXTURES.policy,
        auxiliary=AuxiliaryConfig(
            ahead=AheadConfig(loss_weight=0.2),
            scene=SceneConfig(loss_weight=1.0, columns=(0, 1, 3, *SceneConfig().columns)),
        ),
    ),
    data=dataclasses.replace(
        FIXTURES.data,
        root="data/calvin_seen_blocks",
        static_shift=0,
        wrist_shift=0,
        decoded_gb=6.0,
        further=FurtherConfig(roots={"fixtures": "data/calvin_seen_fixtures"}),
        skip_still=0.05,  # 1 mm, or 0.0025 rad: experts wait at the end of each of their ways
        vary_language=True,
        paraphrases="data/calvin_seen_blocks/paraphrases.json",
        shorter_sentences=12,
    ),
    optimizer=dataclasses.replace(FIXTURES.optimizer, learning_rate=1e-3),
    train=dataclasses.replace(
        FIXTURES.train,
        output="runs/calvin_seen",
        steps=16_000,
        sources={"robot": 0.65, "fixtures": 0.35},
        source_weights={"robot": 0.65, "fixtures": 0.35},
        init_from=str(TWIN),
    ),
    demonstrations=DemonstrationConfig(),
    # All of a chunk: with less of it, the hand stays where fingers should close (docs/calvin.md).
    rollouts=RolloutConfig(execution=Execution("receding", horizon=10), max_steps=360),
)

# The same means where table D is kept back: what the real simulator shows are tables A to C, and two fifths of every
# batch are PlayTable's, all different, because places are learned together with a table's looks where there are three.
CALVIN_UNSEEN = dataclasses.replace(
    CALVIN_SEEN,
    data=dataclasses.replace(
        CALVIN_SEEN.data,
        root="data/calvin_unseen_blocks",
        further=FurtherConfig(roots={"fixtures": "data/calvin_unseen_fixtures", "playtable": "data/playtable_unseen"}),
        paraphrases="data/calvin_unseen_blocks/paraphrases.json",
        augment=CALVIN_FIXTURES.data.augment,
    ),
    train=dataclasses.replace(
        CALVIN_SEEN.train,
        output="runs/calvin_unseen",
        sources={"robot": 0.39, "fixtures": 0.21, "playtable": 0.4},
        source_weights={"robot": 0.39, "fixtures": 0.21, "playtable": 0.4},
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
