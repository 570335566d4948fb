"""The structs that robots and simulators see, under the name that release 0.1 gave them: see `control.interface`."""

from robovlms_jax.control.interface import ActionChunk, Env, Observation, Policy

__all__ = ["ActionChunk", "Env", "Observation", "Policy"]
