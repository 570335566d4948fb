"""Import directions (docs/style.md, section 2), and what importing the library must not do."""

from __future__ import annotations

import ast
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.processes import run_python

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "robovlms_jax"


class Room(NamedTuple):
    """A row of the table. imports: project modules it may use. libraries: the only outside ones; None = any."""

    imports: frozenset[str]
    libraries: frozenset[str] | None


def read_table() -> dict[str, Room]:
    """The table in docs/style.md: room (dotted, below the package) -> its row."""
    page = (ROOT / "docs" / "style.md").read_text()
    block = re.search(r"reads this table:\n\n```\n(.*?)```", page, flags=re.DOTALL)
    assert block, "docs/style.md has lost its table of imports"
    rooms = {}
    for line in block[1].splitlines():
        room, imports, libraries = re.fullmatch(r"(\S+)\s+->([^|]+)(?:\|(.+))?", line).groups()
        rooms[room] = Room(words(imports) - {"nothing"}, words(libraries) if libraries else None)
    return rooms


def words(text: str) -> frozenset[str]:
    return frozenset(word.strip() for word in text.split(","))


def imports_of(source: str) -> Iterator[str]:
    """Dotted names a file imports, wherever in the file; of a `from` import what it names as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def violations(module: str, source: str, table: dict[str, Room]) -> list[str]:
    """What the file of `module` (dotted, below the package) imports and may not."""
    own = max((room for room in table if is_within(module, room)), key=len, default=None)
    if own is None:
        return [f"{module} is in no room of the table in docs/style.md, section 2"]
    room, wrong = table[own], []
    for name in imports_of(source):
        top, _, rest = name.partition(".")
        if top == PACKAGE:
            allowed = any(is_within(rest, other) for other in {own, *room.imports})
        elif top in ("experiments", "benchmarks", "tests", ""):  # "": a relative import
            allowed = False
        else:
            allowed = room.libraries is None or top in room.libraries or top in sys.stdlib_module_names
        if not allowed:
            wrong.append(f"{module} imports {name}; {own} may import {sorted(room.imports)}")
    return wrong


def library_files() -> dict[str, pathlib.Path]:
    """Module name below the package -> file."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def read_layout() -> dict[str, set[str]]:
    """The drawing in docs/style.md: folder -> names of the Python files that are named there, without `.py`.

    Folders are rooms of the library, "" for files beside them, and the folders beside the library.
    """
    block = re.search(r"^## 2\. The house\n```\n(.*?)^```", (ROOT / "docs" / "style.md").read_text(), re.M | re.S)[1]
    texts: dict[str, str] = {}
    outer = folder = ""
    for line in block.splitlines():
        if top := re.match(r"(\w+)/", line):
            outer = folder = top[1]
        elif outer == PACKAGE and (inner := re.match(r"  (\w+)(/?)", line)):
            folder = inner[1] if inner[2] else ""
        texts[folder] = texts.get(folder, "") + line + "\n"
    named = {folder: re.findall(r"(\w+)\.py\b|\{([\w,\s]+)\}\.py\b", text) for folder, text in texts.items()}
    return {
        folder: {name for pair in pairs for name in re.findall(r"\w+", ",".join(pair))}
        for folder, pairs in named.items()
    }


def test_the_layout_names_every_file_and_only_files_that_exist():
    # Every package has its __init__.py, every room its config.py.
    layout, files = read_layout(), {}
    for path in [path for top in (PACKAGE, "experiments", "benchmarks") for path in (ROOT / top).rglob("*.py")]:
        top, *inside = path.relative_to(ROOT).parts
        room = top if top != PACKAGE else inside[0] if len(inside) > 1 else ""
        files.setdefault(room, set()).add(path.stem)
    for room, there in files.items():
        missing = there - {"__init__", "config"} - layout[room]
        assert not missing, (
            f"docs/style.md, section 2, does not say what these files of {room or PACKAGE} are: {missing}"
        )
        gone = layout[room] - set().union(*files.values())
        assert not gone, f"docs/style.md, section 2, names files under {room or PACKAGE} that are nowhere: {gone}"


