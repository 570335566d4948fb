"""Help of one screen: the fields that are turned most, instead of all of them."""

from __future__ import annotations

import ast
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
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from robovlms_jax import schema

_WIDEST, _NARROWEST = 120, 72
_LINES, _MORE_LINES = 45, 50
"""Of help, where the terminal has `_WIDEST` columns, and where it has fewer."""
_VALUE, _EXAMPLES = 24, 8
"""Columns for a value; lines for examples, and for names of presets."""
_KEPT = "\0"
"""Stands for a space at which a line must not be broken."""
_LIKE = 0.8
"""Least `difflib` ratio at which a name is taken for another one that is misspelt, wherever that one stands."""
_USUAL = {"lr": "learning_rate", "bs": "batch_size", "wd": "weight_decay"}
"""What other programs call fields -> their names here."""

started_as = ""
"""How the entry point started the running program ("robovlms train bridge"); empty: it was started by itself."""


def show(description: str | None, config: Any, start: tuple[str, Sequence[str]] = ("", ())) -> NoReturn:
    """Prints `short_help` of the running program, with the fields that the class names in USUAL, and ends it."""
    text = description or _class(config).__doc__ or ""
    print(short_help(program_name(sys.argv[0]), text, start, config, getattr(config, "USUAL", ())))
    sys.exit(0)


def short_help(
    program: str, description: str, start: tuple[str, Sequence[str]], config: Any, usual: Collection[str] = ()
) -> str:
    """Text for --help: at most 45 lines where the terminal has 120 columns. A narrower one gets at most 50, no field
    less, and fewer words about each.

    Args:
      program: how it is started, "python -m experiments.calvin_abcd".
      description: its first paragraph and its examples are shown.
      start: name of the preset whose values are shown, and those of all presets; "" and () without presets.
      config: a dataclass, or an instance, whose values are then the defaults.
      usual: dotted fields to show, as a mapping with few words about each for narrow terminals; empty: the fields of
        `config` itself, in their order, as far as they fit.
    """
    width = min(max(shutil.get_terminal_size((_WIDEST, 24)).columns, _NARROWEST), _WIDEST)
    every = [path for path, _ in fields(config)]
    head = _head(program, description, start, _WIDEST)
    shown = list(usual) or [path for path in every if "." not in path] or every
    rest = 3
    lines = _lines(config, shown, _LINES - len(head) - rest)
    if width < _WIDEST:
        head = _head(program, description, start, width)
        shown = shown[: _MORE_LINES - len(head) - rest]
        lines = _one_line_each(config, shown, width, usual if isinstance(usual, Mapping) else {})
    return "\n".join([*head, *lines, "", *_rest(set(every) - set(shown), width)])


def _head(program: str, description: str, start: tuple[str, Sequence[str]], width: int) -> list[str]:
    """What stands above the fields."""
    name, presets = start
    wrapped = functools.partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
    summary, *others = with_examples_apart(description).split("\n\n")
    examples = [line for part in others for line in part.splitlines() if line.startswith("    ")]
    usage = f"usage: {program} {'[--preset NAME] ' if presets else ''}[--FIELD VALUE ...]"
    head = [*wrapped(usage, subsequent_indent=" " * 6), "", *wrapped(" ".join(summary.split())), ""]
    head += _shown_examples(examples, width)
    head += [""] if examples else []
    names = f"presets: {', '.join(presets)}"
    head += wrapped(names, subsequent_indent="  ", max_lines=_EXAMPLES, placeholder=" ...") if presets else []
    return head + (
        ["", *wrapped(f"Fields that are turned most, with the values of preset {name}:")] if presets else ["Fields:"]
    )


def _lines(config: Any, shown: list[str], room: int) -> list[str]:
    """Fields in a wide terminal, in at most `room` lines; those that do not fit are taken out of `shown`."""
    while True:
        for seps in ((), ("; ", ": ", " ("), ("; ", ": ", " (", ", ")):
            lines = [line for path in shown for line in _field_lines(config, path, shown, _WIDEST, seps)]
            if len(lines) <= room:
                return lines
        shown.pop()


