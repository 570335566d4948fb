"""Help of one screen: the fields that are turned most, instead of all of them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from robovlms_jax import schema

_WIDEST = 110

started_as = ""
"""How the entry point started the running program ("robovlms train bridge"); empty: it was started by itself."""


def short_help(
    program: str, description: str, start: tuple[str, Sequence[str]], config: Any, usual: Sequence[str]
) -> str:
    """Text for --help.

    Args:
      program: how it is started, "python -m experiments.calvin_abcd".
      description: its first paragraph is shown.
      start: name of the preset whose values are shown, and those of all presets.
      config: the preset. usual: dotted fields to show.
    """
    width = min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
    name, presets = start
    wrapped = functools.partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
    values = {path: _value(config, path) for path in usual}
    summary, *others = with_examples_apart(description).split("\n\n")
    examples = [line[2:] for part in others for line in part.splitlines() if line.startswith("    ")]
    examples += [""] if examples else []
    column = max(map(len, usual)) + 4
    lines = [
        f"usage: {program} [--preset NAME] [--FIELD VALUE ...]",
        "",
        wrapped(" ".join(summary.split())),
        "",
        *examples,
        wrapped(f"presets: {', '.join(presets)}", subsequent_indent="  "),
        "",
        f"Fields that are turned most, with the values of preset {name}:",
    ]
    for path in usual:
        value = textwrap.shorten(values[path], 24, placeholder="...")
        text = f"  --{path}".ljust(column) + f" {value:<24} {document(config, path)}"
        lines.append(text if len(text) <= width else text[: width - 3] + "...")
    return "\n".join([*lines, "", "All fields, each with what it does: --help-all."])


_EXAMPLE = re.compile(r"(?:(.*\S) {3,}| *)(python -m .*)")


def with_examples_apart(text: str) -> str:
    """A description in which every example, "python -m ...", stands indented on lines of its own: the library that
    fills paragraphs leaves indented lines alone."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        goes_on = bool(lines) and lines[-1].startswith("    ") and lines[-1].endswith("\\")
        example = _EXAMPLE.fullmatch(line)
        if goes_on:
            lines.append(f"        {line.strip()}")
        elif example:
            lines += [*filter(None, [example[1]]), f"    {example[2]}"]
        else:
            lines.append(line)
    return "\n".join(lines)


def program_name(argv0: str) -> str:
    """How the running program is started: "python -m experiments.bridge" for its file in that folder, or as the entry
    point was called."""
    if started_as:
        return started_as
    folder, file = os.path.split(os.path.abspath(argv0))
    module = f"{os.path.basename(folder)}.{file.removesuffix('.py')}"
    return f"python -m {module}" if os.path.basename(folder) == "experiments" else file


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field of a dataclass, or of an instance, that has no fields of its own or is given
    whole."""
    for name, hint in schema.hints(config if isinstance(config, type) else type(config)).items():
        value = getattr(config, name, None)
        inner = value if dataclasses.is_dataclass(value) else hint
        whole = isinstance(hint, type) and issubclass(hint, schema.Tagged)
        if dataclasses.is_dataclass(inner) and not whole and not hasattr(inner, "to_json"):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def suggestions(arguments: Sequence[str], config: Any, others: Sequence[str] = ()) -> list[str]:
    """A line for every argument that is no flag of the settings, nor one of `others`, with the nearest flag that is."""
    known = [f"--{name}" for name, _ in fields(config)] + list(others)
    given = [argument.partition("=")[0].replace("-", "_").replace("__", "--", 1) for argument in arguments]
    unknown = [flag for flag in given if flag.startswith("--") and flag not in [*known, "--help"]]
    near = {flag: difflib.get_close_matches(flag, known, n=1) for flag in unknown}
    return [f"{flag} is no flag of this program; did you mean {names[0]}?" for flag, names in near.items() if names]


@contextlib.contextmanager
def suggesting(arguments: Sequence[str], config: Any, own: Sequence[str]) -> Iterator[None]:
    """Where arguments are refused, names flags of the program that the library has never heard of (`own`), since they
    are taken out of the arguments before it reads them."""
    try:
        yield
    except SystemExit as end:
        if end.code == 2:
            ends = tuple(f" {flag}?" for flag in own)
            for line in suggestions(arguments, config, own):
                if line.endswith(ends):
                    print(line, file=sys.stderr)
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """How a message goes on after a name that is not known."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def document(config: Any, path: str) -> str:
    """What a field takes where that is one of some names, else the first sentence under it in its class."""
    *rooms, name = path.split(".")
    for room in rooms:
        config = getattr(config, room)
    hint = schema.hints(type(config))[name]
    if isinstance(hint, type) and issubclass(hint, schema.Tagged):
        return "one of " + ", ".join(hint.kinds())
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    text = " ".join(_documents(type(config)).get(name, "").split())
    return re.split(r"\. ", text)[0].rstrip(".")


@functools.cache
def _documents(cls: type) -> dict[str, str]:
    """Field -> the text under it, base classes included."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, after in zip(node.body, node.body[1:]):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                found[field.target.id] = str(after.value.value)
    return found


def _value(config: Any, path: str) -> str:
    for name in path.split("."):
        config = getattr(config, name)
    if isinstance(config, schema.Tagged):
        return config.kind_of(type(config))
    if isinstance(config, tuple):
        return " ".join(map(str, config)) or "()"
    return str(config) if config != "" else '""'
