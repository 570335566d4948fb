"""Command-line programs: presets plus a main each."""

import importlib.util


def need(extra: str, *modules: str) -> None:
    """Raises ImportError that names what is not installed of `modules`, and the extra of setup.cfg that brings it."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"this program needs {' and '.join(missing)}: pip install -e .[{extra}]")


if importlib.util.find_spec("jax") is None:
    raise ImportError("experiments need JAX and what goes with it: pip install -e .[train] (or .[gpu], .[tpu])")
