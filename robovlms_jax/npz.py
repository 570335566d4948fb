"""Files of named arrays (.npz) that say what is wrong with them."""

from __future__ import annotations

import pathlib

import numpy as np


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a file, by name.

    Raises:
      OSError: it is not there, or cannot be opened.
      ValueError: it is no such file, or damaged; names it.
    """
    with path.open("rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except Exception as error:  # a damaged zip header surfaces as almost anything: zlib.error, OSError, TypeError
            raise ValueError(f"{path} is no file of arrays, or damaged ({type(error).__name__}: {error}).") from error
