"""Which numbers a run will write into its metrics.jsonl, said before it has begun."""

from __future__ import annotations

from robovlms_jax import schema
from robovlms_jax.envs.calvin.tasks import TASKS
from robovlms_jax.evaluation import offline
from robovlms_jax.policies import objective
from robovlms_jax.policies.tasks import registry
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import goodput, stages

EVERY_STEP = ("grad_norm", "learning_rate", "corrupt_segments")
SPEED = ("steps_per_second", "windows_per_second", "data_wait_share", "compilations", "goodput")
ERRORS = tuple(name for name in offline.Summary._fields if not name.startswith(("mae", "rmse")))
"""`offline.scalars`: what has one number for all dimensions."""


def names(config: ExperimentConfig) -> tuple[str, ...]:
    """All that a run can write, but for errors by dimension (validation/mae/NAME), which follow from the robot of its
    data. A robot without a gripper, or a dataset without a validation split, writes less."""
    robot = ("loss", *config.policy.head.metrics, *_of_tasks(config))
    found = [f"train/{name}" for stage in stages.plan(config.train, config.optimizer) for name in _of(stage, config)]
    found += [f"train/{name}" for name in (*EVERY_STEP, *SPEED)]
    if config.train.on_nonfinite == "skip":
        found.append("train/skipped_steps")
    found += [f"validation/{name}" for name in (*robot, *ERRORS)]
    found += [f"validation/{kind}_{name}" for name in config.data.vl.validation for kind in ("accuracy", "loss")]
    if rolls_out(config):
        found += ["rollouts/score", *(f"rollouts/task/{task}" for task in config.rollouts.tasks or TASKS)]
    found += [f"goodput/{phase}" for phase in goodput.PHASES]
    return tuple(dict.fromkeys(found))


def rolls_out(config: ExperimentConfig) -> bool:
    """Whether rollouts are among the metrics: those of the report alone are not."""
    asked, steps = config.rollouts, sum(stage.steps for stage in config.train.stages) or config.train.steps
    meanwhile = asked.every > 0 and (asked.every < steps or config.train.epochs > 0)
    return asked.trials > 0 and (meanwhile or asked.select == "best")


def while_learning(name: str, config: ExperimentConfig) -> bool:
    """Whether one of `names` is written while the run goes on, and not at its end alone."""
    steps = sum(stage.steps for stage in config.train.stages) or config.train.steps
    every = {"validation": config.train.eval_every, "rollouts": config.rollouts.every, "train": 1}
    step = every.get(name.partition("/")[0], 0)
    return 0 < step < steps or (step > 0 and config.train.epochs > 0)


def is_better_higher(name: str) -> bool:
    """Whether the number is one of successes or right answers, and not of errors."""
    kind, _, number = name.partition("/")
    return kind == "rollouts" or number.startswith(("acc", "token_accuracy", "gripper_accuracy", "gripper_f1"))


def require(name: str, config: ExperimentConfig, owner: str) -> None:
    """Raises ValueError that begins with `owner`, the setting that asks for `name`: no run of this configuration writes
    it; says what it does write."""
    known = names(config)
    if name in known or (name.startswith("validation/mae/") and config.data.dataset != "calvin"):
        return
    near = schema.nearest(name, known)
    if name.startswith("rollouts/") and not rolls_out(config):
        near = ": rollouts are among a run's metrics with rollouts.trials and rollouts.select=best or rollouts.every."
    raise ValueError(f"{owner}={name!r} is nothing that a run writes{near} It writes {', '.join(known)}.")


def _of_tasks(config: ExperimentConfig) -> list[str]:
    return [name for task in registry.make(config.policy) for name in task.metrics]


def _of(stage: stages.Stage, config: ExperimentConfig) -> list[str]:
    """Metrics of a training step, as `objective.LossBySource` names them."""
    data, drawn = config.data, [name for name, share in stage.sources.items() if share]
    robots = [objective.ROBOT, *data.others.roots, *data.further.names]
    order = [name for name in (*robots, *data.vl.paths) if name in drawn and name not in data.further.unlabelled]
    found = ["loss"]
    for place, source in enumerate(order):
        answers = source in data.vl.paths
        own = ["token_accuracy"] if answers else [*config.policy.head.metrics, *_of_tasks(config)]
        found += [f"{name}_{source}" for name in ("loss", *own)] if place else own
        if not place and len(order) > 1:
            found.append(f"loss_{source}")
    for name in data.further.align:
        found += [f"means_apart_{name}", f"covariances_apart_{name}"] if name in drawn else []
    return found
