"""Run by test_convert.py on eight fake devices: loads a sharded parameter and prints, as JSON, what was read."""

from __future__ import annotations

import json
import tempfile

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from robovlms_jax.weights import convert, sources
from robovlms_jax.weights.rules import Rule

LAYERS, N, H, D = 3, 4, 6, 16


class CountingSource:
    """Counts the elements each read returns."""

    def __init__(self, source: sources.SafetensorsSource):
        self.name, self.shapes, self.source, self.reads = source.name, source.shapes, source, []

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        x = self.source.read(name, index)
        self.reads.append((name, x.size))
        return x


rng = np.random.default_rng(0)
tensors = {f"blocks.{layer}.q": rng.normal(size=(N * H, D)).astype(np.float32) for layer in range(LAYERS)}
tensors["norm"] = rng.normal(size=(D,)).astype(np.float32)
with tempfile.TemporaryDirectory() as directory:
    save_file(tensors, f"{directory}/model.safetensors")
    source = CountingSource(sources.open_source(directory))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    params = convert.load_params(
        (Rule("blocks.{layer}.q", "q", "(n h) d -> d n h"), Rule("norm", "norm")),
        source,
        {"q": jax.ShapeDtypeStruct((LAYERS, D, N, H), np.float32), "norm": jax.ShapeDtypeStruct((D,), np.float32)},
        {
            "q": NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")),
            "norm": NamedSharding(mesh, PartitionSpec()),
        },
    )
expected = np.stack([tensors[f"blocks.{layer}.q"].reshape(N, H, D).transpose(2, 0, 1) for layer in range(LAYERS)])
reads = [size for name, size in source.reads if name != "norm"]
print(
    json.dumps(
        {
            "devices": jax.device_count(),
            "equal": bool((np.asarray(params["q"]) == expected).all()),
            "layer": N * H * D,
            "layers": LAYERS,
            "largest_read": max(reads),
            "total_read": sum(reads),
            "shard": params["q"].addressable_shards[0].data.shape,
            "replicated": D,
            "replicated_read": sum(size for name, size in source.reads if name == "norm"),
        }
    )
)
