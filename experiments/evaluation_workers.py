"""An evaluation's trials, played by workers of a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments import evaluate, evaluation_settings
from robovlms_jax.control.execution import ExecutedBatch
from robovlms_jax.evaluation import rollout
from robovlms_jax.evaluation.rollout import Films, Recording, SuccessCriterion, Trial, TrialResult
from robovlms_jax.parallel import ray_workers
from robovlms_jax.runs import logs

_CHUNKS = 4
"""Parts of the trials for each worker: a fast worker takes more of them than a slow one, and a lost one takes few."""


_open = contextlib.ExitStack()
"""What a worker keeps open as long as it lives; simulators end with their parent. What nobody refers to is closed."""


@dataclasses.dataclass(frozen=True)
class Simulators:
    """The workers' simulators, as far as results depend on what they are (`vector.VectorEnv`)."""

    name: str
    about: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Players:
    """Workers that each hold the policy and `processes` simulators."""

    simulators: Simulators
    play: Callable[[Sequence[Trial]], Iterator[TrialResult]]
    """Plays trials in parts; results come as parts end."""


@contextlib.contextmanager
def players(
    config: evaluation_settings.EvaluateConfig,
    criterion: SuccessCriterion,
    filmed: Sequence[int],
    keep: Callable[[Recording], None],
) -> Iterator[Players]:
    """Workers for an evaluation.

    Args:
      filmed: indices of trials. keep: gets each film here, with its results.
    """
    with ray_workers.joined(config.ray) as ray:
        pool = ray_workers.Pool(ray, config.ray, functools.partial(_player, config, criterion, tuple(filmed)))
        ((_, simulators),) = pool.results([()])

        def play(trials: Sequence[Trial]) -> Iterator[TrialResult]:
            for _, (results, recordings) in pool.results(chunks(trials, config.ray.workers, config.processes)):
                for recording in recordings:
                    keep(recording)
                yield from results

        yield Players(simulators, play)


def chunks(trials: Sequence[Trial], workers: int, processes: int) -> list[Sequence[Trial]]:
    """Consecutive parts of `trials`, of `processes` or more: a worker plays so many side by side."""
    size = max(processes, -(-len(trials) // (workers * _CHUNKS)))
    return [trials[begin : begin + size] for begin in range(0, len(trials), size)]


def _player(
    config: evaluation_settings.EvaluateConfig, criterion: SuccessCriterion, filmed: tuple[int, ...]
) -> Callable[[Sequence[Trial]], Any]:
    """On a worker: trials -> their results and films; no trials -> what the simulators are."""
    logs.to_stderr(absl=logging.ERROR)
    policy, envs, on_device = _open.enter_context(evaluate.acting(config, criterion))

    def play(trials: Sequence[Trial]) -> Any:
        if not trials:
            return Simulators(envs.name, dict(envs.about))
        recordings: list[Recording] = []
        if on_device is not None:
            return list(on_device(trials)), recordings
        executed, films = ExecutedBatch(policy, config.execution), Films(filmed, recordings.append)
        return list(rollout.run(executed, envs, trials, criterion, films=films)), recordings

    return play
