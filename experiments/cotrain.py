"""Questions about pictures beside a robot's demonstrations: taught first, beside them, or not at all.

python -m experiments.cotrain                              # questions, then demonstrations and questions together
python -m experiments.cotrain --preset vl                  # the bundled questions alone
python -m experiments.cotrain --preset robot --train.init_from runs/vl        # plain fine-tuning of what came out
python -m experiments.cotrain --preset three_stages        # questions, the robot, then the robot among other robots
python -m experiments.cotrain --preset paper_order         # questions, other robots, then the robot alone

The demonstrations are PlayTable's, recorded at the first start; `experiments.playtable_questions` makes more questions
than the bundled ones. Presets are those of `experiments.calvin_abcd` with `data.vl`, `train.sources` and `train.stages`
set, so every flag of theirs works here, and so does a backbone of full size: --backbone.weights DIR.
"""

from __future__ import annotations

import dataclasses
import pathlib

from experiments import bridge, calvin_abcd, launch
from robovlms_jax import cli
from robovlms_jax.data.vl.config import VLConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training.config import OptimizerConfig, StageConfig

QUESTIONS = pathlib.Path(__file__).resolve().parents[1] / "data" / "playtable_questions"
BOTH = {"robot": 3.0, "questions": 1.0}
VL_RATE = OptimizerConfig(learning_rate=1e-3, weight_decay=0.01, schedule="cosine", warmup_steps=50)


def asking(config: ExperimentConfig) -> ExperimentConfig:
    """The same run with the bundled questions at hand: held-out ones are asked in every validation."""
    vl = VLConfig(
        paths={"questions": str(QUESTIONS / "train.jsonl")},
        validation={"questions": str(QUESTIONS / "validation.jsonl")},
        turns="each",
    )
    auxiliary = dataclasses.replace(config.policy.auxiliary, vl_weight=0.1)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, vl=vl),
        policy=dataclasses.replace(config.policy, auxiliary=auxiliary),
    )


def preset(name: str, **changes: object) -> ExperimentConfig:
    config = asking(calvin_abcd.FIXTURES)
    return cli.override(config, **{"train.output": f"runs/{name}", **changes})


LOOK = StageConfig(steps=1500, name="vl", trainable=("^backbone/",), optimizer=VL_RATE, sources={"questions": 1.0})
"""Vision-language pre-training: the backbone alone, questions alone."""
ROBOT = StageConfig(steps=2300, name="robot")
TOGETHER = StageConfig(steps=2300, name="together", sources=BOTH)
AMONG = StageConfig(steps=1000, name="cross-embodiment", sources={"robot": 1.0, "bridge": 1.0, "questions": 0.5})
"""Cross-embodiment: the bundled piece of BridgeData V2 beside PlayTable, every robot with a head of its own."""
OTHERS = {
    "data.others.roots": {"bridge": str(bridge.SAMPLE)},
    "data.others.datasets": {"bridge": "bridge"},
}

PRESETS = {
    "vl": preset("vl", **{"train.stages": (LOOK,), "rollouts.trials": 0, "evaluation.episodes": 0}),
    "robot": preset("robot"),
    "together": preset("together", **{"train.sources": BOTH}),
    "insulated": preset("insulated", **{"train.sources": BOTH, "policy.insulate": True}),
    "among": preset("among", **OTHERS, **{"train.sources": {"robot": 1.0, "bridge": 1.0}}),
    "vl_robot": preset("vl_robot", **{"train.stages": (LOOK, ROBOT)}),
    "vl_together": preset("vl_together", **{"train.stages": (LOOK, TOGETHER)}),
    "three_stages": preset("three_stages", **OTHERS, **{"train.stages": (LOOK, ROBOT, AMONG)}),
    "paper_order": preset("paper_order", **OTHERS, **{"train.stages": (LOOK, AMONG, ROBOT)}),
}

CLOSING = """\
What each preset teaches, and what was measured: docs/strategies.md. A backbone of full size:

    python -m experiments.cotrain --backbone.name kosmos-2 --backbone.weights hf://microsoft/kosmos-2-patch14-224"""

if __name__ == "__main__":
    launch.main(PRESETS, "vl_together", description=__doc__, upstream_json=False, title="PlayTable", closing=CLOSING)
