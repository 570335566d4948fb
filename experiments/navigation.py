"""A mobile base that understands Korean: record the expert, train a policy with three actions, drive it, report.

python -m experiments.navigation                                   # the whole way on a laptop, about ten minutes
python -m experiments.navigation --train.resume                    # drives and report of a finished run again
python -m experiments.navigation --backbone.name paligemma-3b-224 --backbone.weights DIR --out runs/base_3b

The eight scenarios, their sentences and the simulator: docs/navigation.md.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
from collections.abc import Sequence

from robovlms_jax import cli, ending
from robovlms_jax.backbones.config import BackboneConfig
from robovlms_jax.data.config import DataConfig
from robovlms_jax.driving import world
from robovlms_jax.driving.config import DrivesConfig, RecordingConfig
from robovlms_jax.evaluation.config import EvaluationConfig
from robovlms_jax.policies.config import PolicyConfig, ProprioConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.runs import logs
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class NavigationConfig(ExperimentConfig):
    """A run, what is recorded before it and what is driven after it."""

    recording: RecordingConfig = RecordingConfig()
    drives: DrivesConfig = DrivesConfig()

    @property
    def experiment(self) -> ExperimentConfig:
        """What a checkpoint keeps."""
        names = [field.name for field in dataclasses.fields(ExperimentConfig)]
        return ExperimentConfig(**{name: getattr(self, name) for name in names})


SMALL = NavigationConfig(
    backbone=BackboneConfig(name="kosmos-2-twin"),
    policy=PolicyConfig(
        window=1,
        chunk=8,
        robot=world.ROBOT,
        cameras=("front",),
        head=LSTMHeadConfig(hidden_size=128, num_layers=1, trunk=(256, 128)),
        proprio=ProprioConfig(enabled=True),
        action_low=tuple(dimension.low for dimension in world.ROBOT.action),
        action_high=tuple(dimension.high for dimension in world.ROBOT.action),
    ),
    data=DataConfig(
        root="data/navigation",
        windows_per_segment=1,
        vary_language=True,
        shift={"front": 1},
        num_threads=2,
        prefetch=4,
    ),
    optimizer=OptimizerConfig(learning_rate=6e-4, weight_decay=0.01, schedule="cosine", warmup_steps=100),
    train=TrainConfig(
        output="runs/navigation", steps=6000, batch_size=64, log_every=200, eval_every=0, checkpoint_every=2000
    ),
    evaluation=EvaluationConfig(batches=10, episodes=2),
)

PRESETS = {"navigation": SMALL}

REAL_THING = """\
For your own base, record a LeRobotDataset with Korean instructions and see experiments.lerobot, preset mobile_base; for
published weights pass --backbone.weights (PaliGemma and Qwen read Korean; KOSMOS-2 does not: docs/navigation.md)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Record, train, drive, report. Errors of the user end the process with a message and status 1."""
    name, config = cli.parse(PRESETS, "navigation", description=__doc__, argv=argv)
    from robovlms_jax.runs import driving, run  # takes longer than all that --help needs, as below
    from robovlms_jax.training import checkpoints

    logs.to_stderr()
    output = pathlib.Path(config.train.output)
    try:
        if not config.train.resume:
            checkpoints.require_free(output, resume=False)
        if config.recording.episodes:
            run.require_consistent(config.experiment)
            driving.ensure_recorded(config.recording, config.data.root)
    except KeyboardInterrupt:
        ending.stop("demonstrations that were recorded are kept, and the same command goes on with the others.")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    finished = run.run(name, worded(config).experiment, title="navigation", closing=REAL_THING)
    if finished and config.drives.trials:
        drive(config.drives, output)


def worded(config: NavigationConfig) -> NavigationConfig:
    """With the recording's own wordings where other ones are not named: the built-in templates are English."""
    from robovlms_jax.data import language

    path = pathlib.Path(config.data.root) / language.PARAPHRASES
    if not config.data.vary_language or config.data.paraphrases or not path.exists():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, paraphrases=str(path)))


def drive(config: DrivesConfig, output: pathlib.Path) -> None:
    """Drive the run's policy and add what came of it to the run's report."""
    from robovlms_jax.evaluation.report import page
    from robovlms_jax.runs import driving, load
    from robovlms_jax.training import checkpoints, seals

    policy = load.load_batched_policy(output, config.rooms)
    identity = seals.identity(checkpoints.locate(output)).label
    found = driving.evaluate(policy, config, output / "drives", identity)
    films = driving.film(policy, config, output / "drives" / identity / "films")
    text = driving.section(found, films, output)
    logger.info("report: %s (the same as text: report.md)", page.put_section(output, text))


if __name__ == "__main__":
    main()
