"""Flags that are true or false, in every usual spelling, and those that were so before."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from robovlms_jax import schema

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
"""What may follow a switch, in upper or lower case."""


def known(config: type | Any) -> frozenset[str]:
    """Dotted names, with underscores, of all fields that are true or false."""
    rooms = _rooms(config)
    return frozenset(f"{path}{name}" for path, cls in rooms for name, hint in schema.hints(cls).items() if hint is bool)


def former(config: type | Any) -> dict[str, Mapping[bool, str]]:
    """Dotted name of every field that was true or false before -> what is the same today (`schema.today`)."""
    return {f"{path}{name}": x for path, cls in _rooms(config) for name, x in getattr(cls, "FORMER", {}).items()}


def _rooms(config: type | Any, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every part of a configuration that has fields: what its fields' names begin with, and its class."""
    cls = config if isinstance(config, type) else type(config)
    yield prefix, cls
    for name, hint in schema.hints(cls).items():
        value = getattr(config, name, None)  # of a class: the field's default
        if dataclasses.is_dataclass(value) or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            yield from _rooms(value if dataclasses.is_dataclass(value) else hint, f"{prefix}{name}.")


def spell(arguments: Sequence[str], config: type | Any) -> list[str]:
    """The arguments with every switch as the command-line library spells it, `--a.flag` or `--a.no-flag`, and former
    ones with what is the same today."""
    switches, before = known(config), former(config)
    out, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        path, negated = _named(flag, {*switches, *before})
        if path is None:
            out.append(argument)
            continue
        if not equals and rest and not rest[0].startswith("-"):
            value, equals = rest.pop(0), "="
        is_switch = not equals or value.lower() in TRUE + FALSE
        if not is_switch and (negated or path not in before):
            text = f"{flag} is a switch: expected nothing after it, or True or False; got {value!r}."
            print(f"error: {text}", file=sys.stderr)
            sys.exit(2)
        on = (value.lower() not in FALSE) != negated
        if path in before:
            if is_switch:
                value = before[path][on]
                print(f"note: {flag} is no switch any more; taken as --{path} {value}.", file=sys.stderr)
            out.append(f"--{path}={value}")
            continue
        room, _, leaf = path.rpartition(".")
        out.append(f"--{room}{'.' if room else ''}{'' if on else 'no-'}{leaf}")
    return out


def _named(flag: str, names: Collection[str]) -> tuple[str | None, bool]:
    """The switch that an argument names, and whether with a `no` before the whole or before its last part."""
    if not flag.startswith("--"):
        return None, False
    path = flag[2:].replace("-", "_")
    room, dot, leaf = path.rpartition(".")
    spellings = [(path, False), (path.removeprefix("no_"), True), (room + dot + leaf.removeprefix("no_"), True)]
    return next((spelling for spelling in spellings if spelling[0] in names), (None, False))
