"""The documentation site builds from the repository alone, and its notebook runs."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def notebook_cells() -> list[str]:
    """The notebook's programs, without the cell that fetches and installs."""
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    programs = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "!pip install" in programs[0]
    return programs[1:]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    # Strict: a link or an anchor that leads nowhere, or a page outside of the table of contents, is an error.
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_there_and_asks_nothing_of_the_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']?(?:https?:)?//[^\"' >]+", text)
        fetched += re.findall(r"<link[^>]+rel=[\"']?stylesheet[^>]+href=[\"']?(?:https?:)?//[^\"' >]+", text)
        assert not fetched, page


def test_the_reference_has_every_setting_and_what_a_program_calls(site):
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for name in ("batch_size", "windows_per_segment", "learning_rate", "num_steps", "num_points"):
        assert name in settings, name
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert "robovlms_jax.load.load_policy" in python
    assert "robovlms_jax.deploy.client.Client" in python


def test_the_notebook_has_no_results_stored_and_its_programs_compile():
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    for number, program in enumerate(notebook_cells()):
        compile(program, f"cell {number}", "exec")


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    program = "\n".join(notebook_cells()).replace("runs/notebook", str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(10, 7)" in done.stdout
