"""Train, evaluate and serve a policy for a robot of your own from a LeRobotDataset: two arms, one arm, a mobile base.

python -m experiments.lerobot --preset so100                     # made-up episodes, tiny model, a minute on a laptop
python -m experiments.lerobot --preset aloha --data.root DIR     # your recording, one tiny model, to see that it fits
python -m experiments.lerobot --preset aloha --data.root DIR --backbone.name kosmos-2 \\
    --backbone.weights hf://microsoft/kosmos-2-patch14-224 --policy.window 8 --train.steps 20000

The robot is what the dataset says: info.json's names, or meta/robovlms.json (data/README.md).
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
from collections.abc import Sequence

from robovlms_jax import cli
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.control.interface import Observation
from robovlms_jax.control.robot import Camera, Dimension, RobotSpec
from robovlms_jax.data.config import DataConfig
from robovlms_jax.evaluation.config import EvaluationConfig
from robovlms_jax.policies.config import PolicyConfig, ProprioConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

logger = logging.getLogger(__name__)

MADE_UP = pathlib.Path("data/made_up")
"""Where episodes lie that nobody recorded."""


def joints(names: Sequence[str], low: float, high: float, unit: str) -> tuple[Dimension, ...]:
    """Places of joints."""
    return tuple(Dimension(name, unit, "absolute", "joint", "", low, high) for name in names)


def width(name: str, high: float, unit: str) -> Dimension:
    """A gripper that may stand anywhere between closed (0) and open."""
    return Dimension(name, unit, "continuous", "gripper", "", 0.0, high, "high")


SO100_ARM = tuple(f"{name}.pos" for name in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll"))
SO100 = (*joints(SO100_ARM, -100.0, 100.0, "%"), width("gripper.pos", 100.0, "%"))

ALOHA_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
ALOHA = tuple(
    dimension
    for side in ("left", "right")
    for dimension in (
        *joints([f"{side}_{name}" for name in ALOHA_ARM], -3.2, 3.2, "rad"),
        width(f"{side}_gripper", 1.0, "1"),
    )
)

# ROS' geometry_msgs/Twist: x forward, y left, z up.
BASE = tuple(
    Dimension(name, unit, "velocity", "base", "base", -0.5, 0.5)
    for name, unit in (("linear_x", "m/s"), ("linear_y", "m/s"), ("angular_z", "rad/s"))
)

ROBOTS = {
    "so100": RobotSpec("so100", 30.0, (Camera("top", 48, 64), Camera("wrist", 48, 64)), SO100, SO100),
    "aloha": RobotSpec(
        "aloha",
        50.0,
        (Camera("cam_high", 48, 64), Camera("cam_left_wrist", 48, 64), Camera("cam_right_wrist", 48, 64)),
        ALOHA,
        ALOHA,
    ),
    "mobile_base": RobotSpec("mobile_base", 10.0, (Camera("front", 72, 128),), BASE),
    "one_camera": RobotSpec("one_camera", 30.0, (Camera("front", 48, 64),), SO100, SO100),
}
"""What made-up episodes are of; with --data.root the dataset says what its robot is."""


def small(name: str, robot: RobotSpec) -> ExperimentConfig:
    """A model and a run for a laptop. Actions are scaled by their quantiles, whatever their units are."""
    shift = dict.fromkeys(robot.camera_names, 2)
    return ExperimentConfig(
        backbone=BackboneConfig(name="kosmos-2-twin"),
        policy=PolicyConfig(
            window=2,
            chunk=4,
            cameras=robot.camera_names,
            head=LSTMHeadConfig(hidden_size=64, num_layers=1, trunk=(64,)),
            proprio=ProprioConfig(enabled=bool(robot.state), dropout=0.2),
            action_scaling="quantile",
        ),
        data=DataConfig(
            dataset="lerobot",
            windows_per_segment=4,
            shift=shift,
            num_threads=2,
            prefetch=2,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=5),
        train=TrainConfig(
            output=f"runs/lerobot_{name}", steps=40, batch_size=16, log_every=10, eval_every=40, checkpoint_every=40
        ),
        evaluation=EvaluationConfig(batches=0, episodes=1),
    )


PRESETS = {name: small(name, robot) for name, robot in ROBOTS.items()}

REAL_THING = """\
For the real thing, pass your recording and published weights (any preset's field can be overridden the same way):

    python -m experiments.lerobot --preset so100 --data.root DIR --backbone.name kosmos-2 \\
        --backbone.weights hf://microsoft/kosmos-2-patch14-224 --train.steps 20000

How to say what a robot's numbers are: data/README.md. `--help-all` explains every field."""


def with_data(name: str, config: ExperimentConfig) -> ExperimentConfig:
    """The configuration, with made-up episodes where it names no dataset."""
    if config.data.root:
        return config
    root = MADE_UP / name
    if not (root / "meta" / "info.json").exists():
        from robovlms_jax.data.lerobot import synthetic

        logger.info("made-up episodes of %s go to %s", name, root)
        synthetic.write(root, ROBOTS[name])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))


def show(config: ExperimentConfig) -> None:
    """One control step of the trained policy, on the first frame of the validation split."""
    from robovlms_jax.data import opening
    from robovlms_jax.runs import load

    dataset = opening.open_split(config.data, "validation")
    policy, first = load.load_policy(config.train.output), dataset.episodes[0]
    images = {camera: x[0] for camera, x in dataset.images([first.start], config.policy.cameras).items()}
    state = dataset.proprio([first.start])[0] if config.policy.proprio.enabled else None
    policy.reset(first.instruction)
    chunk = policy.act(Observation(images, state)).actions
    names = policy.robot.action_names
    logger.info("asked to %r, it answers %d actions of %s", first.instruction, len(chunk), ", ".join(names))
    logger.info("the first: %s", ", ".join(f"{n} {x:.3g}" for n, x in zip(names, chunk[0], strict=True)))


def main(argv: Sequence[str] | None = None) -> None:
    """Train, report, and act once. Errors of the user end the process with a message and status 1."""
    name, config = cli.parse(PRESETS, "so100", description=__doc__, argv=argv)
    from robovlms_jax.runs import logs, run  # takes longer than all that --help needs, as below

    logs.to_stderr()
    try:
        config = with_data(name, config)
    except (OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    if run.run(name, config, title="LeRobot", closing=REAL_THING.replace("so100", name)):
        show(config)


if __name__ == "__main__":
    main()
