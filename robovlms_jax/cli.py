"""Presets, dotted overrides and switches. The only file that knows the command-line library."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from robovlms_jax import cli_help, cli_switches, json_files, schema

Config = TypeVar("Config")
ALIASES = {"--resume": "--train.resume", "--init_from": "--train.init_from", "--backbone": "--backbone.name"}
"""Short spellings of flags that are typed by hand."""

INSTEAD = {"train.steps": "train.epochs"}
"""A field that is asked for -> one that would make it have no effect, and so is 0 then, whatever a preset says."""

OUTPUT, OLD_OUTPUTS = "out", ("output", "to")
"""The flag that says where results go is --out in every program (of a training run it stands for --train.output); what
some programs called it before is still understood, and answered with the name."""

_FILES = tyro.constructors.ConstructorRegistry()
"""What is read from a JSON file that the command line names: types with `from_json`, such as a robot's description."""


@_FILES.primitive_rule
def _from_file(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    kind = info.type
    if not (isinstance(kind, type) and hasattr(kind, "from_json")):
        return None

    def read_file(words: list[str]) -> Any:
        try:
            return kind.from_json(json_files.read(pathlib.Path(words[0])), words[0])
        except OSError as error:
            sys.exit(_fail(f"{words[0]} cannot be read: {error}"))
        except ValueError as error:  # in one line, as for other flags, and not in the library's box
            sys.exit(_fail(str(error)))

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE.json",
        instance_from_str=read_file,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [value.name],
    )


def read(config: type[Config] | Config, *, description: str | None = None, argv: Sequence[str] | None = None) -> Config:
    """A program's settings from its command line: `--field value`, dotted where a field has fields of its own.

    Switches, fields that are true or false, are understood in every usual spelling: `--data.success_only`,
    `--data.success_only True`, `--data.success_only=no`, `--no-data.success_only`, `--data.no-success-only`.

    `--help` shows one screen: fields that the class names in USUAL, or its own ones; `--help-all` shows every field.

    A part with a registered kind, or a list of parts, is given whole: as JSON, in a JSON file, or by names of kinds
    (`--policy.head flow`, `--policy.sensors imu,lidar`, `--train.stages stages.json`); only with an instance.

    Args:
      config: dataclass, or one of its instances, whose values are then the defaults.
      description: for --help; None: the class's docstring.
      argv: arguments without the program's name; None reads the command line.
    Returns: an instance. Wrong flags or values end the process with status 2 and a message naming the nearest flag.
    """
    return _read(config, description, argv)


def _read(
    config: type[Config] | Config, description: str | None, argv: Sequence[str] | None, own: Sequence[str] = ()
) -> Config:
    """own: flags that the caller has taken out of the arguments, named where one of them is misspelt."""
    given = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(given):
        cli_help.show(description, config)
    arguments = cli_switches.spell(_with_output(given, config), config)
    arguments = ["--help" if argument in ("--help-all", "--help_all") else argument for argument in arguments]
    description = description and cli_help.with_examples_apart(description)
    if not isinstance(config, type):
        description = f"{description or ''}{_whole_help(config)}" or None
        config = _with_keys(_take_whole(config, arguments), arguments)
    start = {"f": config} if isinstance(config, type) else {"f": type(config), "default": config}
    options = {"prog": cli_help.program_name(sys.argv[0]), "config": (tyro.conf.AvoidSubcommands,)}
    try:
        with _FILES:
            return tyro.cli(**start, args=arguments, description=description, use_underscores=True, **options)
    except SystemExit as end:
        if end.code == 2:  # where a flag is missing, or names are less alike, the library suggests none
            print(*cli_help.suggestions(arguments, config, own), sep="\n", file=sys.stderr)
        raise


