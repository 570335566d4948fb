"""The memory estimate's reading of loops; tests/experiments/test_plan.py compares whole estimates with XLA's."""

from __future__ import annotations

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robovlms_jax.training import memory

WIDTH, TURNS = 1000, 50
ROW = 4 * WIDTH  # bytes


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_needs_room_for_what_a_turn_cuts_out_and_none_for_its_constants(reverse):
    # Told by shapes: the parameters of jax's scan that count constants and carries changed their names in jax 0.11.
    def program(constant, carry, rows):
        def turn(carry, row):
            return jnp.sort(carry + constant @ row), None

        return jax.lax.scan(turn, carry, rows, reverse=reverse)[0]

    shapes = ((WIDTH, WIDTH), (WIDTH,), (TURNS, WIDTH))
    traced = jax.make_jaxpr(program)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    peak = memory._peak(traced.jaxpr, memory._Lying())
    assert 3 * ROW <= peak <= 6 * ROW  # a row, a product, a sum, and the result: neither 1000 rows nor 50


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((2, 128, 16), 2 * 128 * 16),  # {1,2,0:T(8,128)}
        ((512, 16), 512 * 16),  # {0,1:T(8,128)}
        ((64, 16), 128 * 16),  # {0,1:T(8,128)}
        ((2, 4, 16), 2 * 4 * 128),  # {2,1,0:T(4,128)}
        ((10, 49, 4, 16), 10 * 128 * 4 * 16),  # {1,3,2,0:T(8,128)}
        ((10,), 128),  # {0:T(128)}
        ((0, 4), 0),
    ],
)
def test_arrays_on_tpus_are_padded_as_libtpu_was_seen_to_lay_them_out(shape, numbers):
    # Shapes and layouts of the twin's training step, compiled for v5e:2x2 by libtpu 0.0.42.1.
    mesh = jax.sharding.AbstractMesh((1,), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct(shape, np.float32, sharding=whole)
    assert memory.bytes_per_device(x, "tpu") == 4 * numbers
    assert memory.bytes_per_device(x) == memory.bytes_per_device(x, "gpu") == 4 * math.prod(shape)


def test_what_waits_in_the_hosts_memory_is_no_part_of_a_devices():
    def program(x, rows):
        def turn(x, row):
            return jnp.sin(x @ row), None

        policy = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
        return jax.lax.scan(jax.checkpoint(turn, policy=policy, prevent_cse=False), x, rows)[0].sum()

    shapes = ((WIDTH, 10), (TURNS, 10, 10))
    traced = jax.make_jaxpr(jax.grad(program, (0, 1)))(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    rows = ROW * 10
    assert memory._uses_host(traced.jaxpr)
    assert 0 <= memory._peak(traced.jaxpr, memory._Lying(host=True)) - TURNS * rows <= rows  # a turn's, on its way
    inputs = TURNS * rows  # of the layers, which stay on the device
    assert inputs <= memory._peak(traced.jaxpr, memory._Lying()) < inputs + 8 * rows  # two turns on their way


def test_the_peak_of_a_program_for_tpus_is_the_one_that_libtpu_refuses_by():
    # KOSMOS-2's training step on a v5p, numbers by libtpu 0.0.42.1. Its buffers take 20.11e9 bytes, arguments included.
    said = types.SimpleNamespace(
        argument_size_in_bytes=5287683584, output_size_in_bytes=5283375232, alias_size_in_bytes=5283370496,
        temp_size_in_bytes=22183336992, peak_memory_in_bytes=20038998144, host_temp_size_in_bytes=0,
    )  # fmt: skip

    def found(platform):
        device = types.SimpleNamespace(platform=platform)
        sharding = types.SimpleNamespace(device_set={device.platform: device}.values())
        return memory.of_program(
            types.SimpleNamespace(memory_analysis=lambda: said, input_shardings=sharding, output_shardings=())
        )

    assert found("tpu")["peak"] == said.peak_memory_in_bytes
    assert found("tpu")["temporaries"] == 14751309824
    assert found("gpu")["peak"] == 27471025312
