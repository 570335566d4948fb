"""Several processes as one program: found, started once before anything touches a device, and ended together."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

LAUNCHERS = {
    "SLURM": ("SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}
"""Launcher -> environment variables that hold the number of processes and this one's."""

_TELLS_ADDRESS = {"SLURM": "SLURM_STEP_NODELIST", "Open MPI": "OMPI_MCA_orte_hnp_uri"}  # what jax derives it from

AGAIN = 75
"""Exit status (EX_TEMPFAIL of sysexits.h) of a process that ends for no fault of its own: what started it may start it
again (launch/)."""

_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")  # errors of devices that the next start would meet, too

_LEAVE_TOGETHER_S = 10  # how long a process that failed waits for the others to fail in the same way
_FOREVER_S = 7 * 24 * 3600  # barriers at which others wait while one works; a dead peer ends them much earlier

_passed = itertools.count()  # a barrier's key is used once


@dataclasses.dataclass(frozen=True)
class Plan:
    """How this process joins others. `detected`: by whom; None fields are what jax finds out itself there."""

    detected: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def plan(
    coordinator: str, num_processes: int | None, process_id: int | None, environ: Mapping[str, str], platforms: str
) -> Plan | None:
    """What to join, from flags and surroundings; None: this process is alone, and nothing is to be started.

    Args:
      coordinator: HOST:PORT of process 0; "auto" looks for Cloud TPU, SLURM and Open MPI; "none" looks for nothing.
      num_processes, process_id: given with HOST:PORT; None there asks the launcher.
      platforms: `jax.config.jax_platforms`; jax puts "tpu" there on a Cloud TPU machine.
    Raises:
      ValueError: flags that contradict each other, or a launcher that does not tell what is needed.
    """
    given = num_processes is not None or process_id is not None
    if coordinator in ("auto", "none"):
        if given:
            raise ValueError(
                "distributed.num_processes and distributed.process_id need distributed.coordinator=HOST:PORT (it is "
                f"{coordinator!r}): where process 0 waits for the others."
            )
        return None if coordinator == "none" else _detect(environ, platforms)
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator):
        raise ValueError(f"distributed.coordinator={coordinator!r} must be HOST:PORT, auto or none.")
    launcher = _launcher(environ)
    if launcher is not None:
        size, rank = (int(environ[name]) for name in LAUNCHERS[launcher])
        num_processes = size if num_processes is None else num_processes
        process_id = rank if process_id is None else process_id
    if num_processes is None or process_id is None:
        raise ValueError(
            "distributed.coordinator needs distributed.num_processes, and distributed.process_id different in every "
            f"process; they are {num_processes} and {process_id}, and no launcher ({', '.join(LAUNCHERS)}) is here to "
            "ask."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"distributed.process_id={process_id} must lie in [0, distributed.num_processes={num_processes})."
        )
    return Plan(launcher or "flags", coordinator, num_processes, process_id)


def _launcher(environ: Mapping[str, str]) -> str | None:
    return next((name for name, variables in LAUNCHERS.items() if all(v in environ for v in variables)), None)


def _detect(environ: Mapping[str, str], platforms: str) -> Plan | None:
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    # Elsewhere than on GKE the metadata server knows the hosts, unless it is not to be asked. `hosts` are those of one
    # slice: of several slices, each may have one alone.
    several = "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    if "tpu" in platforms.split(",") and (several or not (hosts or "TPU_SKIP_MDS_QUERY" in environ)):
        return Plan("Cloud TPU")
    launcher = _launcher(environ)
    if launcher is None or int(environ[LAUNCHERS[launcher][0]]) == 1:
        return None
    if _TELLS_ADDRESS[launcher] in environ:
        return Plan(launcher)
    if launcher == "SLURM":  # the batch script itself: `srun` starts the processes of a step, this is none of them
        return None
    raise ValueError(
        f"{launcher} started {environ[LAUNCHERS[launcher][0]]} processes but does not say where (versions from 5 on do "
        "not); pass --distributed.coordinator HOST:PORT with the host of rank 0, or none for processes that have "
        "nothing to do with each other."
    )


@contextlib.contextmanager
def joined(
    coordinator: str = "auto",
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout_s: int = 300,
    peer_timeout_s: int = 60,
) -> Iterator[None]:
    """The processes of a run are one program within this block; without others (see `plan`) it does nothing.

    Enter it before anything touches a device. All leave together: at its end each waits for the others. One that fails
    ends its peers: it waits 10 s for them to fail likewise (a mistake in the configuration is everybody's), then goes
    without them, and their next exchange fails, or `peer_timeout_s` after its last sign of life they are ended. A
    process whose exchange failed ends with the status `AGAIN`.

    Raises:
      ValueError: see `plan`.
      RuntimeError: a device was in use already, or not all processes came within `start_timeout_s`.
    """
    found = plan(coordinator, num_processes, process_id, os.environ, jax.config.jax_platforms or "")
    if found is None:
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would swallow the signal until the training loop installs its own.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        found.coordinator,
        found.num_processes,
        found.process_id,
        # Flags say everything; asking a cluster that nobody mentioned can only fail.
        cluster_detection_method="deactivate" if found.detected == "flags" else None,
        initialization_timeout=start_timeout_s,
        heartbeat_timeout_seconds=peer_timeout_s,
        shutdown_timeout_seconds=peer_timeout_s,
    )
    logger.info("process %d of %d, by %s", jax.process_index(), jax.process_count(), found.detected)
    try:
        yield
        barrier("leave")
    except BaseException as error:
        # The interpreter's own end would wait for peers that are still at work.
        _leave_together(error)
        raise


def _leave_together(error: BaseException) -> None:
    """Return if every process fails now; end this one otherwise."""
    if jax.process_count() == 1:
        return
    try:
        _meet("failed", _LEAVE_TOGETHER_S)
    except Exception:  # of jaxlib's own making; whatever it is, the others are not coming
        expected = isinstance(error, ValueError | OSError)
        lost = isinstance(error, jax.errors.JaxRuntimeError) and not any(fault in str(error) for fault in _OWN_FAULTS)
        logger.error("process %d fails: %s", jax.process_index(), error, exc_info=None if expected else error)
        logging.shutdown()
        sys.stderr.flush()
        os._exit(AGAIN if lost else 1)


def barrier(name: str) -> None:
    """Wait until every process is here; all pass the same barriers in the same order.

    Devices take no part, so it may take long, while collectives give up on a process that comes late.
    """
    if jax.process_count() > 1:
        _meet(f"{name}_{next(_passed)}", _FOREVER_S)


def _meet(key: str, timeout_s: int) -> None:
    import orbax.checkpoint as ocp  # where there are several processes only

    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_s * 1000)


def from_first(value: float) -> float:
    """Process 0's float64 value, on all."""
    if jax.process_count() == 1:
        return value
    # As bytes: arrays on devices have 32 bits.
    whole = np.frombuffer(np.float64(value).tobytes(), np.uint8)
    return float(np.frombuffer(np.asarray(multihost_utils.broadcast_one_to_all(whole)).tobytes(), np.float64)[0])


def of_all(value: float) -> np.ndarray:
    """[processes]: every process's value, on all; all of them call it at the same step."""
    return np.array([value]) if jax.process_count() == 1 else multihost_utils.process_allgather(np.array(value))
