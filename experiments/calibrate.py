"""Calibrate a checkpoint on its validation split: intervals that hold what would be demonstrated, 9 times out of 10.

    python -m experiments.calibrate --checkpoint runs/playtable_fixtures
    python -m experiments.calibrate --checkpoint runs/playtable_fixtures --rollouts runs/playtable_fixtures/rollouts/...

calibration.json is written beside the checkpoint's parts; from then on its actions carry intervals, also through the
server. With `rollouts` nothing is calibrated for serving: it measures whether uncertainty tells failed trials from
successful ones, and writes detection.json there. docs/serving.md says what either promises.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys

from robovlms_jax import atomic, cli, ending, hub
from robovlms_jax.evaluation import chains, detection
from robovlms_jax.nn import stack
from robovlms_jax.policies.serving import BatchedVLAPolicy
from robovlms_jax.runs import calibrating, logs, saved
from robovlms_jax.runs.load import load_batched_policy, load_config
from robovlms_jax.training import checkpoints, seals

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CalibrateConfig:
    """What to calibrate, on what."""

    checkpoint: str
    """Run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME."""
    root: str = ""
    """Where the dataset lies now; empty: where it lay in training."""
    rollouts: str = ""
    """A folder with results-*.jsonl of experiments.evaluate on this checkpoint: measure failure detection instead."""
    coverage: float = 0.9
    """How many actions the intervals are to hold, as a share; with rollouts, how many successful trials are to end
    without an alarm."""
    share: float = 0.5
    """Of the validation episodes (or rollouts), for calibration; the others measure the coverage."""
    num_samples: int = 0
    """Flow heads: chunks drawn for the spread (`policy.head.num_samples`); serve with the same. 0: as saved."""
    splits: int = 200
    """Further random splits to measure the coverage (or alarms) on."""
    seed: int = 0

    def __post_init__(self):
        if not (0 < self.coverage < 1 and 0 < self.share < 1):
            raise ValueError(f"coverage={self.coverage} and share={self.share} must lie between 0 and 1.")
        if self.splits < 1 or self.num_samples < 0:
            raise ValueError(f"splits={self.splits} must be at least 1, num_samples={self.num_samples} not negative.")
        if self.rollouts and (self.root or self.num_samples):
            raise ValueError(
                "root and num_samples are not read with rollouts, whose uncertainty is stored; leave them."
            )


def calibrate(config: CalibrateConfig) -> str:
    """Writes the calibration and returns what to print."""
    if hub.is_name(config.checkpoint):  # its cache is no place for results, and another revision would be without it
        raise ValueError(
            f"checkpoint={config.checkpoint}: a calibration is written beside the checkpoint, and Hugging Face's cache "
            f"is no place for it. Fetch the policy first: python -m experiments.pull --name "
            f"{hub.as_written(config.checkpoint).removeprefix(hub.PREFIX)} --out runs/mine"
        )
    directory, experiment = checkpoints.locate(config.checkpoint), load_config(config.checkpoint)
    if config.root:
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, root=config.root))
    changes = {"head": {"num_samples": config.num_samples}} if config.num_samples else None
    policy: BatchedVLAPolicy = load_batched_policy(directory, slots=1, policy=changes)
    experiment = dataclasses.replace(experiment, policy=policy.model.config)
    policy.params = stack.joined(policy.params)  # its own step is not asked here: one copy is enough
    compared = calibrating.compare(experiment, policy.model, policy.params, policy.encode_text)
    calibration, measured = calibrating.calibrate(
        compared, config.coverage, share=config.share, splits=config.splits, seed=config.seed
    )
    facts = {"checkpoint": seals.identity(directory).label, "measured": dataclasses.asdict(measured)}
    path = saved.write_calibration(directory, calibration, facts)
    lines = [
        f"{path}: {calibration.coverage:.0%} intervals from {calibration.episodes} episodes, measured on "
        f"{measured.episodes} others, each counting as one",
        "step of the chunk: coverage +- standard error; mean and deviation over "
        f"{measured.splits} random splits; quantile of the score",
    ]
    rows = zip(
        measured.share, measured.error, measured.repeated, measured.deviation, calibration.quantiles, strict=True
    )
    for step, (share, error, mean, deviation, quantile) in enumerate(rows):
        lines.append(f"{step:3d}  {share:.3f} +- {error:.3f}  {mean:.3f} +- {deviation:.3f}  {quantile:.3g}")
    return "\n".join(lines)


def detect(config: CalibrateConfig) -> str:
    """Measures failure detection on stored rollouts, writes detection.json there and returns what to print."""
    label = seals.identity(checkpoints.locate(config.checkpoint)).label
    evaluation = chains.load(config.rollouts)
    found = evaluation.setup.get("checkpoint")
    if found != label:
        raise ValueError(
            f"{config.rollouts} has results of checkpoint {found}, and {config.checkpoint} is {label}; give the folder "
            "of its own rollouts."
        )
    try:
        trials = detection.episodes(evaluation.results)
        measured = detection.measure(
            trials, config.coverage, share=config.share, splits=config.splits, seed=config.seed
        )
    except ValueError as error:
        raise ValueError(f"{config.rollouts}: {error}") from error
    facts = {"setup": dict(evaluation.setup), "results": len(evaluation.results), "trials": len(trials)}
    path = pathlib.Path(config.rollouts) / "detection.json"
    atomic.write_json(path, facts | {"share": config.share, "seed": config.seed} | dataclasses.asdict(measured))
    return f"{path}\n{detection.table(measured)}"


def main() -> None:
    logs.to_stderr()
    config = cli.read(CalibrateConfig, description=__doc__)
    try:
        ending.show(detect(config) if config.rollouts else calibrate(config))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
