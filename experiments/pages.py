"""How the programs that serve a page begin and end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

import experiments
from robovlms_jax import cli
from robovlms_jax.runs import logs
from robovlms_jax.training import directory as directories
from robovlms_jax.web import addresses, running

C = TypeVar("C", bound=running.PageConfig)


def main(config_class: type[C], description: str, work: Callable[[C], Coroutine[Any, Any, Any]]) -> NoReturn:
    """Reads the settings, serves the page until Ctrl-C and ends the process; with a message where something is missing.

    work: called before anything is listened at; what it raises is told in the same way.
    """
    logs.to_stderr(absl=logging.ERROR)
    config = cli.read(config_class, description=description)
    try:
        experiments.need("serve", "websockets")
        addresses.check(config.host, config.port)
        directories.keep_programs("auto")
        running.run(work(config))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
