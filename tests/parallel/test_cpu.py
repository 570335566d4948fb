"""Compiler options that an XLA may or may not have, and freed memory that stays with the process."""

from __future__ import annotations

import importlib.metadata
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax import cores
from robovlms_jax.parallel import cpu, tpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.training import step
from tests.processes import run_python
from tests.test_imports import ROOT

NEVER_HEARD_OF = {"xla_cpu_no_such_option": True}


def test_what_xla_does_not_know_is_left_out():
    # jit itself refuses a program for the sake of one unknown option. Fails if one is passed on, or takes others along.
    assert cpu.known({**NEVER_HEARD_OF, **cpu.OPTIONS["run_once"]}, "cpu") == cpu.OPTIONS["run_once"]
    assert cpu.known(NEVER_HEARD_OF, "cpu") is None


def test_a_kernel_library_by_another_name_is_no_error():
    # The name of the value may change, too. Fails if only names of options are tried.
    (name,) = cpu.OPTIONS["small_kernels"]
    assert cpu.known({name: "LIBRARY_FUSION_TYPE_NO_SUCH"}, "cpu") is None


def test_only_cpus_have_them():
    # GPUs' and TPUs' compilers must not be told about CPUs, whatever compiles. Fails if the platform is not asked.
    assert cpu.options("small_kernels", "gpu") is None and cpu.options("small_kernels", "tpu") is None


def test_a_step_is_made_for_the_devices_of_its_mesh_and_not_for_the_machine_that_compiles(monkeypatch):
    # Fails if a program for a TPU, made on a CPU, gets options that its compiler refuses (or the other way round).
    asked = []
    monkeypatch.setattr(cpu, "options", lambda kind, platform: asked.append(platform))
    monkeypatch.setattr(tpu, "trained", lambda device: asked.append(device))
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    for kind in ("cuda", "tpu"):
        monkeypatch.setattr(meshes, "platform", lambda mesh, kind=kind: kind)
        step.make_train_step(None, None, None, {"weight": jax.numpy.zeros(1)}, mesh)  # only its options are made
    assert asked == ["cuda", jax.devices()[0]]
    # Programs that work on large arrays are compiled as XLA would by itself. Fails if the size is not asked.
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    large = {"weight": jax.ShapeDtypeStruct((10_000, 10_000), jax.numpy.float32, sharding=place)}
    monkeypatch.setattr(meshes, "platform", lambda mesh: "cpu")
    step.make_train_step(None, None, None, large, mesh)
    # So are those that are asked to be. Fails if train.compiler_options=none is not heeded.
    monkeypatch.setattr(meshes, "platform", lambda mesh: "tpu")
    step.make_train_step(None, None, None, large, mesh, tuned=False)
    assert len(asked) == 2


def test_a_program_without_a_mesh_runs_where_jax_puts_it():
    # Fails if whatever device comes first is taken for it.
    assert cpu.default_platform() == "cpu"
    with jax.default_device("tpu"):
        assert cpu.default_platform() == "tpu"


def test_nothing_that_makes_a_program_asks_the_machine_that_compiles():
    # Where there is a mesh, its devices say it (mesh.platform); where there is none, cpu.default_platform does.
    asking = [path for path in (ROOT / "robovlms_jax").rglob("*.py") if "default_backend" in path.read_text()]
    assert asking == []


FAULTS = """
import resource, sys, threading
import numpy as np
from robovlms_jax.parallel import cpu
if sys.argv[1] == "kept":
    assert cpu.keep_freed_memory()
faults = []
def step():
    for _ in range(5):  # 64 MB, which glibc otherwise maps anew
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.full(2**23, 1.0)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=step)  # as XLA runs programs; a heap of its own would have no room for 64 MB
thread.start()
thread.join()
print(min(faults[1:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    # Fails if a setting is refused, or glibc stops doing with it what it did; given back, every page costs a fault.
    assert int(run_python("-c", FAULTS, "given back", JAX_PLATFORMS="cpu")) > 10  # huge pages: 32
    assert int(run_python("-c", FAULTS, "kept", JAX_PLATFORMS="cpu")) == 0


def test_heaps_of_threads_stay_where_there_may_be_accelerators():
    # Fails if the settings, measured on CPUs, are made for every run.
    code = "from robovlms_jax.parallel import cpu; print(cpu.keep_freed_memory())"
    assert run_python("-c", code, JAX_PLATFORMS="cuda,cpu").split() == ["False"]


def test_a_device_per_core_is_asked_for_where_only_cpus_are_and_nobody_said_how_many():
    show = "print(cpu.jax.config.jax_num_cpu_devices)"
    code = f"from robovlms_jax.parallel import cpu; cpu.device_per_core(); {show}"
    unsaid = jax.config.jax_num_cpu_devices
    for environment, devices in (
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}, cores.usable()),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, unsaid),
        ({"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": ""}, unsaid),
    ):
        assert run_python("-c", code, **environment).split() == [str(devices)]


def test_one_kernel_computes_what_the_function_does_and_takes_constants():
    """Fails if the mark is lost. A constant ended the process in pictures alone, whose tests would end so again."""

    def nearest(depth, steps, rows, counts):
        def of_tile(tile):
            plane, step, count = tile

            def draw(i, plane):
                found = step * rows[i] + 0.1
                return jax.lax.cond(jnp.any(found < plane), jnp.minimum, lambda found, plane: plane, found, plane)

            return jax.lax.fori_loop(0, count, draw, plane)

        return jax.lax.map(of_tile, (depth, steps, counts))

    rows, counts = jnp.array([0.5, 0.9, 0.1]), jnp.array([3, 0, 1])
    depth, steps = jnp.full((3, 64), 0.4), jnp.linspace(0.0, 1.0, 3 * 64).reshape(3, 64)
    kernel = cpu.one_kernel(nearest)
    program = jax.jit(lambda depth, rows, counts: kernel(depth, np.asarray(steps), rows, counts))
    program = program.lower(depth, rows, counts).compile()
    np.testing.assert_allclose(program(depth, rows, counts), nearest(depth, steps, rows, counts), rtol=1e-6)
    marked = [line for line in program.as_text().splitlines() if "xla_cpu_small_call" in line and "call(" in line]
    assert len(marked) == importlib.metadata.version("jaxlib").startswith("0.10.")
