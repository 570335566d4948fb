"""What mkdocs adds to the pages of this folder: pages that lie elsewhere in the repository, and the reference.

Links to files that are no page of the site (sources, results) become plain text: the site must hold together on a disk
without the repository beside it, and mkdocs' strict mode refuses links that lead nowhere.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import pathlib
import posixpath
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from robovlms_jax import programs, schema
from robovlms_jax.policies import vla  # noqa: F401  (heads and sensors are known once their files are imported)
from robovlms_jax.runs.config import ExperimentConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "datasets.md": "data/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
}
"""Page of the site -> file of the repository."""
PUBLIC = (
    *("robovlms_jax.load", "robovlms_jax.control.interface", "robovlms_jax.control.robot"),
    *("robovlms_jax.control.execution", "robovlms_jax.deploy.client", "robovlms_jax.deploy.safety"),
    *("robovlms_jax.deploy.limits", "robovlms_jax.deploy.loop", "robovlms_jax.types", "robovlms_jax.training.step"),
    *("robovlms_jax.training.stages", "robovlms_jax.backbones.registry", "robovlms_jax.backbones.sequence"),
    *("robovlms_jax.policies.vla", "robovlms_jax.policies.losses", "robovlms_jax.policies.confidence"),
    *("robovlms_jax.evaluation.rollout", "robovlms_jax.evaluation.rollout_metrics"),
)
"""Modules whose public names a user's own program meets."""
CODE = r"`[^`\n]+`"
CODE_OR_LINK = re.compile(
    rf"(?P<code>^```.*?^```[^\n]*$|{CODE})|(?P<picture>!?)\[(?P<text>(?:[^\]`]|{CODE})*)\]\((?P<target>[^)\s]+)\)",
    flags=re.DOTALL | re.MULTILINE,
)
"""Code, in which nothing is a link, or a link, whose text may be code."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are no files of docs/."""
    pages = {name: (ROOT / source).read_text(encoding="utf-8") for name, source in ELSEWHERE.items()}
    pages["reference/commands.md"] = commands()
    pages["reference/settings.md"] = settings()
    pages["reference/python.md"] = "# Python\n\n" + "\n\n".join(f"::: {module}" for module in PUBLIC)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at pages of the site; those that lead out of it become text."""
    here = posixpath.dirname(ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    moved = {source: name for name, source in ELSEWHERE.items()} | {"README.md": "index.md"}
    from_page = posixpath.dirname(page.file.src_uri) or "."

    def link(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        picture, text, target = match["picture"], match["text"], match["target"]
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(here, path))
        name = moved.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if path == "README.md":
            hash_ = anchor = ""
        if name and files.get_file_from_path(name):
            return f"{picture}[{text}]({posixpath.relpath(name, from_page)}{hash_}{anchor})"
        return text

    return CODE_OR_LINK.sub(link, markdown)


def commands() -> str:
    """Every program, with the text that its file begins with."""
    found = []
    called = {
        program.module: f"{programs.NAME} {command} {word}".strip()
        for command, words in programs.COMMANDS.items()
        for word, program in words.items()
    }
    for path in sorted((ROOT / "experiments").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "__main__" in source:
            name = f"`{called[path.stem]}`\n\n" if path.stem in called else ""
            found.append(f"## experiments.{path.stem}\n\n{name}{fenced(ast.get_docstring(ast.parse(source)) or '')}")
    return (
        "# Commands\n\nA program has two names, such as `robovlms train` and `python -m experiments.calvin_abcd`; "
        "`robovlms` alone lists them. Each answers `--help`; fields of an experiment are in "
        "[settings](settings.md).\n\n" + "\n\n".join(found)
    )


def fenced(text: str) -> str:
    """A docstring's paragraphs; those that are indented, its examples, as code."""
    blocks = (
        f"```text\n{textwrap.dedent(block)}\n```" if block.startswith((" ", "python -m ")) else " ".join(block.split())
        for block in text.strip("\n").split("\n\n")
    )
    return "\n\n".join(blocks)


def settings() -> str:
    """Every field of an experiment, by its dotted name, with type, default and what it does."""
    lines = ["# Settings", "", "Every field of a preset can be overridden by its section's name and its own:"]
    lines += ["`--train.batch_size 64`, `--policy.head lstm`.", ""]
    for name, cls in configs(ExperimentConfig):
        texts = field_texts(cls)
        lines += [f"## {name or 'The run'}", "", (cls.__doc__ or "").split("\n\n")[0], ""]
        lines += ["| field | type | default | what |", "|---|---|---|---|"]
        for field in dataclasses.fields(cls):
            cells = (f"`{field.name}`", f"`{field.type}`", f"`{default(field)}`", texts.get(field.name, ""))
            lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def configs(cls: type, name: str = "") -> Iterator[tuple[str, type]]:
    """(dotted name, dataclass) of a configuration and of all that it holds; of heads and sensors every kind."""
    yield name, cls
    for field, hint in typing.get_type_hints(cls).items():
        label = f"{name}.{field}" if name else field
        for choice in {x for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x)}:
            if issubclass(choice, schema.Tagged):
                for kind in choice.kinds():
                    yield f"{label} ({kind})", choice.config_of(kind)
            else:
                yield from configs(choice, label)


def default(field: dataclasses.Field) -> str:
    """A field's default as text."""
    if field.default is not dataclasses.MISSING:
        return "its own fields" if dataclasses.is_dataclass(field.default) else repr(field.default)
    if field.default_factory is dataclasses.MISSING:
        return "must be given"
    made = field.default_factory()
    return "its own fields" if dataclasses.is_dataclass(made) else repr(made)


def field_texts(cls: type) -> Mapping[str, str]:
    """What stands below each field in the source of a dataclass and of its parents."""
    found = {}
    for parent in reversed([x for x in cls.__mro__ if dataclasses.is_dataclass(x)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        for above, below in itertools.pairwise(body):
            if (
                isinstance(above, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[above.target.id] = str(below.value.value)
    return found
