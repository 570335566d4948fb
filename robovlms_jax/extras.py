"""Optional packages: how somebody who lacks one installs it."""

from __future__ import annotations

import importlib.util
import pathlib


def install(extra: str) -> str:
    """The command that brings an extra of setup.cfg: inside the repository, or by the package's name where the library
    was installed from a wheel and no repository lies around it."""
    in_repository = (pathlib.Path(__file__).resolve().parents[1] / "setup.cfg").is_file()
    return f"pip install -e '.[{extra}]'" if in_repository else f'pip install "robovlms_jax[{extra}]"'


def need(what: str, extra: str, *modules: str) -> None:
    """Raises ImportError that says what needs the modules that are not installed, and how to install them."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"{what} needs {' and '.join(missing)}: {install(extra)}", name=missing[0])
