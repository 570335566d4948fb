"""RoboVLMs' own files (github.com/Robot-VLAs/RoboVLMs): JSON configurations and PyTorch checkpoints."""

from robovlms_jax.upstream.config import evaluation_dtype, load_experiment, to_experiment
from robovlms_jax.upstream.files import read as read_json
from robovlms_jax.upstream.weights import allow, open_checkpoint, policy_rules

__all__ = [
    "allow",
    "evaluation_dtype",
    "load_experiment",
    "open_checkpoint",
    "policy_rules",
    "read_json",
    "to_experiment",
]
