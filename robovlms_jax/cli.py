"""Presets and dotted overrides. The only file that knows the command-line library."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import tyro

Config = TypeVar("Config")

ALIASES = {"--resume": "--train.resume"}
"""Short spellings of flags that are typed by hand."""


def parse(
    presets: Mapping[str, Config],
    default: str | Callable[[Sequence[str]], str],
    *,
    description: str,
    argv: Sequence[str] | None = None,
) -> tuple[str, Config]:
    """`--preset NAME` chooses the starting point, every other flag overrides one of its fields, e.g.
    `--train.batch_size 64`.

    Args:
      presets: name -> configuration.
      default: the preset without --preset, or a function of the arguments that names it.
      argv: arguments without the program's name; None reads the command line.
    Returns:
      (preset name, configuration). Wrong flags or values end the process with status 2 and a message naming the
      nearest flag.
    """
    arguments = [ALIASES.get(argument, argument) for argument in (sys.argv[1:] if argv is None else argv)]
    name = _take_preset(arguments)
    if name is None:
        name = default if isinstance(default, str) else default(arguments)
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        sys.exit(_fail(f"unknown preset {name!r}{hint} Presets: {', '.join(presets)}."))
    listed = f"--preset NAME, one of: {', '.join(presets)} (here: {name}); shown defaults are that preset's."
    text = f"{description}\n\n{listed}"
    config = tyro.cli(
        type(presets[name]),
        default=presets[name],
        args=arguments,
        description=text,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return name, config


def _take_preset(arguments: list[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == "--preset":
            if index + 1 == len(arguments):
                sys.exit(_fail("--preset needs a name."))
            name = arguments[index + 1]
            del arguments[index : index + 2]
            return name
        if argument.startswith("--preset="):
            del arguments[index]
            return argument.removeprefix("--preset=")
    return None


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def names_flag(arguments: Sequence[str], flag: str) -> bool:
    """Whether `flag` (with dots, underscores) is among the arguments in either spelling."""
    return any(argument.split("=")[0].replace("-", "_").lstrip("_") == flag for argument in arguments)


def override(config: Config, **changes: object) -> Config:
    """A copy with dotted fields replaced: override(config, **{"train.steps": 10})."""
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if rest:
            value = override(getattr(config, head), **{rest: value})
        config = dataclasses.replace(config, **{head: value})
    return config
