"""Scripts that complete the entry point's commands, presets, flags and their choices in bash, zsh and fish.

They are static: made once from the configurations, `robovlms completion bash`, and sourced by the shell, so that a key
press waits for nothing.
"""

from __future__ import annotations

import importlib
import operator
import typing
from collections.abc import Mapping
from typing import Any

from robovlms_jax import cli_help, programs, schema

Flags = dict[str, tuple[str, ...]]
"""Flag -> the words that may follow it; () where any may."""


def script(shell: str, every: Mapping[str, Mapping[str, programs.Program]]) -> str:
    """The script of one of `programs.SHELLS`. every: command -> word after it -> program."""
    known = {
        f"{command} {word}".strip(): flags_of(program)
        for command, words in every.items()
        for word, program in words.items()
    }
    words = {command: [word for word in found if word] for command, found in every.items()}
    return _fish(words, known) if shell == "fish" else _bash(words, known, zsh=shell == "zsh")


def flags_of(program: programs.Program) -> Flags:
    """Every flag of a program, with presets and the choices of its fields."""
    settings = operator.attrgetter(program.settings)(importlib.import_module(f"{programs.PACKAGE}.{program.module}"))
    found: Flags = {"--help": ()}
    if callable(settings) and not isinstance(settings, type):
        settings = settings()
    if isinstance(settings, Mapping):
        found |= {"--help-all": (), "--preset": tuple(settings)}
    configs = settings.values() if isinstance(settings, Mapping) else [settings]
    for config in configs:
        found |= {f"--{name}": _choices(hint) or _names(name) for name, hint in cli_help.fields(config)}
    return found


def _names(field: str) -> tuple[str, ...]:
    """Words for fields that take a name out of a registry."""
    from robovlms_jax.backbones import registry

    return tuple(registry.names()) if field == "backbone" or field.endswith("backbone.name") else ()


def _choices(hint: Any) -> tuple[str, ...]:
    if isinstance(hint, type) and issubclass(hint, schema.Tagged):
        return tuple(hint.kinds())
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return tuple(str(choice) for choice in choices if choice != "")


def _bash(words: Mapping[str, list[str]], known: Mapping[str, Flags], *, zsh: bool) -> str:
    # bashcompinit needs compdef, which is not there in a zsh that has not started its own completion yet.
    start = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }"
    lines = [start, "autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    # Flags are shown with underscores and understood with hyphens, too; zsh compares with the typed word by itself.
    other_spelling = [
        "  if [[ ${#COMPREPLY[@]} -eq 0 && $current == --* ]]; then current=${current#--}",
        '    COMPREPLY=($(compgen -W "$found" -- "--${current//-/_}")); fi',
    ]
    lines += [
        "_robovlms() {",
        "  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} key=${COMP_WORDS[1]} found=",
        '  [[ $COMP_CWORD -gt 2 && ${COMP_WORDS[2]} != -* ]] && key="$key ${COMP_WORDS[2]}"',
        f'  if [[ $COMP_CWORD -eq 1 ]]; then found="{" ".join([*words, programs.COMPLETION])}"; else',
        '  case "$key:$previous" in',
        f'    "{programs.COMPLETION}:"*) found="{" ".join(programs.SHELLS)}" ;;',
    ]
    for key, flags in known.items():
        lines += [f'    "{key}:{flag}") found="{" ".join(choices)}" ;;' for flag, choices in flags.items() if choices]
    lines += ["  esac", '  if [[ -z $found ]]; then case "$key" in']
    for key, flags in known.items():
        following = [] if " " in key else words[key]
        lines.append(f'    "{key}") found="{" ".join([*following, *flags])}" ;;')
    lines += [
        "  esac; fi; fi",
        '  COMPREPLY=($(compgen -W "$found" -- "$current"))',
        *([] if zsh else other_spelling),
        "}",
        f"complete -o default -F _robovlms {programs.NAME}",
    ]
    return "\n".join(lines)


def _fish(words: Mapping[str, list[str]], known: Mapping[str, Flags]) -> str:
    name = programs.NAME
    first = "__fish_use_subcommand"
    lines = [f"complete -c {name} -n {first} -f -a '{' '.join([*words, programs.COMPLETION])}'"]
    lines.append(
        f"complete -c {name} -n '__fish_seen_subcommand_from {programs.COMPLETION}' -f -a '{' '.join(programs.SHELLS)}'"
    )
    for command, following in words.items():
        if following:
            seen = f"__fish_seen_subcommand_from {command}; and not __fish_seen_subcommand_from {' '.join(following)}"
            lines.append(f"complete -c {name} -n '{seen}' -a '{' '.join(following)}'")
    for key, flags in known.items():
        command, _, word = key.partition(" ")
        seen = f"__fish_seen_subcommand_from {command}"
        others = words[command]
        if word:
            seen += f"; and __fish_seen_subcommand_from {word}"
        elif others:
            seen += f"; and not __fish_seen_subcommand_from {' '.join(others)}"
        for flag, choices in flags.items():
            values = f" -x -a '{' '.join(choices)}'" if choices else ""
            lines.append(f"complete -c {name} -n '{seen}' -l {flag[2:]}{values}")
    return "\n".join(lines)
