"""RLDS episodes in TFDS directories (Bridge, Open X-Embodiment), read without TensorFlow.

Opening takes three steps, each done once and kept in the index directory: `shard_index` finds every image and copies
every number; the registry's entry turns numbers into actions and state (`prepared`); then only arrays are mapped.
"""

from robovlms_jax.data.rlds.dataset import RldsDataset
from robovlms_jax.data.rlds.opening import NotFoundError, SeveralError, find, open_dataset
from robovlms_jax.data.rlds.options import Options
from robovlms_jax.data.rlds.stored import StoredDataset

__all__ = [
    "NotFoundError",
    "Options",
    "RldsDataset",
    "SeveralError",
    "StoredDataset",
    "find",
    "open_dataset",
]
