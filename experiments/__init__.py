"""Command-line programs: presets plus a main each."""

import importlib.util

from robovlms_jax import ending, extras


def need(extra: str, *modules: str) -> None:
    """Raises ImportError that names what is not installed of `modules`, and the extra of setup.cfg that brings it."""
    extras.need("this program", extra, *modules)


ending.without_traceback()  # what follows takes seconds to import

if importlib.util.find_spec("jax") is None:
    raise ImportError(f"experiments need JAX and what goes with it: {extras.install('train')} (or gpu, tpu for train)")
