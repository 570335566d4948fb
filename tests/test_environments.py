"""What setup.cfg declares: bounds that can be tried, and neither more nor less than what is imported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from packaging.version import Version

from robovlms_jax import extras
from tests import environments
from tests.test_imports import ROOT, imports_of

# Distribution -> what is imported of it, where the names differ.
MODULES = {
    "absl-py": "absl",
    "hydra-core": "hydra",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "rerun-sdk": "rerun",
}
# Imported by an option that asks for it in its error message, or by what another program imports (vla_eval's harness);
# no package of ours.
ASKED_FOR = {"wandb", "simpler_env", "calvin_env", "omegaconf", "vla_eval"}


def module_of(requirement: environments.Requirement) -> str:
    return MODULES.get(requirement.name, requirement.name.replace("-", "_"))


def imported_by(*folders: str) -> set[str]:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {name.partition(".")[0] for path in paths for name in imports_of(path.read_text())}


def test_what_is_installed_is_what_is_imported():
    declared = environments.read()
    always = {module_of(r) for r in (*declared[""], *declared["train"])}
    optional = {module_of(r) for extra, rs in declared.items() if extra != "test" for r in rs}
    ours = {"robovlms_jax", "experiments", "benchmarks", "tests", ""}
    used = imported_by("robovlms_jax", "experiments") - sys.stdlib_module_names - ours
    assert always <= used, f"installed for nothing: {sorted(always - used)}"
    undeclared = used - always - optional - ASKED_FOR
    assert not undeclared, f"imported, but neither in install_requires nor in an extra: {sorted(undeclared)}"


def test_a_robots_computer_installs_numpy_websockets_and_msgpack_and_nothing_else():
    declared = environments.read()
    assert {r.name for r in (*declared[""], *declared["client"])} == {"numpy", "websockets", "msgpack"}
    train = {r.name for r in declared["train"]}
    for extra in declared.keys() - {"", "client"}:
        assert train <= {r.name for r in declared[extra]}, f"pip install -e '.[{extra}]' would not train"


def test_without_jax_an_experiment_says_what_to_install():
    # -S: no installed packages at all
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import experiments.plan"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install -e '.[train]'" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "program",
    [
        "from robovlms_jax.load import load_policy",
        "import sys; sys.argv[1:] = ['completion', 'bash']; from robovlms_jax import commands; commands.main()",
        "import sys; sys.argv[1:] = ['train']; from robovlms_jax import commands; commands.main()",
    ],
)
def test_without_jax_every_way_in_names_the_extra_in_its_last_line(program):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install -e '.[train]'" in result.stderr.splitlines()[-1]


def test_away_from_the_repository_an_extra_is_installed_by_the_packages_name(tmp_path, monkeypatch):
    assert extras.install("gpu") == "pip install -e '.[gpu]'"
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "robovlms_jax" / "extras.py"))
    assert extras.install("gpu") == 'pip install "robovlms_jax[gpu]"'


def test_messages_leave_the_command_that_installs_an_extra_to_one_place():
    written = [
        f"{path.relative_to(ROOT)}: {node.value}"
        for folder in ("robovlms_jax", "experiments")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr)
        for node in node.values
        if isinstance(node, ast.Constant) and re.search(r"pip install (-e \.|['\"]?robovlms)", str(node.value))
    ]
    assert [x for x in written if "extras.py" not in x] == []


def test_the_tested_versions_cover_every_requirement_and_meet_its_bound():
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text()))
    declared = environments.read()
    for requirement in (*declared[""], *declared["test"]):
        assert requirement.name in pins, f"requirements.txt lacks {requirement.name}"
        assert Version(pins[requirement.name]) >= Version(requirement.lowest), requirement.name
    names = {requirement.name for group in declared.values() for requirement in group}
    assert pins.keys() <= names | {"jaxlib"}, "requirements.txt pins what setup.cfg does not ask for"


def test_a_package_has_one_lower_bound_wherever_it_is_named():
    bounds: dict[str, set[str]] = {}
    for requirement in (r for group in environments.read().values() for r in group):
        bounds.setdefault(requirement.name, set()).add(requirement.lowest)
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_oldest_takes_the_bounds_and_newest_drops_them():
    oldest, newest = environments.requirements("oldest"), environments.requirements("newest")
    assert len(oldest) == len(newest) == len({*newest})
    assert [line.partition("==")[0] for line in oldest] == newest
    assert all(re.fullmatch(r"[\w.\[\]-]+==[\d.]+", line) for line in oldest)
    assert not [line for line in newest if line.startswith(("torch", "peft"))]


def test_every_file_that_the_makefile_names_exists():
    text = re.sub(r"(?m)^#.*|\$\(BIN\)/|\.venv[\w$*-]*/", "", (ROOT / "Makefile").read_text())
    words = re.findall(r"(?:tests|experiments|benchmarks|docs)/[\w./-]+|[\w-]+\.(?:py|cfg|txt|toml)\b", text)
    assert {"tests/data", "setup.cfg"} <= set(words)
    modules = [name.replace(".", "/") + ".py" for name in re.findall(r"python -m (experiments\.\w+)", text)]
    missing = [name for name in (*words, *modules) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("line", ["jax", "jax<1", "jax>=0.7,<1", "jax==0.7"])
def test_a_requirement_without_a_plain_lower_bound_is_refused(line):
    with pytest.raises(ValueError, match="not of the form name>=version"):
        environments.parse(line)
