"""Demonstrations of other robots beside the policy's own: opened, measured, and made part of the policy."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from robovlms_jax.data import base, excerpts, notices, opening
from robovlms_jax.data.config import DataConfig
from robovlms_jax.policies import embodiments
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.runs import robots
from robovlms_jax.runs.config import ExperimentConfig

logger = logging.getLogger(__name__)

Statistics = Callable[[ExperimentConfig, base.Dataset], tuple[np.ndarray, Mapping[str, np.ndarray]]]
"""A sample of a dataset's actions, and their statistics (`setup.training_actions`)."""


def open_datasets(config: ExperimentConfig) -> dict[str, base.Dataset]:
    """Source -> the training split behind it. Raises what `opening.open_split` does, naming the source."""
    found = {}
    for name in config.data.others.roots:
        try:
            found[name] = opening.open_split(data_of(config.data, name), "training")
        except (ValueError, OSError) as error:
            raise notices.about(f"source {name!r}", error) from None
    return found


def data_of(data: DataConfig, name: str) -> DataConfig:
    """The settings by which a source is read: the run's own, but for what is about one dataset."""
    chosen = {"dataset": data.others.datasets.get(name, "calvin"), "root": data.others.roots[name]}
    about_one = ("conventions", "statistics", "reference", "episode_list", "exclude_tasks")
    chosen |= {field: getattr(DataConfig, field) for field in about_one}
    return dataclasses.replace(data, compat_second_norm=False, compat_goal_relabelling=False, **chosen)


def with_others(
    config: ExperimentConfig, datasets: Mapping[str, base.Dataset], statistics: Statistics
) -> ExperimentConfig:
    """With `policy.others` and `policy.shared` as the data say. Bounds are the 1 % and 99 % quantiles of each robot's
    own actions. Those of a resumed run stay as they are, and are compared.

    Raises ValueError: a source is no longer that of its robot, or robots cannot share a head.
    """
    if not datasets:
        return config
    found = tuple(_measured(config, name, dataset, statistics) for name, dataset in datasets.items())
    if config.policy.others:
        _require_known(config.policy, found)
        return config
    own = config.policy.predicted
    shared = embodiments.SharedActions()
    if config.policy.other_heads == "shared":
        shared = embodiments.shared_by([own, *(other.robot for other in found)])
        logger.info("all robots share a head with the outputs %s", list(shared.names))
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, others=found, shared=shared))


def _measured(
    config: ExperimentConfig, name: str, dataset: base.Dataset, statistics: Statistics
) -> embodiments.OtherRobotConfig:
    cameras = tuple(camera for camera in config.policy.cameras if camera in dataset.cameras) or dataset.cameras
    logger.info(
        "source %s: robot %s, actions %s, cameras %s",
        *(name, dataset.robot.name, robots.describe(dataset.robot), list(cameras)),
    )
    measured = dataclasses.replace(
        config.policy,
        robot=dataset.robot,
        cameras=cameras,
        representation="robot",
        action_scaling="quantile",
        action_low=PolicyConfig.action_low,
        action_high=PolicyConfig.action_high,
        proprio=type(config.policy.proprio)(),
        sensors=(),
        others=(),
        shared=embodiments.SharedActions(),
    )
    of_source = dataclasses.replace(config, policy=measured, data=data_of(config.data, name))
    measured = measured.with_statistics(statistics(of_source, dataset)[1])
    state: dict[str, Any] = {}
    numbers = [i for i, dimension in enumerate(dataset.robot.state) if dimension.kind != "binary"]
    if config.policy.proprio.enabled and numbers:
        states = np.asarray(excerpts.state_sample(dataset, 1_000), np.float64)[:, numbers]
        scale = np.where(states.std(axis=0) < 1e-6, 1.0, states.std(axis=0))
        state = {"state_center": tuple(states.mean(axis=0).tolist()), "state_scale": tuple(scale.tolist())}
    bounds = {"action_low": measured.action_low, "action_high": measured.action_high}
    return embodiments.OtherRobotConfig(name, dataset.robot, cameras, **bounds, **state)


def _require_known(policy: PolicyConfig, found: tuple[embodiments.OtherRobotConfig, ...]) -> None:
    known = {other.name: other for other in policy.others}
    if set(known) != {other.name for other in found}:
        raise ValueError(
            f"the checkpoint's other robots are {sorted(known)}, data.others.roots has "
            f"{sorted(other.name for other in found)}."
        )
    for other in found:
        robots.require_same(embodiments.view(policy, other.name), other.robot, f"source {other.name!r} was recorded by")
