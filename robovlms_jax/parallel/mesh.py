"""One mesh for one CPU, a GPU node or a TPU pod, and the shardings of everything that lives on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from robovlms_jax.parallel.rules import RULES

AXES = ("data", "fsdp", "tensor")


def unbox(tree: Any) -> Any:
    """Parameters without their axis-name boxes."""
    return nn.unbox(tree)


def make_mesh(sizes: tuple[int, int, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh with axes data, fsdp, tensor. Auto axes: the compiler propagates shardings, arrays may be mixed freely.

    Of several slices of a TPU (which only a slower network joins), each holds whole copies of the model: `data` goes
    across them.

    Raises:
      ValueError: `data` does not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    # GPUs have a slice_index, too: that of the host, across which fsdp may go.
    tpus = [device for device in devices if device.platform == "tpu"]
    slices = len({getattr(device, "slice_index", 0) for device in tpus})
    if slices <= 1:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    data, fsdp, tensor = sizes
    if data % slices:
        raise ValueError(
            f"mesh.data={data} does not divide over {slices} slices, each of which has to hold whole copies of the "
            "model; make it a multiple, or leave it to be found (-1)."
        )
    within = (data // slices, fsdp, tensor)
    arranged = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu": what programs on the mesh are compiled for, which need not be what this machine has."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the data-parallel devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def whole(params: Any, mesh: Mesh) -> Any:
    """Parameters on one device of this process, whole, whatever the mesh. Called by all processes."""
    params = jax.jit(lambda params: params, out_shardings=replicated(mesh))(params)
    return jax.tree.map(lambda x: x.addressable_data(0), params)


def abstract_params(init: Callable[[], Any], mesh: Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of what `init` would make, without making it.

    Args:
      init: () -> parameters whose leaves carry logical axis names.
    Returns:
      as `placed`.
    """
    return placed(jax.eval_shape(init), mesh)


def placed(boxed: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Where parameters lie on a mesh.

    Args:
      boxed: jax.ShapeDtypeStruct tree whose leaves carry logical axis names.
    Returns:
      (jax.ShapeDtypeStruct tree, NamedSharding tree), both without the axis-name boxes. An axis that does not divide
      over its mesh axis stays whole. Raises ValueError where an axis has no rule.
    """
    names = {name for name, _ in RULES}
    for path, spec in jax.tree_util.tree_leaves_with_path(
        nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec)
    ):
        unknown = [axis for axis in spec if axis is not None and axis not in names]
        if unknown:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} names axes {unknown} that parallel/rules.py does not know."
            )
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    shapes = nn.unbox(boxed)
    return shapes, jax.tree.map(_fit, shapes, shardings)


def _fit(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
    axes = []
    for size, axis in zip(shape.shape, tuple(sharding.spec) + (None,) * (len(shape.shape) - len(sharding.spec))):
        names = (axis,) if isinstance(axis, str) else axis or ()
        ways = int(np.prod([sharding.mesh.shape[name] for name in names]))
        axes.append(axis if size % ways == 0 else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process's devices hold part `index` of `count` equal parts of every batch.

    Processes that split a matrix product between them hold the same part.

    Raises:
      ValueError: processes whose parts overlap without being the same.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}
    for device, (rows,) in batched(mesh).devices_indices_map((groups,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != groups or len(set(map(len, parts))) != 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives the processes unequal or overlapping parts of a batch: "
            f"{ {process: sorted(rows) for process, rows in held.items()} }; "
            "make mesh.tensor a divisor or a multiple of the devices of one process."
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


@contextlib.contextmanager
def constrained(mesh: Mesh) -> Iterator[None]:
    """While a program is traced in here, `nn.with_logical_constraint` in models means `mesh` and the rules; elsewhere
    it does nothing."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        yield


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's share of a batch (see `batch_share`; NumPy leaves, leading batch axis) -> global arrays split over
    the data-parallel devices."""
    sharding = batched(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