def test_directions():
    table = read_table()
    files = library_files()
    assert files.pop("").read_text() == "", f"{PACKAGE}/__init__.py must stay empty"
    wrong = [line for module, path in files.items() for line in violations(module, path.read_text(), table)]
    assert not wrong, "\n".join(wrong)


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Groups of names that can all reach each other."""
    reach = {name: set(others) for name, others in arrows.items()}
    for middle in reach:  # Warshall's closure
        for others in reach.values():
            if middle in others:
                others |= reach[middle]
    return [{name, *others} for name, others in reach.items() if name in others]


def test_neither_files_nor_rooms_import_in_circles():
    files = {f"{PACKAGE}.{module}": path for module, path in library_files().items() if module}
    arrows = {module: set(imports_of(path.read_text())) & set(files) - {module} for module, path in files.items()}
    assert not circles(arrows)

    def room_of(module: str) -> str:
        return module.split(".")[1]

    # A room's config.py stands below all rooms.
    rooms: dict[str, set[str]] = {room_of(module): set() for module in files}
    for module, others in arrows.items():
        rooms[room_of(module)] |= {room_of(x) for x in others if not x.endswith(".config")} - {room_of(module)}
    assert not circles(rooms)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}] * 2


def test_the_table_keeps_what_the_page_promises():
    table = read_table()
    assert [room for room, row in table.items() if "data" in row.imports] == [
        "playtable.recording",
        "playtable.splits",
        "driving.recording",
        "runs",
    ]
    assert table["training"].imports.isdisjoint({"evaluation", "envs", "deploy", "runs"})
    assert [room for room, row in table.items() if "runs" in row.imports] == ["strategies", "load"]
    assert table["control"] == Room(frozenset(), frozenset({"numpy"}))
    assert table["deploy"].libraries == {"numpy", "msgpack", "websockets"}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("training.loop", "from robovlms_jax.envs.calvin import tasks"),
        ("training.loop", "import robovlms_jax.data.loading"),
        ("policies.vla", "from robovlms_jax.data.base import Episode"),
        ("policies.heads.lstm", "from robovlms_jax.runs import config"),
        ("weights.rules", "from robovlms_jax.weights import sources"),
        ("control.robot", "import jax"),
        ("control.execution", "from robovlms_jax.types import Array"),
        ("deploy.client", "def connect():\n    import flax.linen as nn"),
        ("nn.mlp", "import optax"),
        ("nn.mlp", "from . import linear"),
        ("data.base", "from experiments import plan"),
        ("gardening.spade", "import numpy"),
    ],
)
def test_guard_notices(module: str, line: str):
    assert len(violations(module, line, read_table())) == 1


def test_files_and_functions_fit_what_a_reader_holds_in_mind():
    # docs/style.md, section 14: a file below 400 lines, a function below 60, at most eight arguments.
    long = []
    programs = {f"{top}.{x.stem}": x for top in ("benchmarks", "experiments") for x in (ROOT / top).glob("*.py")}
    for module, path in (library_files() | programs).items():
        source = path.read_text()
        if source.count("\n") > 400:
            long.append(f"{module} has {source.count(chr(10))} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines, given = node.end_lineno - node.lineno + 1, node.args
                names = [
                    a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")
                ]
                if lines > 60 or len(names) > 8:
                    long.append(f"{module}.{node.name} has {lines} lines and {len(names)} arguments")
    assert not long, long


def test_no_utils():
    # A helper lives with its first user and moves when a second room needs it.
    folders = (PACKAGE, "experiments", "benchmarks", "tests")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if re.match(r"utils?\b", path.stem)]
    assert not found


NUMPY_ALONE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
more = {"jax", "msgpack", "websockets", "PIL", "scipy"} & set(sys.modules)
assert not more, f"importing {sys.argv[1:]} loads {sorted(more)}"
print(len(sys.argv) - 1, "imported")
"""


def test_importing_what_runs_on_a_robots_computer_needs_numpy_alone():
    # msgpack and websockets are imported by the functions that talk to somebody.
    rooms = ("control", "deploy")
    modules = [f"{PACKAGE}.{name}" for name in library_files() if name.startswith(rooms)]
    assert run_python("-c", NUMPY_ALONE, *modules) == f"{len(modules)} imported\n"


IMPORT_EVERYTHING = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {"torch", "tensorflow", "tensorflow_datasets", "transformers", "ray"} & set(sys.modules)
    assert not heavy, f"importing {name} loads {sorted(heavy)}"
print(len(sys.argv) - 1, "imported")
"""


def test_importing_the_library_and_the_experiments_is_light():
    # No such platform: whatever starts a device while it is imported raises.
    modules = [f"{PACKAGE}.{module}" if module else PACKAGE for module in library_files()]
    modules += [f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("*.py")]
    said = run_python("-c", IMPORT_EVERYTHING, *modules, JAX_PLATFORMS="none")
    assert said == f"{len(modules)} imported\n"  # and nothing is printed
