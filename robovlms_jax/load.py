"""Open a trained policy: `load_policy(checkpoint_dir)`; see `runs.load`."""

from robovlms_jax import extras

extras.need("load_policy", "train", "jax", "flax")

# After the sentence about what is missing.
from robovlms_jax.runs.load import load_batched_policy, load_config, load_policy  # noqa: E402

__all__ = ["load_batched_policy", "load_config", "load_policy"]
