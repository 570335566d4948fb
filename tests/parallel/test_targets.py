"""Accelerators described: what can be asked for, and what is said where it cannot."""

from __future__ import annotations

import dataclasses
import sys
import types

import jax
import pytest

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel import targets


@pytest.mark.parametrize(
    ("name", "count", "platform"),
    [("v5p:2x2x2", 8, "tpu"), ("2xv5p:2x2x2", 16, "tpu"), ("v5e:4x4", 16, "tpu"), ("h100:8", 8, "gpu"),
     ("a100:8x4", 32, "gpu")],
)  # fmt: skip
def test_a_target_says_how_many_devices_of_what_it_has(name, count, platform):
    target = targets.parse(name)
    assert (target.count, target.platform) == (count, platform)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100", r"has not the form v5p:2x2x2"),
        ("v7:2x2", r"no figures of 'v7'; known are v4, v5e, v5p, v6e, a100, h100, h200, b200, orin"),
        ("v5p:4x4", r"a v5p is given as 3 numbers of chips, such as 2x2x2, not '4x4'"),
        ("v5e:0x4", r"a v5e is given as 2 numbers of chips"),
        ("h100:8x2x2", r"a h100 is given as cards \(x hosts\)"),
        ("4xa100:8", r"several hosts of GPUs are written a100:8x4"),
    ],
)
def test_a_misspelt_target_is_refused_with_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        targets.parse(name)


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops", "gbs"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989, 3350),
        ("NVIDIA H100 80GB HBM3", "float32", 494.5, 3350),
        ("NVIDIA H100 PCIe", "bfloat16", 756, 2000),
        ("NVIDIA H200", "bfloat16", 989, 4800),
        ("NVIDIA A100-SXM4-80GB", "float32", 156, 2039),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312, 1555),
        ("TPU v5 lite", "bfloat16", 197, 819),
        ("TPU v5", "float32", 459, 2765),
    ],
)
def test_a_devices_published_peaks_are_those_of_its_own_card(kind, dtype, tflops, gbs):
    # Fails if a card is taken for another one of its family, such as an H100 of PCIe for one of SXM.
    assert targets.peaks(kind, dtype) == (pytest.approx(tflops * 1e12), pytest.approx(gbs * 1e9))
    assert targets.peaks("cpu", dtype) is targets.peaks("NVIDIA GeForce RTX 4090", dtype) is None


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("v5e:2x2", "libtpu", "plan-tpu"), ("h100:8", "jax_plugins.xla_cuda12", "plan-gpu")]
)
def test_a_compiler_that_is_not_installed_is_named_with_what_installs_it(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    with pytest.raises(ModuleNotFoundError, match=rf"needs a compiler for .PUs .*pip install -e '\.\[{extra}\]'"):
        targets.devices(targets.parse(name))


@pytest.mark.parametrize(
    ("said", "raised"),
    [("INVALID_ARGUMENT: topology 3x5", ValueError), ("ABORTED: in use by process 7", jax.errors.JaxRuntimeError)],
)
def test_only_what_the_compiler_says_of_the_target_is_told_as_an_unknown_target(monkeypatch, said, raised):
    # Fails if a library that does not start is told as a misspelt target, which sends the reader the wrong way.
    def refuse(target):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(targets, "_tpu", refuse)
    with pytest.raises(raised, match=said):
        targets.devices(targets.parse("v5e:3x5"))


def test_a_gpu_is_described_as_its_compiler_asks():
    text = targets.describe(targets.CHIPS["h100"])
    for line in ("core_count: 132", "memory_bandwidth: 3350000000000", "cuda_compute_capability { major: 9 minor: 0 }"):
        assert line in text


def test_a_collective_takes_as_long_as_its_slowest_link():
    # Cards of one host by NVLink, hosts by the network; rings along two axes of a torus are twice as fast as along one.
    host = [(0, 0), (0, 1), (1, 0), (1, 1)]
    h100, v5p = targets.parse("h100:2x2"), targets.parse("v5p:2x2x1")
    assert targets.seconds(h100, [(0, 1), (2, 3)], host, 450e9) == pytest.approx(1)
    assert targets.seconds(h100, [(0, 2)], host, 50e9) == pytest.approx(1)
    # Two hosts of two: a third of what each card sends (1 of 3 parts) is the other host's. Fails if all of it is.
    assert targets.seconds(h100, [(0, 1, 2, 3)], host, 150e9) == pytest.approx(1)
    torus = [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 0), (1, 0, 0, 0)]
    assert targets.seconds(v5p, [(0, 1)], torus, 200e9) == pytest.approx(1)
    assert targets.seconds(v5p, [(0, 1, 2, 3)], torus, 200e9) == pytest.approx(0.5)
    assert targets.seconds(v5p, [(0, 4)], torus, 6.25e9) == pytest.approx(1)


def test_slices_hold_whole_copies_of_the_model():
    devices = [types.SimpleNamespace(platform="tpu", slice_index=number // 2, id=number) for number in range(4)]
    with pytest.raises(ValueError, match=r"mesh.data=1 does not divide over 2 slices"):
        meshes.make_mesh((1, 4, 1), devices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX asks a TPU's device about where it is."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_data_goes_across_slices_and_parameters_are_split_inside_one(slices):
    # 2x4 chips each. A run that loses a slice has the same mesh with fewer copies. Fails if a copy's parts lie in two
    # slices, whose exchange would then go through the data centre's network at every layer.
    devices = [Chip(8 * s + i, s, (i % 2, i // 2, 0), 2 * s + i // 4) for s in range(slices) for i in range(8)]
    mesh = meshes.make_mesh((2 * slices, 2, 2), devices)
    assert dict(mesh.shape) == {"data": 2 * slices, "fsdp": 2, "tensor": 2}
    homes = [{chip.slice_index for chip in copy.flat} for copy in mesh.devices]
    assert homes == [{index} for index in range(slices) for _ in range(2)]
    assert len({chip.id for chip in mesh.devices.flat}) == 8 * slices