def _one_line_each(config: Any, shown: Sequence[str], width: int, words: Mapping[str, str]) -> list[str]:
    """Fields in a narrow terminal: with its value, and as much of the text as fits beside them."""
    leads = {path: f"  {_flag(path)} {_value(config, path)}" for path in shown}
    column = min(max(map(len, leads.values()), default=0), width // 2 - 2) + 2
    lines = []
    for path, lead in leads.items():
        lead = f"{lead:<{column - 2}}  "
        lines.append(f"{lead}{_shortened(words.get(path) or document(config, path), width - len(lead))}".rstrip())
    return lines


def _shortened(text: str, room: int) -> str:
    """A text that ends where one of its clauses does, or else with dots for the words that had no room; empty where
    there is none for words at all."""
    text = text.removeprefix("one of ")
    if len(text) <= room or room < 8:
        return text if len(text) <= room else ""
    ends = [i for sep in ("; ", ": ", " (") if 12 < (i := text.rfind(sep, 0, room + len(sep))) <= room]
    return text[: ends[0]] if ends else textwrap.shorten(text, room, placeholder=" ...", break_on_hyphens=False)


def _shown_examples(lines: Sequence[str], width: int) -> list[str]:
    """As many whole examples as fit; lines: of `with_examples_apart`, an example's further ones indented by eight."""
    whole: list[str] = []
    for line in lines:
        if whole and whole[-1].endswith("\\"):
            whole[-1] = whole[-1].removesuffix("\\").rstrip() + " " + line.strip()
        else:
            whole.append(line[2:])
    shown: list[str] = []
    for example in whole:
        parts = _example_lines(example, width)
        if len(shown) + len(parts) > _EXAMPLES:
            break
        shown += parts
    return shown


def _example_lines(example: str, width: int) -> list[str]:
    """A command, broken where a shell allows it, and not between a flag and its value: its comment, which cannot be,
    goes before it where both are too long for a line."""
    wrapped = functools.partial(textwrap.wrap, width=width - 2, break_long_words=False, break_on_hyphens=False)
    command, _, comment = example.partition(" # ")
    before = []
    if comment and len(example) > width - 2:
        before = wrapped(comment.strip(), initial_indent="  # ", subsequent_indent="  # ")
        example = command.rstrip()
    kept = re.sub(r'(--\S+) (?!-)|"[^"]*"', lambda found: found[0].replace(" ", _KEPT), example)
    lines = wrapped(kept, subsequent_indent="      ", replace_whitespace=False, drop_whitespace=True)
    lines = [line.replace(_KEPT, " ") for line in ["  " + lines[0].strip(), *lines[1:]]]
    return [*before, *(line + " \\" for line in lines[:-1]), lines[-1]]


def _field_lines(config: Any, path: str, shown: Sequence[str], width: int, seps: Sequence[str]) -> list[str]:
    """A field, its value and what it is. seps: where a text may end that fits on no one line."""
    column = min(max(map(len, shown)) + 5, 40)
    value = _value(config, path)
    lead = f"  {_flag(path)}".ljust(column) + f" {value:<{_VALUE}} "
    text, room = document(config, path), width - column - _VALUE - 2
    if len(text) > room and seps and not text.startswith("one of "):
        ends = [i for sep in seps if 12 < (i := text.rfind(sep, 0, room + len(sep))) <= room]
        text = text[: ends[0]] if ends else text
    indent = " " * (width - room)
    lines = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
    first = [lead + lines[0]] if len(lead) <= width - room else [lead.rstrip(), indent + lines[0]]
    return [*(line.rstrip() for line in first), *(indent + line for line in lines[1:])]


def _flag(path: str) -> str:
    """As it is typed; results go to --out in every program (`cli.OUTPUT`)."""
    return "--out" if path == "train.output" else f"--{path}"


def _rest(others: Collection[str], width: int) -> list[str]:
    """What --help-all has besides, in two lines."""
    groups = sorted({f"--{path.partition('.')[0]}.*" if "." in path else f"--{path}" for path in others})
    listed = textwrap.shorten(", ".join(groups), min(100, 2 * width - 70), placeholder=" ...")
    also = f" (also {listed})" if groups else ""
    return textwrap.wrap("All fields, each with all of its text: --help-all" + also + ".", width)


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
    known = [*_flags(config), *others, "--help"]
    keyed = tuple(f"--{name}." for name, hint in fields(config) if _has_any_keys(hint))
    given = [argument.partition("=")[0].replace("-", "_").replace("__", "--", 1) for argument in arguments]
    flags = [flag for flag in given if flag.startswith("--") and not flag.startswith(keyed)]
    unknown = [flag for flag in flags if not {flag, re.sub(r"(--|\.)no_", r"\1", flag)} & set(known)]
    near = {flag: _nearest(flag, known) for flag in unknown}
    spelled = {flag: name.replace("--help_all", "--help-all") for flag, name in near.items() if name}
    return [f"{flag} is no flag of this program; did you mean {name}?" for flag, name in spelled.items()]


def _has_any_keys(hint: Any) -> bool:
    """Mappings, and tuples of parts, whose keys are numbers."""
    return typing.get_origin(hint) in (dict, Mapping) or schema.item_of(hint) is not None


def _flags(config: Any) -> list[str]:
    """Of every field, and of the fields that a part with a registered kind has at present."""
    found = [f"--{name}" for name, _ in fields(config)]
    for path, hint in fields(config):
        if isinstance(hint, type) and issubclass(hint, schema.Tagged):
            part = config
            for name in path.split("."):
                part = getattr(part, name, None)
            inner = ["kind", *(name for name, _ in fields(part))] if dataclasses.is_dataclass(part) else ["kind"]
            found += [f"--{path}.{name}" for name in inner]
    return found


def _nearest(flag: str, known: Sequence[str]) -> str:
    """The flag that is spelt most like it, or whose own name is: `train.learning_rte` stands for
    `optimizer.learning_rate`, and so do its initials, `lr`; `head.kind` for `policy.head.kind`. "": none is near."""

    def named(of: str) -> str:
        name = of.rpartition(".")[2].lstrip("-")
        return _USUAL.get(name, name)

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, flag, other).ratio()

    room = flag.rpartition(".")[0]  # asked first: `data.roots` is `data.root`, though `data.others.roots` is spelt so
    beside = {named(x) for x in known if x.rpartition(".")[0] == room}
    names = [
        name
        for group in (beside, {named(x) for x in known})
        for name in difflib.get_close_matches(named(flag), group, n=1, cutoff=_LIKE)
    ]
    alike = [x for x in known if named(x) in names or x.endswith(flag.replace("--", ".", 1))]
    return max(alike, key=likeness) if alike else next(iter(difflib.get_close_matches(flag, known, n=1)), "")


