"""Presets and dotted overrides. The only file that knows the command-line library."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import tyro

Config = TypeVar("Config")

ALIASES = {"--resume": "--train.resume", "--init_from": "--train.init_from", "--backbone": "--backbone.name"}
"""Short spellings of flags that are typed by hand."""


def parse(
    presets: Mapping[str, Config],
    default: str | Callable[[Sequence[str]], str],
    *,
    description: str,
    read_json: Callable[[str], Config] | None = None,
    argv: Sequence[str] | None = None,
) -> tuple[str, Config]:
    """`--preset NAME` or `--upstream_json FILE` chooses the starting point, every other flag overrides one of its
    fields, e.g. `--train.batch_size 64`.

    Args:
      presets: name -> configuration.
      default: the preset without --preset, or a function of the arguments that names it.
      read_json: upstream's JSON file -> configuration; None: the program has no --upstream_json.
      argv: arguments without the program's name; None reads the command line.
    Returns:
      (name of preset or file, configuration). Wrong flags or values end the process with status 2 and a message naming
      the nearest flag.
    """
    arguments = [ALIASES.get(argument, argument) for argument in (sys.argv[1:] if argv is None else argv)]
    name = _take(arguments, "--preset")
    file = None if read_json is None else _take(arguments, "--upstream_json")
    if name is not None and file is not None:
        sys.exit(_fail("--preset and --upstream_json both say where to start; pass one of them."))
    if file is not None:
        try:
            name, start = pathlib.Path(file).stem, read_json(file)
        except (ValueError, OSError) as error:
            sys.exit(_fail(str(error)))
    else:
        name = name or (default if isinstance(default, str) else default(arguments))
        if name not in presets:
            near = difflib.get_close_matches(name, presets, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            sys.exit(_fail(f"unknown preset {name!r}{hint} Presets: {', '.join(presets)}."))
        start = presets[name]
    or_json = "" if read_json is None else ", or --upstream_json FILE, one of RoboVLMs' own configurations"
    listed = (
        f"--preset NAME, one of: {', '.join(presets)}{or_json} (here: {name}); shown defaults are those of this start."
    )
    text = f"{description}\n\n{listed}"
    config = tyro.cli(
        type(start),
        default=start,
        args=arguments,
        description=text,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return name, config


def _take(arguments: list[str], flag: str) -> str | None:
    """Remove `flag`, in either spelling, and its value from the arguments; the value, or None without the flag."""
    for index, argument in enumerate(arguments):
        found, equals, value = argument.partition("=")
        if found not in (flag, flag.replace("_", "-")):
            continue
        if not equals and index + 1 == len(arguments):
            sys.exit(_fail(f"{flag} needs a value."))
        value = value if equals else arguments[index + 1]
        del arguments[index : index + (1 if equals else 2)]
        return value
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
