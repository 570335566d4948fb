"""Importing the package registers every head."""

from robovlms_jax.policies.heads import attention, discrete, flow, gpt, lstm, mlp

__all__ = ["attention", "discrete", "flow", "gpt", "lstm", "mlp"]
