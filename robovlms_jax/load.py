"""Open a trained policy: `load_policy(checkpoint_dir)`; see `runs.load`."""

from robovlms_jax.runs.load import load_batched_policy, load_config, load_policy

__all__ = ["load_batched_policy", "load_config", "load_policy"]
