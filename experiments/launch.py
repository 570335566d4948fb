"""Starts a training experiment from its command line. What a run needs is imported after --help is answered: it takes
longer than everything else that --help needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from robovlms_jax import cli
from robovlms_jax.runs.config import ExperimentConfig


def main(
    presets: Mapping[str, ExperimentConfig],
    default: str | Callable[[Sequence[str]], str],
    *,
    description: str,
    upstream_json: bool = True,
    **words: str,
) -> None:
    """Train and report as the command line says. Errors of the user end the process with a message.

    Args:
      presets, default, description: for `cli.parse`.
      upstream_json: whether --upstream_json FILE is a way to start.
      words: title and closing words of the report, for `run.run`.
    """
    read = read_upstream if upstream_json else None
    name, config = cli.parse(presets, default, description=description, read_json=read)
    from robovlms_jax.runs import run

    run.run(name, config, **words)


def read_upstream(path: str) -> ExperimentConfig:
    """One of RoboVLMs' own JSON files as a configuration. Raises ValueError, OSError."""
    from robovlms_jax import upstream

    return upstream.load_experiment(path)
