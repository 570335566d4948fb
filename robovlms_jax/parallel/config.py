"""How devices and processes share a run."""

from __future__ import annotations

import dataclasses
import math

from robovlms_jax import schema
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("mesh")
class MeshConfig:
    """How many devices share what. -1 takes all that are left."""

    data: int = -1
    """Copies of the model, each with its own part of the batch."""
    fsdp: int = 1
    """Devices that split parameters and optimizer state (and the batch)."""
    tensor: int = 1
    """Devices that split each matrix product."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        require(all(size == -1 or size >= 1 for size in sizes), f"mesh sizes {sizes} must be positive or -1.")
        require(sizes.count(-1) <= 1, f"mesh sizes {sizes}: at most one may be -1.")

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) with -1 filled in. Raises ValueError when they do not make `num_devices`."""
        sizes = [self.data, self.fsdp, self.tensor]
        fixed = 1
        for size in sizes:
            fixed *= 1 if size == -1 else size
        if -1 in sizes and num_devices % fixed == 0:
            sizes[sizes.index(-1)] = num_devices // fixed
        elif -1 in sizes or fixed != num_devices:
            ways = "".join(f" {name}={size}, or" for name, size in _nearest(sizes, num_devices).items())
            raise ValueError(
                f"mesh.data={sizes[0]} x mesh.fsdp={sizes[1]} x mesh.tensor={sizes[2]} does not make the "
                f"{num_devices} devices present; set{ways} one of them to -1 to take what is left."
            )
        return tuple(sizes)


def _nearest(sizes: list[int], num_devices: int) -> dict[str, int]:
    """Field -> the size nearest to the one it has with which, the others as they are, the mesh fits the devices."""
    near = {}
    for index, name in enumerate(("mesh.data", "mesh.fsdp", "mesh.tensor")):
        others = sizes[:index] + sizes[index + 1 :]
        left, rest = divmod(num_devices, math.prod(size for size in others if size != -1))
        if sizes[index] == -1 or rest:
            continue
        # A -1 among the others takes whatever share of it this one leaves.
        fitting = [n for n in range(1, left + 1) if left % n == 0] if -1 in others else [left]
        near[name] = min(fitting, key=lambda n: abs(n - sizes[index]))
    return near


@dataclasses.dataclass(frozen=True)
@schema.checked("distributed")
class DistributedConfig:
    """How the processes of a run find each other; docs/clusters.md has the commands. No part of what a run computes,
    and not kept with it."""

    coordinator: str = "auto"
    """auto: join the others on Cloud TPU, under SLURM and under Open MPI, be alone elsewhere. HOST:PORT: where process
    0 waits for the others. none: be alone."""
    num_processes: int | None = None
    """Processes of the run, where HOST:PORT is given; SLURM and Open MPI know it."""
    process_id: int | None = None
    """This one's number, from 0."""
    start_timeout_s: int = 300
    """Seconds to wait for all processes to come."""
    peer_timeout_s: int = 60
    """A process that gives no sign of life for this many seconds is dead, and the others end with an error."""

    def __post_init__(self):
        for field in ("start_timeout_s", "peer_timeout_s"):
            require(getattr(self, field) >= 1, f"distributed.{field}={getattr(self, field)} must be at least 1.")


@dataclasses.dataclass(frozen=True)
@schema.checked("ray")
class RayConfig:
    """Workers of a Ray cluster that share work whose parts need nothing of each other (`pip install -e '.[ray]'`)."""

    workers: int = 0
    """How many. 0: this process does it all, without Ray."""
    address: str = ""
    """HOST:PORT of the cluster. Empty: the one that RAY_ADDRESS names or that this machine is part of, else one made of
    this machine for the time of the work. local: always the latter."""
    cpus: float = 1.0
    """Processors that each worker is given; the cluster starts no more workers on a machine than it has of them."""
    gpus: float = 0.0
    """GPUs that each worker is given, a part of one such as 0.25 too. 0: workers see none."""

    def __post_init__(self):
        require(self.workers >= 0, f"ray.workers={self.workers} must be 0 (without Ray) or positive.")
        require(self.cpus > 0, f"ray.cpus={self.cpus} must be positive.")
        require(self.gpus >= 0, f"ray.gpus={self.gpus} must not be negative.")
        others = {"address": self.address != "", "cpus": self.cpus != 1.0, "gpus": self.gpus != 0.0}
        named = [f"ray.{name}" for name, is_set in others.items() if is_set and not self.workers]
        require(not named, f"{', '.join(named)} without ray.workers has no effect; say how many workers.")
