"""What looks after the repository itself: make's targets, hooks before a commit, types, templates of issues."""

from __future__ import annotations

import configparser
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.test_imports import ROOT


def test_make_help_lists_every_target_with_a_line_about_it():
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = dict(re.fullmatch(r"make (\S+) +(\S.*)", line).groups() for line in shown.splitlines())
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(listed) == set(phony.split()) - {"always"}


def test_hooks_use_the_versions_that_the_project_is_tested_with():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = set((ROOT / "requirements.txt").read_text().split())
    assert {pin for hook in hooks for pin in hook["additional_dependencies"]} <= pins
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "typos", "nbstripout", "shellcheck", "hadolint"}


def test_make_lint_checks_what_the_hooks_check_of_every_file():
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert all(f"$(BIN)/{command}" in recipe for command in ("ruff check", "ruff format --check", "typos"))


def test_the_documentation_is_made_with_its_own_extra_alone():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^docs: \.venv/docs ", makefile, flags=re.MULTILINE)
    (recipe,) = re.findall(r"^\.venv/docs:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    assert "-e .[docs]" in recipe


def test_an_installation_that_follows_the_repository_adds_its_folder_to_the_path():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options"]["package_dir"].split() == ["=", "."]


@pytest.mark.slow
def test_programs_in_the_folder_above_the_clone_find_the_library(tmp_path):
    clone, environment = tmp_path / "robovlms_jax", tmp_path / "environment"
    shutil.copytree(ROOT / "robovlms_jax", clone / "robovlms_jax", ignore=shutil.ignore_patterns("twin", "__pycache__"))
    shutil.copytree(ROOT / "experiments", clone / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (tmp_path / "x.py").write_text("import robovlms_jax.programs\nprint(robovlms_jax.__file__)\n")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    # Without network: what this environment has of setuptools builds the other one's package.
    with_setuptools = dict(
        os.environ, PYTHONPATH=str(pathlib.Path(importlib.util.find_spec("setuptools").origin).parents[1])
    )
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."]
    subprocess.run(install, cwd=clone, check=True, env=with_setuptools)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "x.py"], cwd=tmp_path, capture_output=True, text=True, env=alone)
    assert done.stdout.strip() == str(clone / "robovlms_jax" / "__init__.py"), done.stderr


def test_forms_for_issues_can_be_read_and_ask_for_what_is_needed():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    bug = yaml.safe_load((folder / "bug.yml").read_text())
    needed = {part["id"] for part in bug["body"] if part.get("validations", {}).get("required")}
    assert needed == {"what", "command", "versions"}
    assert yaml.safe_load((folder / "feature.yml").read_text())["body"]
    assert "emergency stop" in (ROOT / "SECURITY.md").read_text()


def test_the_version_is_the_same_wherever_it_stands():
    (version,) = re.findall(r"^version = (\S+)$", (ROOT / "setup.cfg").read_text(), flags=re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert (version, str(citation["date-released"])) == newest.groups()
    assert citation["version"] == version and citation["cff-version"] == "1.2.0"


@pytest.mark.slow
def test_a_wheel_is_built_and_runs_in_empty_environments(tmp_path):
    done = subprocess.run([sys.executable, "tests/wheel.py", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="pip install -e '.[dev]'")
def test_what_users_import_has_types_that_fit():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
