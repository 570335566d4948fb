"""NumPy or jax.numpy, by the array that a function is given."""

from __future__ import annotations

from typing import Any

import numpy as np


def of(array: Any) -> Any:
    """The module whose functions take this array.

    Arrays of NumPy before 2 do not know theirs (`__array_namespace__`). Simulators may need such a NumPy, as SimplerEnv
    does, so what runs in their process asks here.
    """
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else np
