"""Command-line programs: presets plus a main each."""

import importlib.util

if importlib.util.find_spec("jax") is None:
    raise ImportError("experiments need JAX and what goes with it: pip install -e .[train] (or .[gpu], .[tpu])")