def _with_output(arguments: Sequence[str], config: Any) -> list[str]:
    """The arguments with the flag for results as this program's field is called."""
    fields = {field.name for field in dataclasses.fields(config)}
    of_a_run = OUTPUT not in fields and "train" in fields
    target = "train.output" if of_a_run else OUTPUT
    if target not in fields and not of_a_run:
        return list(arguments)
    old = [name for name in OLD_OUTPUTS if name not in fields and not (of_a_run and name == "to")]
    out = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if of_a_run and flag in (f"--{name}" for name in (OUTPUT, "output")):
            argument = f"--{target}{equals}{value}"
        elif flag in (f"--{name}" for name in old):
            print(f"note: {flag} is called --{OUTPUT} now, as in every program.", file=sys.stderr)
            argument = f"--{OUTPUT}{equals}{value}"
        out.append(argument)
    return out


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
      presets: name -> configuration, with USUAL as `read` has it.
      default: the preset without --preset, or a function of the arguments that names it.
      read_json: upstream's JSON file -> configuration; None: the program has no --upstream_json.
      argv: arguments without the program's name; None reads the command line.
    Returns: (name of preset or file, configuration). Wrong flags or values end the process with status 2 and a message
      naming the nearest flag.
    """
    fields = _paths(next(iter(presets.values())))
    arguments = [_unabbreviated(argument, fields) for argument in (sys.argv[1:] if argv is None else argv)]
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
            hint = schema.nearest(name, presets)
            sys.exit(_fail(f"unknown preset {name!r}{hint} Presets: {', '.join(presets)}."))
        start = presets[name]
    if {"--help", "-h"} & set(arguments):
        cli_help.show(description, start, (name, list(presets)))
    if arguments and not arguments[0].startswith("-"):
        hint = schema.nearest(f"--preset {arguments[0]}", [f"--preset {preset}" for preset in presets])
        sys.exit(_fail(f"{arguments[0]!r} belongs to no flag{hint} Settings are --FIELD VALUE."))
    for asked, unasked in INSTEAD.items():
        if unasked in fields and names_flag(arguments, asked) and not names_flag(arguments, unasked):
            arguments += [f"--{unasked}", "0"]
    or_json = "" if read_json is None else ", or --upstream_json FILE, one of RoboVLMs' own configurations"
    listed = f"--preset NAME, one of: {', '.join(presets)}{or_json} (here: {name}); shown defaults are of this start."
    text = f"{description}\n\n{listed}"
    own = [short for short, long in ALIASES.items() if long.removeprefix("--") in fields]
    own += ["--preset", "--help_all", *(["--upstream_json"] if read_json else [])]
    return name, _read(start, text, arguments, own)


def wholes(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field that is given whole: a part with a registered kind, or a tuple of parts."""
    found = {}
    for name, hint in schema.hints(type(config)).items():
        value = getattr(config, name)
        if _kinds(hint) or schema.item_of(hint):
            found[prefix + name] = hint
        if dataclasses.is_dataclass(value) and not hasattr(value, "to_json"):
            found |= wholes(value, f"{prefix}{name}.")
    return found


def _kinds(hint: Any) -> list[str]:
    """Registered names of what the type stands for; [] where it has none."""
    part = schema.item_of(hint) or hint
    return part.kinds() if isinstance(part, type) and issubclass(part, schema.Tagged) else []


def _whole_help(config: Any) -> str:
    lines = []
    for path, hint in wholes(config).items():
        kinds = f", or names of kinds alone ({', '.join(_kinds(hint))})" if _kinds(hint) else ""
        lines.append(f"--{path} JSON{' list' if schema.item_of(hint) else ''} | FILE.json{kinds}")
    return "\n\nGiven whole, fields left out having their defaults:\n\n" + "\n\n".join(lines) if lines else ""


def _take_whole(config: Any, arguments: list[str]) -> Any:
    """The configuration with what the arguments give whole, which is taken out of them. Not checked as a whole yet:
    other flags may belong to it."""
    for path, hint in wholes(config).items():
        kind = _take(arguments, f"--{path}.kind") if _kinds(hint) and not schema.item_of(hint) else None
        text = _take(arguments, f"--{path}")
        text = kind if text is None else text
        if text is not None:
            try:
                config = _put(config, path.split("."), _whole(path, hint, text))
            except (ValueError, OSError) as error:
                sys.exit(_fail(f"--{path}: {error}"))
        if schema.item_of(hint) and not _get(config, path):
            inner = _belongs(config, path, schema.item_of(hint), arguments)
            if inner:
                sys.exit(
                    _fail(f"{inner} is a setting of a part of {path}, which is given whole: {_example(path, hint)}")
                )
    return config


