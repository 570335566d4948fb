"""Every command line and every flag that documents, docstrings and messages name is one that the programs take."""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import logging
import os
import pathlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import tyro
import yaml

from experiments import calvin_abcd
from robovlms_jax import cli, cli_switches, schema, upstream
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.runs import load

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*.md", "data/README.md", "data/*/README.md", "benchmarks/README.md")
LAUNCHERS = ("launch/*.*", "launch/docker/*")
SOURCES = ("robovlms_jax", "experiments", "benchmarks")
PROGRAMS = sorted(
    f"{folder}.{path.stem}"
    for folder in ("experiments", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text() and re.search(r"\bcli\b|\b(launch|pages)\.main", path.read_text())
)
COMMAND = re.compile(r"python -m ((?:experiments|benchmarks)\.\w+)((?:\"[^\"\n]*\"|[^\n`'\"#;|&)\\]|\\\n)*)")
LAUNCH = re.compile(
    r"launch/[\w.]+ (?:train )?(?:\S+ )?(experiments\.\w+)((?:\"[^\"\n]*\"|[^\n`'\"#;|&)\\]|\\\n)*)"
)  # launch/FILE RUN PROGRAM FLAGS, or without RUN
SEARCH = re.compile(r"launch/search\.sbatch (?=--)((?:\"[^\"\n]*\"|[^\n`'\"#;|&)\\]|\\\n)*)")
MAKE = re.compile(r"make run ARGS=\"([^\"\n]*)\"")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*(?:\.[a-zA-Z][\w-]*)*")

OTHERS = {
    "git, uv": "--porcelain --untracked-files --recurse-submodules --recursive --init --python",
    "pip, pytest, ruff, tensorboard": "--no-deps --fix --check --logdir --durations --dist --no-cache-dir --quiet",
    "sbatch, srun": "--array --wrap --nodes --ntasks --ntasks-per-node --gpus-per-node --gpus-per-task --gpu-bind "
    "--gpus --output --cpus-per-task --signal --requeue --open-mode --time --job-name --kill-on-bad-exit --parsable",
    "pyxis": "--container-image --container-mounts --container-workdir",
    "gcloud": "--zone --worker --command --accelerator-type --runtime-version --node-id --node-count --node-prefix "
    "--spot --format --force --quiet",
    "xpk": "--cluster --workload --tpu-type --num-slices --docker-image --max-restarts --restart-on-exit-codes "
    "--termination-grace-period-seconds --storage --command --dry-run --spot",
    "docker": "--privileged",
    "ray": "--address --min-nodes --num-cpus --num-gpus",
    "XLA": "--xla_cpu_use_fusion_emitters --xla_cpu_parallel_codegen_split_count "
    "--xla_force_host_platform_device_count",
    "vla-eval": "--no-docker",
    "pytest": "--durations --dist",
    "ours, in a text about any": "--help --help-all --flag --FIELD",
}
"""Flags of other programs."""


class Parsed(Exception):
    """A program got as far as its settings: they are this exception's argument."""


@functools.cache
def texts() -> tuple[tuple[str, str], ...]:
    """(file, text) of every page, and of every string in the sources, with X for what a message fills in. A string of
    one word is no text: it is an argument of some program that we start."""
    return tuple(_texts())


def _texts() -> Iterator[tuple[str, str]]:
    for page in sorted({path for pattern in PAGES for path in ROOT.glob(pattern)}):
        yield str(page.relative_to(ROOT)), page.read_text()
    for file in sorted({path for pattern in LAUNCHERS for path in ROOT.glob(pattern) if path.is_file()}):
        # As in a page: what stands in comments goes on without the sign.
        yield str(file.relative_to(ROOT)), re.sub(r"(?m)^# ?", "", file.read_text())
        if file.suffix == ".yaml":
            yield from (
                (str(file.relative_to(ROOT)), " ".join(words)) for words in _listed(yaml.safe_load(file.read_text()))
            )
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                text = node.value
            if len(text.split()) > 1:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def _listed(value: object) -> Iterator[list[str]]:
    """Every `command` of a Kubernetes object: a list of words."""
    if isinstance(value, dict):
        if isinstance(value.get("command"), list):
            yield value["command"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _listed(part)


@functools.cache
def commands() -> dict[tuple[str, tuple[str, ...]], str]:
    """(program, its arguments) -> the first file that says so."""
    found = {}
    for where, text in texts():
        lines = [(match[1], match[2]) for match in COMMAND.finditer(text)]
        lines += [(match[1], match[2]) for match in LAUNCH.finditer(text)]
        lines += [("experiments.search", match[1]) for match in SEARCH.finditer(text)]
        lines += [("experiments.calvin_abcd", match[1]) for match in MAKE.finditer(text)]
        for program, rest in lines:
            rest = re.sub(r"\\\n\s*", " ", rest)
            rest = re.split(r"\s{3,}| -->|, |: | \.{3}|\.(?:\s|$)", rest)[0]  # where the sentence goes on
            words = shlex.split(rest)
            arguments = words if words and words[0].startswith("--") else []  # else: "`python -m X` says how ..."
            found.setdefault((program, tuple(arguments)), where)
    return found


@pytest.fixture
def launch(monkeypatch):
    """(program, its arguments, instead of `tyro.cli`) -> what that returns; nothing else of the program runs."""
    monkeypatch.setattr(upstream, "load_experiment", lambda path: calvin_abcd.PRESETS["kosmos_lstm"])
    monkeypatch.setattr(load, "load_config", lambda path: calvin_abcd.FIXTURES)  # no checkpoint is there
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)  # of a larger machine

    def run(program: str, arguments: Sequence[str], read: Callable[..., object]) -> object:
        def stop(*settings, **options):
            raise Parsed(read(*settings, **options))

        monkeypatch.setattr(tyro, "cli", stop)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.delitem(sys.modules, program, raising=False)
        with pytest.raises(Parsed) as parsed:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        return parsed.value.args[0]

    return run


def test_documents_hold_the_commands_that_they_are_known_to_hold():
    # Fails if the pattern above stops finding them.
    known = commands()
    assert len(known) > 60
    assert ("experiments.calvin_abcd", ("--preset", "sample")) in known
    assert any(program == "experiments.search" and "hf://microsoft" in " ".join(rest) for program, rest in known)
    assert any(program == "experiments.convert_weights" and "--config" in rest for program, rest in known)


def test_every_command_in_documents_and_messages_is_one_that_its_program_takes(launch, capsys):
    read = tyro.cli

    def refusal(program: str, arguments: tuple[str, ...]) -> str | None:
        try:
            launch(program, arguments, read)
        except SystemExit as end:
            out = capsys.readouterr()
            return f"{program} {' '.join(arguments)}\n{out.out}{out.err}" if end.code else None

    refused, alike = [], collections.defaultdict(dict)
    for (program, arguments), where in commands().items():
        if program not in PROGRAMS:
            refused.append(f"{where}: there is no program {program}")
        elif "--preset" in arguments:
            preset = arguments[arguments.index("--preset") + 1]
            alike[program, preset][tuple(" ".join(arguments).replace(f"--preset {preset}", "").split())] = where
        elif arguments:  # without any, a text only speaks of the program
            alike[program, arguments][arguments] = where
    for (program, preset), lines in alike.items():
        start_at = ("--preset", preset) if isinstance(preset, str) else ()
        # Making a parser takes a quarter of a second, so one preset's lines are read at once, and again if that fails.
        if len(lines) > 1 and refusal(program, start_at + sum(lines, ())) is None:
            continue
        messages = {where: refusal(program, start_at + arguments) for arguments, where in lines.items()}
        refused += [f"{where}: {message}" for where, message in messages.items() if message]
    assert not refused, "\n".join(refused)


@functools.cache
def flags(cls: type) -> frozenset[str]:
    """Every dotted name that a program with settings `cls` takes, with underscores."""
    found = set()
    for name, hint in schema.hints(cls).items():
        kinds = [heads.config_of(kind) for kind in heads.kinds()] if hint is heads.HeadConfig else [hint]
        found.add("from" if (cls.__name__, name) == ("ConvertConfig", "source") else name)
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                found |= {f"{name}.{rest}" for rest in flags(kind)}
    return frozenset(found)


def test_every_flag_in_documents_and_messages_is_one_that_some_program_takes(launch):
    known = {flag[2:].replace("-", "_") for tool in OTHERS.values() for flag in tool.split()}
    known |= {flag[2:] for flag in cli.ALIASES} | {"preset", "upstream_json"}

    def names(f, **_):
        parts = [name.rpartition(".") for name in cli_switches.known(f)]
        return flags(f).union(*({f"no_{room}{dot}{leaf}", f"{room}{dot}no_{leaf}"} for room, dot, leaf in parts))

    for program in PROGRAMS:
        known |= launch(program, (), names)
    unknown = [
        f"{where}: {flag}"
        for where, text in texts()
        for flag in FLAG.findall(text)
        if not where.startswith(("robovlms_jax/cli.py", "robovlms_jax/cli_switches.py"))
        and flag != "--X"  # which make flags
        if "var(--" not in text  # a style sheet
        if flag[2:].replace("-", "_") not in known
    ]
    assert not unknown, "\n".join(unknown)


PLACES = ("", "robovlms_jax", "robovlms_jax/data")
"""Where documents begin when they name a module."""
DESIGNS = ("style.md",)
"""Pages that also name modules which are still to be written."""


def test_links_and_modules_that_documents_name_are_there():
    missing, found = [], 0
    for page in sorted({path for pattern in PAGES for path in ROOT.glob(pattern)} - {ROOT / "docs/log.md"}):
        text = page.read_text()
        links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
        modules = [] if page.name in DESIGNS else re.findall(r"`((?:\w+/)+\w+\.py)`", text)
        found += len(links) + len(modules)
        missing += [f"{page.name}: {link}" for link in links if not (page.parent / link).exists()]
        missing += [
            f"{page.name}: {name}" for name in modules if not any((ROOT / place / name).exists() for place in PLACES)
        ]
    assert not missing
    assert found > 50
