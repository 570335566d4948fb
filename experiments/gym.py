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

from robovlms_jax import cli, ending
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.control.robot import Camera, Dimension, RobotSpec
from robovlms_jax.data.config import DataConfig
from robovlms_jax.demo import twin
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
    (Camera("side", 96, 96), Camera("front", 96, 96)),
    (
        *(Dimension(axis, "0.05 m", "delta", "position", "world", -1.0, 1.0) for axis in _XYZ),
        Dimension("gripper", "", "continuous", "gripper", "", -1.0, 1.0, "high"),
    ),
    tuple(Dimension(axis, "m", "absolute", "position", "world") for axis in _XYZ),
)
"""The Fetch arm as gymnasium-robotics drives it: its hand points down, and 1.0 of an action is 0.05 m."""

VIEW = "render:distance=0.6,azimuth={},elevation=-20,lookat=1.34 0.75 0.53"
"""Of the place where the hand begins, so near that the ball is five of the 64 pixels that the policy sees."""
FETCH_REACH = gym.Layout(
    "FetchReach-v4",
    {"side": VIEW.format(90), "front": VIEW.format(180)},
    state=("achieved_goal",),
    instruction="move the hand to the red ball",
    imports=("gymnasium_robotics",),
    options=json.dumps({"width": 96, "height": 96}),
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
            cameras=("side", "front"),
            head=MLPHeadConfig(hidden_size=128, trunk=(256, 128)),
            proprio=ProprioConfig(enabled=True),
            action_low=(-1.0,) * 4,
            action_high=(1.0,) * 4,
        ),
        data=DataConfig(
            root="data/fetch_reach",
            windows_per_segment=1,
            num_threads=2,
            prefetch=4,
        ),
        optimizer=OptimizerConfig(learning_rate=8e-4, weight_decay=0.01, schedule="cosine", warmup_steps=100),
        train=TrainConfig(
            output="runs/fetch_reach",
            steps=2000,
            init_from=str(twin.DIRECTORY),
            batch_size=64,
            log_every=100,
            eval_every=0,
            checkpoint_every=1000,
        ),
        evaluation=EvaluationConfig(batches=5, episodes=2),
        recording=gym_loop.RecordingConfig(
            expert="robovlms_jax.envs.gym_experts:fetch_reach",
            episodes=800,
            validation_episodes=40,
            noise=0.08,
            wander=6,
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
        if config.trials.count:
            config.trials.execution.require(robot)
        if config.recording.episodes:
            run.require_consistent(config.experiment)
            counts = gym_loop.record(config.layout, robot, config.recording, config.data.root)
            if counts["attempted"]:
                logger.info("%(recorded)d of %(attempted)d demonstrations succeed, %(frames)d frames", counts)
    except KeyboardInterrupt:
        ending.stop("demonstrations that were recorded are kept, and the same command goes on with the others.")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    finished = run.run(name, config.experiment, title=config.layout.id, closing=REAL_THING)
    if finished and config.trials.count:
        try_out(config, output)


def try_out(config: GymConfig, output: pathlib.Path) -> None:
    """The run's policy in episodes of its own; what came of them joins the run's report."""
    from robovlms_jax.evaluation.report import page
    from robovlms_jax.runs import load
    from robovlms_jax.training import checkpoints, seals

    policy = load.load_batched_policy(output, min(config.trials.environments, config.trials.count))
    identity = seals.identity(checkpoints.locate(output)).label
    section = gym_loop.evaluate(policy, config.layout, config.policy.robot, config.trials, output, identity)
    logger.info("report: %s (the same as text: report.md)", page.put_section(output, section))


if __name__ == "__main__":
    main()