def _with_keys(config: Any, arguments: Sequence[str], prefix: str = "") -> Any:
    """With every key that arguments give a mapping, of which the library knows those of the start alone: `--a.sources
    robot 4 web 1` is instead of them, `--a.sources.web 1` beside them."""
    flags = {argument.partition("=")[0] for argument in arguments}
    for name, hint in schema.hints(type(config)).items():
        value, path = getattr(config, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(value) and not hasattr(value, "to_json"):
            config = _put(config, [name], _with_keys(value, arguments, f"{path}."))
        elif typing.get_origin(hint) in (dict, Mapping):
            spellings = (f"--{path}", f"--{path.replace('_', '-')}")
            new = [flag[len(path) + 3 :] for flag in flags if flag.startswith(tuple(f"{x}." for x in spellings))]
            blank = {key: typing.get_args(hint)[1]() for key in sorted(new)}
            config = _put(config, [name], blank | (dict(value) if flags.isdisjoint(spellings) else {}))
    return config


def _belongs(config: Any, path: str, part: type, arguments: Sequence[str]) -> str | None:
    """The first flag that is about a part of the tuple at `path`, which has none: by its path, or because no such flag
    exists where the tuple stands, or anywhere, and a part has such a field (`--train.weights`)."""
    fields, known = {field.name for field in dataclasses.fields(part)}, _paths(config)
    elsewhere = {name.rpartition(".")[2] for name in known}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("-", "_")
        full = flag.removeprefix("__")
        room, _, name = full.rpartition(".")
        misplaced = full not in known and name in fields and (room == path.rpartition(".")[0] or name not in elsewhere)
        if flag.startswith("__") and (full.startswith(f"{path}.") or misplaced):
            return argument.partition("=")[0]
    return None


def _paths(config: Any, prefix: str = "") -> set[str]:
    """Dotted names of all fields, at any depth."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    inner = (_paths(x, f"{prefix}{name}.") for name, x in values.items() if dataclasses.is_dataclass(x))
    return {prefix + name for name in values}.union(*inner)


def _example(path: str, hint: Any) -> str:
    part = schema.item_of(hint)
    first = {"kind": _kinds(hint)[0]} if _kinds(hint) else {}
    needed = [x.name for x in dataclasses.fields(part) if {x.default, x.default_factory} == {dataclasses.MISSING}]
    first |= dict.fromkeys(needed, "...")
    return f"--{path} '{json.dumps([first])}', or --{path} FILE.json with such a list."


def _whole(path: str, hint: Any, text: str) -> Any:
    """A field's value from a command line's word: JSON, a file of it, or names of kinds. Raises ValueError, OSError."""
    if text.endswith(".json"):
        value = json_files.read(pathlib.Path(text))
    elif _kinds(hint) and re.fullmatch(r"\w+(,\w+)*", text):
        value = text.split(",") if schema.item_of(hint) else text
    else:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{text!r} is neither JSON ({error}) nor FILE.json") from error
    if not isinstance(value, list if schema.item_of(hint) else str | dict):
        raise ValueError(f"{text!r} is no JSON {'list' if schema.item_of(hint) else 'object'}.")
    if isinstance(value, list) and _kinds(hint):
        value = [{"kind": part} if isinstance(part, str) else part for part in value]
    elif isinstance(value, str):
        value = {"kind": value}
    return schema.from_plain(hint, value, path)


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _put(config: Any, names: Sequence[str], value: Any) -> Any:
    """A copy with one field replaced; its own checks wait for `read`, which builds it again from all flags."""
    head, *rest = names
    copy = object.__new__(type(config))
    for field in dataclasses.fields(config):
        object.__setattr__(copy, field.name, getattr(config, field.name))
    object.__setattr__(copy, head, _put(getattr(config, head), rest, value) if rest else value)
    return copy


def _unabbreviated(argument: str, fields: Collection[str]) -> str:
    """`--resume=True`, `--no-resume` and `--init-from` as the flags that ALIASES has for them, where the program has a
    field of that name."""
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--"):
        return argument
    negated = flag.startswith("--no-")
    short = "--" + flag.removeprefix("--no-" if negated else "--").replace("-", "_")
    if ALIASES.get(short, "").removeprefix("--") not in fields:
        return argument
    return ("--no-" if negated else "--") + ALIASES[short].removeprefix("--") + equals + value


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


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """The word that follows `flag`, in either spelling, among the arguments; None without it or without a word."""
    return _take([*arguments, ""], f"--{flag}") or None


def override(config: Config, **changes: object) -> Config:
    """A copy with dotted fields replaced: override(config, **{"train.steps": 10}).

    Raises ValueError that names the field, what it takes and what it was given; or the nearest field to a name that
    there is not.
    """
    known = _paths(config) if changes.keys() & INSTEAD.keys() else set()
    implied = {INSTEAD[x]: 0.0 for x in changes.keys() & INSTEAD.keys() if INSTEAD[x] in known - changes.keys()}
    for path, value in (implied | changes).items():
        config = schema.replaced(config, path.split("."), value)
    return config
