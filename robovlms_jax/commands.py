"""The one entry point, `python -m robovlms_jax COMMAND ...` or `robovlms COMMAND ...`: which program a command starts.

Every program is a module of `experiments` and can be started by itself; here it is run as it would be there. Nothing of
it, and so neither jax nor the rest of the library, is imported before the command is known.
"""

from __future__ import annotations

import difflib
import importlib.util
import runpy
import sys
from collections.abc import Sequence

from robovlms_jax import cli_help, ending, extras, programs

_EACH = f" What each does: {programs.NAME} --help."


def overview() -> str:
    """Text for --help."""
    lines = [
        f"usage: {programs.NAME} COMMAND [WORD] [--FIELD VALUE ...]     (or: python -m robovlms_jax COMMAND ...)",
        "",
        "Turns a vision-language model into a robot policy. Commands, in the order of a first project:",
        "",
    ]
    for command, words in programs.present().items():
        for word, program in words.items():
            lines.append(f"  {f'{command} {word}'.strip():<18} {program.about}  [{programs.PACKAGE}.{program.module}]")
    lines.append(
        f"  {f'{programs.COMPLETION} SHELL':<18} a script that completes all of this: {', '.join(programs.SHELLS)}"
    )
    lines += [
        "",
        f"{programs.NAME} COMMAND --help says what a command takes. Names in brackets can be started by themselves:",
        f"python -m {programs.PACKAGE}.calvin_abcd is {programs.NAME} train.",
        f"New here? Start {programs.NAME} demo, then read docs/tutorial.md.",
    ]
    return "\n".join(lines)


def find(arguments: Sequence[str]) -> tuple[str, programs.Program, list[str]]:
    """(how it is called, program, its own arguments). Raises ValueError that names the nearest command or word."""
    commands = programs.present()
    command, *rest = arguments
    if command not in commands:
        raise ValueError(_unknown("command", command, [*commands, programs.COMPLETION]) + _EACH)
    words = commands[command]
    if rest and not rest[0].startswith("-"):
        word, *rest = rest
        if word not in words and set(words) == {""}:
            raise ValueError(
                f"unknown word after {command} {word!r}; it takes --FIELD VALUE, and {programs.NAME} {command} --help "
                "lists the fields."
            )
        if word not in words:
            message = _unknown(f"word after {command}", word, [*filter(None, words), "--help"]) + _EACH
            if "" in words and words[""].settings == "PRESETS":
                message += f" A preset goes with --preset: {programs.NAME} {command} --preset {word}."
            raise ValueError(message)
        return f"{programs.NAME} {command} {word}", words[word], rest
    if "" not in words:
        raise ValueError(f"{command} needs one of these words: {', '.join(words)}.")
    return f"{programs.NAME} {command}", words[""], rest


def _unknown(what: str, given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=3)
    near.sort(key=lambda name: sorted(name) != sorted(given))  # letters that changed places are the likeliest slip
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {given!r}{hint} There are: {', '.join(known)}."


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the arguments say. Wrong ones end the process with a message and status 2."""
    ending.without_traceback()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("--help", "-h"):
        print(overview())
        return
    try:
        if arguments[0] == programs.COMPLETION:
            print(_completion(arguments[1:]))
            return
        called, program, rest = find(arguments)
        if importlib.util.find_spec("jax") is None:  # installed for a robot
            sys.exit(f"error: {called} needs JAX and what goes with it: {extras.install(program.extra)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    cli_help.started_as = called
    sys.argv = [called, *rest]
    runpy.run_module(f"{programs.PACKAGE}.{program.module}", run_name="__main__", alter_sys=True)


def _completion(arguments: Sequence[str]) -> str:
    if len(arguments) != 1 or arguments[0] not in programs.SHELLS:
        near = (
            _unknown("shell", arguments[0], programs.SHELLS)
            if arguments
            else f"name a shell: {', '.join(programs.SHELLS)}."
        )
        raise ValueError(near)
    from robovlms_jax import completion

    return completion.script(arguments[0], programs.present())
