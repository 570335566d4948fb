"""Learn a task of any Gymnasium environment: an expert's demonstrations, training, the policy's own episodes, a report.

python -m experiments.gym                                          # FetchReach of gymnasium-robotics, on a laptop
python -m experiments.gym --train.resume                           # episodes and report of a finished run again

Another environment is described by a layout (which observation is what; envs/gym.py) and a robot (what its numbers
mean), JSON files for --layout and --policy.robot, and an expert for --recording.expert: docs/how_to/gymnasium.md.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

from robovlms_jax import atomic, cli
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.control.robot import Camera, Dimension, RobotSpec
from robovlms_jax.data.config import DataConfig
from robovlms_jax.envs import gym
from robovlms_jax.evaluation.config import EvaluationConfig
from robovlms_jax.policies.config import PolicyConfig, ProprioConfig
from robovlms_jax.policies.heads.mlp import MLPHeadConfig
from robovlms_jax.runs import gym_loop, logs
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

logger = logging.getLogger(__name__)

_XYZ = ("x", "y", "z")
FETCH = RobotSpec(
    "fetch",
    25.0,
    (Camera("front", 96, 96), Camera("side", 96, 96)),
    (
        *(Dimension(axis, "0.05 m", "delta", "position", "world", -1.0, 1.0) for axis in _XYZ),
        Dimension("gripper", "", "continuous", "gripper", "", -1.0, 1.0, "high"),
    ),
    (
        *(Dimension(axis, "m", "absolute", "position", "world") for axis in _XYZ),
        *(Dimension(f"{side}_finger", "m", "absolute", "joint") for side in ("right", "left")),
        *(Dimension(f"{axis}_velocity", "m", "delta", "other", "world") for axis in _XYZ),
        *(Dimension(f"{side}_finger_velocity", "m", "delta", "other") for side in ("right", "left")),
    ),
)
"""The Fetch arm as gymnasium-robotics drives it: its hand points down, and 1.0 of an action is 0.05 m."""

VIEW = {"distance": 1.1, "azimuth": 132.0, "elevation": -25.0, "lookat": [1.3, 0.75, 0.55]}
FETCH_REACH = gym.Layout(
    "FetchReach-v4",
    {"front": "render:external_camera_0", "side": "render"},
    state=("observation",),
    instruction="move the hand to the red ball",
    imports=("gymnasium_robotics",),
    options=json.dumps({"width": 96, "height": 96, "default_camera_config": VIEW}),
)


@dataclasses.dataclass(frozen=True)
class GymConfig(ExperimentConfig):
    """A run, the environment, what is recorded in it before and done in it after."""

    layout: gym.Layout = FETCH_REACH
    recording: gym_loop.RecordingConfig = gym_loop.RecordingConfig()
    trials: gym_loop.TrialsConfig = gym_loop.TrialsConfig()

    @property
    def experiment(self) -> ExperimentConfig:
        """What a checkpoint keeps."""
        names = [field.name for field in dataclasses.fields(ExperimentConfig)]
        return ExperimentConfig(**{name: getattr(self, name) for name in names})


PRESETS = {
    "fetch_reach": GymConfig(
        backbone=BackboneConfig(name="kosmos-2-twin"),
        policy=PolicyConfig(
            history="one_step",
            window=1,
            chunk=4,
            robot=FETCH,
            cameras=("front", "side"),
            head=MLPHeadConfig(hidden_size=128, trunk=(256, 128)),
            proprio=ProprioConfig(enabled=True),
            action_low=(-1.0,) * 4,
            action_high=(1.0,) * 4,
        ),
        data=DataConfig(
            root="data/fetch_reach",
            windows_per_segment=1,
            shift={"front": 1, "side": 1},
            num_threads=2,
            prefetch=4,
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, weight_decay=0.01, schedule="cosine", warmup_steps=100),
        train=TrainConfig(
            output="runs/fetch_reach", steps=2000, batch_size=64, log_every=100, eval_every=0, checkpoint_every=1000
        ),
        evaluation=EvaluationConfig(batches=5, episodes=2),
        recording=gym_loop.RecordingConfig(
            expert="robovlms_jax.envs.gym_experts:fetch_reach", episodes=300, validation_episodes=20, noise=0.08
        ),
    )
}

REAL_THING = """\
For an environment of your own: a layout, a robot and an expert (or a dataset in any format of data/README.md):
docs/how_to/gymnasium.md."""


def main(argv: Sequence[str] | None = None) -> None:
    """Record, train, try, report. Errors of the user end the process with a message and status 1."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo's own choice needs a display
    name, config = cli.parse(PRESETS, "fetch_reach", description=__doc__, argv=argv)
    from robovlms_jax.runs import run  # takes longer than all that --help needs, as below
    from robovlms_jax.training import checkpoints

    logs.to_stderr()
    output, robot = pathlib.Path(config.train.output), config.policy.robot
    try:
        if not config.train.resume:
            checkpoints.require_free(output, resume=False)
        if config.recording.episodes:
            counts = gym_loop.record(config.layout, robot, config.recording, config.data.root)
            logger.info("%(recorded)d of %(attempted)d demonstrations succeed, %(frames)d frames", counts)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    run.run(name, config.experiment, title=config.layout.id, closing=REAL_THING)
    if config.trials.count:
        try_out(config, output)


def try_out(config: GymConfig, output: pathlib.Path) -> None:
    """The run's policy in episodes of its own; what came of them joins the run's report."""
    from robovlms_jax.runs import load
    from robovlms_jax.training import checkpoints, seals

    policy = load.load_batched_policy(output, min(config.trials.environments, config.trials.count))
    identity = seals.identity(checkpoints.locate(output)).label
    section = gym_loop.evaluate(policy, config.layout, config.policy.robot, config.trials, output, identity)
    report = output / "report.md"
    before = report.read_text().partition(gym_loop.HEADING)[0].rstrip()
    atomic.write_text(report, f"{before}\n\n{section}")
    logger.info("report: %s", report)


if __name__ == "__main__":
    main()
