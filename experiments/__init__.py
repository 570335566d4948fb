"""Command-line programs: presets plus a main each."""

import importlib.util

from robovlms_jax import extras


def need(extra: str, *modules: str) -> None:
    """Raises ImportError that names what is not installed of `modules`, and the extra of setup.cfg that brings it."""
    extras.need("this program", extra, *modules)


if importlib.util.find_spec("jax") is None:
    raise ImportError(f"experiments need JAX and what goes with it: {extras.install('train')} (or gpu, tpu for train)")
