"""Who joins whom, and what processes that did join agree on."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from robovlms_jax.parallel import distributed
from robovlms_jax.parallel.config import DistributedConfig
from robovlms_jax.parallel.distributed import Plan

ROOT = pathlib.Path(__file__).resolve().parents[2]

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
STEP = {**SLURM, "SLURM_STEP_NODELIST": "node[1-2]"}
RANKS = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a"}
ADDRESS = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}


def planned(coordinator="auto", num_processes=None, process_id=None, environ=None, platforms=""):
    return distributed.plan(coordinator, num_processes, process_id, environ or {}, platforms)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, None),
        ({"platforms": "cpu", "environ": {"TPU_WORKER_HOSTNAMES": "a,b"}}, None),
        ({"coordinator": "none", "environ": STEP}, None),
        ({"environ": SLURM}, None),  # in the batch script, or an allocation's shell: not started by srun
        ({"environ": STEP | {"SLURM_NTASKS": "1"}}, None),
        ({"environ": STEP}, Plan("SLURM")),
        ({"environ": RANKS | ADDRESS}, Plan("Open MPI")),
        ({"platforms": "tpu,cpu"}, Plan("Cloud TPU")),
        ({"platforms": "tpu,cpu", "environ": {"TPU_WORKER_HOSTNAMES": "a,b"}}, Plan("Cloud TPU")),
        ({"platforms": "tpu,cpu", "environ": {"TPU_WORKER_HOSTNAMES": "localhost"}}, None),
        ({"platforms": "tpu,cpu", "environ": {"TPU_WORKER_HOSTNAMES": "a"} | SLICES}, Plan("Cloud TPU")),
        ({"platforms": "tpu,cpu", "environ": {"TPU_SKIP_MDS_QUERY": "1"}}, None),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 0}, Plan("flags", "a:1", 2, 0)),
        ({"coordinator": "a:1", "environ": RANKS}, Plan("Open MPI", "a:1", 4, 1)),
        ({"coordinator": "a:1", "process_id": 2, "environ": RANKS}, Plan("Open MPI", "a:1", 4, 2)),
    ],
)
def test_who_joins(arguments, expected):
    # Fails if a plain run would wait for processes that nobody started, or started ones each train alone.
    assert planned(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 2}, r"need distributed.coordinator=HOST:PORT \(it is 'auto'\)"),
        ({"coordinator": "none", "process_id": 0}, "need distributed.coordinator=HOST:PORT"),
        ({"coordinator": "localhost"}, "must be HOST:PORT, auto or none"),
        ({"coordinator": "a:1"}, "they are None and None"),
        ({"coordinator": "a:1", "num_processes": 2}, "they are 2 and None"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"process_id=2 must lie in \[0"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, r"process_id=-1 must lie in \[0"),
        ({"environ": RANKS}, "Open MPI started 4 processes but does not say where.*--distributed.coordinator"),
    ],
)
def test_what_cannot_join_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        planned(**arguments)


def test_timeouts_are_positive():
    with pytest.raises(ValueError, match=r"distributed\.peer_timeout_s=0"):
        DistributedConfig(peer_timeout_s=0)


PAIR = """
import json, logging, sys
import jax, numpy as np
from robovlms_jax.parallel import distributed, mesh as meshes
index, address = int(sys.argv[1]), sys.argv[2]
found = (address, 2, index) if address else ()  # otherwise a launcher's variables tell
with distributed.joined(*found, start_timeout_s=120, peer_timeout_s=60):
    out = {"processes": jax.process_count(), "devices": jax.device_count()}
    out["first"] = distributed.from_first(0.1 + index)
    for sizes in ((6, 1, 1), (1, 6, 1), (2, 1, 3), (1, 1, 6)):
        mesh = meshes.make_mesh(sizes)
        part, parts = meshes.batch_share(mesh)
        rows = np.arange(12.0).reshape(parts, -1)[part]
        batch = meshes.put_batch(rows, mesh)
        weights = meshes.whole({"x": jax.device_put(np.arange(12.0), meshes.batched(mesh))}, mesh)["x"]
        sums = jax.jit(lambda x: (x * np.arange(12.0)).sum(), out_shardings=meshes.replicated(mesh))(batch)
        out[str(sizes)] = [part, parts, batch.shape[0], float(sums), np.asarray(weights).tolist()]
    try:
        meshes.batch_share(meshes.make_mesh((3, 1, 2)))
    except ValueError as error:
        out["uneven"] = str(error)
    distributed.barrier("twice")
    distributed.barrier("twice")
print(json.dumps(out))
"""


def start_pair(script: str, *, launcher: str = "flags", **environment: str) -> list[subprocess.Popen]:
    """Two processes on this machine: `script INDEX localhost:PORT`; without the address where a launcher tells it."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, str(index), f"localhost:{port}" if launcher == "flags" else ""],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment, **variables(launcher, index, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]


def variables(launcher: str, index: int, port: int) -> dict[str, str]:
    """What the launcher puts into the environment of process `index` of two; the port is free, not derived from ids."""
    common = {"JAX_COORDINATOR_PORT": str(port)}
    if launcher == "SLURM":
        names = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        return common | names | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
    if launcher == "Open MPI":
        names = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}
        return common | names | {"OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_RANK": str(index)}
    return {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "launcher", ["flags", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SLURM", "Open MPI"))]
)
def test_two_processes_are_one_program(launcher):
    # Real processes, three devices each. Fails if they load other rows than their devices hold (for tensor parallelism
    # over both: the same rows), if rows change places, or if what one decides does not reach the other.
    outs = []
    for process in start_pair(PAIR, launcher=launcher, JAX_NUM_CPU_DEVICES="3"):
        out, messages = process.communicate(timeout=300)
        assert process.returncode == 0, messages
        outs.append(json.loads(out.splitlines()[-1]))
    for index, out in enumerate(outs):
        assert (out["processes"], out["devices"], out["first"]) == (2, 6, 0.1)
        for sizes, parts in {"(6, 1, 1)": 2, "(1, 6, 1)": 2, "(2, 1, 3)": 2, "(1, 1, 6)": 1}.items():
            expected = [index if parts == 2 else 0, parts, 12, 506.0, list(range(12))]
            assert out[sizes] == expected, sizes
        assert "make mesh.tensor a divisor or a multiple" in out["uneven"]


MORTAL = """
import sys, time
import jax, jax.numpy as jnp
from robovlms_jax.parallel import distributed
index, address = int(sys.argv[1]), sys.argv[2]
with distributed.joined(address, 2, index, peer_timeout_s=20):
    print("joined", flush=True)
    if index == 1:
        time.sleep(600)
    distributed.barrier("never reached by the other")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_peer_ends_the_others(how):
    # Killed, or alive but silent: the one that waits at a barrier must end with an error, within the time stated in
    # `joined` (20 s here) and some seconds to find each other.
    survivor, victim = start_pair(MORTAL)
    try:
        for process in (survivor, victim):
            assert process.stdout.readline() == "joined\n"
        victim.send_signal(how)
        begin = time.monotonic()
        _, messages = survivor.communicate(timeout=90)
        assert survivor.returncode != 0, messages
        assert time.monotonic() - begin < 60
    finally:
        for process in (survivor, victim):
            process.kill()
            process.wait()