def document(config: Any, path: str) -> str:
    """What a field takes where that is one of some names, else the first sentence under it in its class."""
    *rooms, name = path.split(".")
    for room in rooms:
        config = getattr(config, room, None) or schema.hints(_class(config))[room]
    hint = schema.hints(_class(config))[name]
    if isinstance(hint, type) and issubclass(hint, schema.Tagged):
        return "one of " + ", ".join(hint.kinds())
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(value) or '""' for value in typing.get_args(hint))
    text = " ".join(_documents(_class(config)).get(name, "").split())
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


def _class(config: Any) -> type:
    return config if isinstance(config, type) else type(config)


def _value(config: Any, path: str) -> str:
    """A field's value as text, "needed" where it has none; of one that is too long for its column the words
    or folders that fit, and "..."."""
    *rooms, name = path.split(".")
    for room in rooms:
        config = getattr(config, room, None) or schema.hints(_class(config))[room]
    if not hasattr(config, name):
        field = next(x for x in dataclasses.fields(config) if x.name == name)
        if field.default_factory is dataclasses.MISSING:
            return "needed"
        value = field.default_factory()
    else:
        value = getattr(config, name)
    if isinstance(value, schema.Tagged):
        return value.kind_of(type(value))
    if isinstance(value, tuple):
        text = " ".join(map(str, value)) or "()"
    elif dataclasses.is_dataclass(value):
        text = str(getattr(value, "name", "its own fields"))
    else:
        text = str(value) if value != "" else '""'
    return text if len(text) <= _VALUE else re.sub(r"[^/ ]*$", "", text[: _VALUE - 3]) + "..."
