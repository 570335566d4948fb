"""More demonstrations by the policy's own robot, beside its first ones: opened, and what is learned of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from robovlms_jax.data import base, notices, opening, represented
from robovlms_jax.policies import alignment, objective
from robovlms_jax.policies.auxiliary_config import AuxiliaryConfig
from robovlms_jax.runs import robots
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import stages


def open_datasets(config: ExperimentConfig) -> dict[str, base.Dataset]:
    """Source -> the episodes of data.further, in the policy's representation of actions.

    Args:
      config: its policy is the robot's already (`robots.as_recorded`).
    Raises:
      ValueError, OSError: naming the source; also where another robot made them.
    """
    found = {}
    for name in config.data.further.names:
        data = dataclasses.replace(
            config.data,
            root=config.data.further.roots.get(name, config.data.root),
            episode_list=config.data.further.lists.get(name, ""),
            exclude_tasks=(),
        )
        try:
            opened = opening.open_split(data, "training")
            robots.require_recorded(view(config, name).policy, opened)
        except (ValueError, OSError) as error:
            raise notices.about(f"data.further, source {name!r}", error) from None
        found[name] = represented.represented(opened, config.policy.representation)
    return found


def view(config: ExperimentConfig, name: str) -> ExperimentConfig:
    """The configuration as a source's samples follow from it: those without labels are looked at alone."""
    if name not in config.data.further.unlabelled:
        return config
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, auxiliary=AuxiliaryConfig()))


def losses(
    config: ExperimentConfig, stage: stages.Stage, loss: objective.RobotLoss
) -> tuple[dict[str, objective.SourceLoss], dict[str, objective.SourceLoss]]:
    """Source -> the loss on its actions, and name -> the losses between it and the robot's demonstrations, of those
    that have a share in the stage.

    Args:
      loss: of the stage on the robot's own demonstrations.
    Raises:
      ValueError: sources shall be alike, and the stage draws from one of them alone.
    """
    asked = config.data.further
    present = [name for name in asked.names if stage.sources.get(name)]
    aligned = [name for name in present if name in asked.align]
    if aligned and not stage.sources.get(objective.ROBOT):
        raise ValueError(
            f"stage {stage.name!r}: data.further.align compares {aligned} with the robot's own demonstrations, which "
            "have no share in it. Give `robot` one, or leave them out of data.further.align."
        )
    learned = {name: loss for name in present if name not in asked.unlabelled}
    between: Mapping[str, objective.SourceLoss] = {
        f"align_{name}": alignment.AlignmentLoss(loss, (objective.ROBOT, name), asked.align[name]) for name in aligned
    }
    return dict(learned), dict(between)
