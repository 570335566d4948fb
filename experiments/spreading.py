"""Work over files that the programs let a Ray cluster do: packing and indexing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from robovlms_jax.data import workers
from robovlms_jax.parallel import ray_workers
from robovlms_jax.parallel.config import RayConfig


@contextlib.contextmanager
def over_files(config: RayConfig) -> Iterator[None]:
    """In this block shards are packed and indexed by the cluster's workers, where `config` asks for any; its machines
    see the same files under the same paths."""
    if not config.workers:
        yield
        return
    with ray_workers.joined(config) as ray, workers.elsewhere(ray_workers.completed(config, ray)):
        yield
