"""The documentation site builds from the repository alone, and its notebook runs."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

from tests.web import browser

ROOT = pathlib.Path(__file__).resolve().parents[1]


def notebook_cells() -> list[str]:
    """The notebook's programs; the first goes to the repository."""
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_in(folder: pathlib.Path, program: str, **environment: str) -> subprocess.CompletedProcess:
    """A program as Jupyter would run it: the folder of the notebook is where imports look first."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ROBOVLMS_REPOSITORY")}
    command = [sys.executable, "-c", program]
    env = kept | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
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


@pytest.mark.skipif(browser.find() is None, reason="no Chromium here")
def test_pages_opened_from_disk_can_be_searched(site, tmp_path):
    with browser.browser(tmp_path) as page:
        page.size(1200, 900)
        page.open((site / "how_to" / "calvin.html").as_uri())
        page.ask("document.querySelector('.md-search__input').focus()")
        page.type("safety layer")
        first = page.wait("document.querySelector('.md-search-result__link')?.href")
        assert first.startswith(site.as_uri()) and page.complaints == []


def test_a_programs_examples_are_code_and_its_sentences_are_none(site):
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"<code>.*?</code>", text, flags=re.DOTALL))
    assert "python -m experiments.push --checkpoint" in code and "python -m experiments.plan --backbone" in code
    assert "Log in once" in text and "Log in once" not in code
    assert "robovlms train bridge" in code


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


@pytest.mark.parametrize("folder", [ROOT, ROOT / "docs"], ids=["root", "docs"])
def test_the_notebooks_first_cell_finds_the_repository_from_where_jupyter_opens_it(folder):
    program = notebook_cells()[0] + "\nimport robovlms_jax\nprint(os.getcwd(), robovlms_jax.__file__)"
    done = run_in(folder, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT), str(ROOT / "robovlms_jax" / "__init__.py")]


def test_the_notebooks_first_cell_away_from_the_repository_asks_for_its_address_or_fetches_it(tmp_path):
    done = run_in(tmp_path, notebook_cells()[0])
    assert "write its address" in done.stderr.splitlines()[-1]
    done = run_in(tmp_path, notebook_cells()[0], ROBOVLMS_REPOSITORY=str(tmp_path / "nothing.git"))
    assert f"'{tmp_path / 'nothing.git'}'" in done.stderr.splitlines()[-1] and "clone" in done.stderr


def test_the_notebooks_first_cell_fetches_once_installs_once_and_asks_for_a_restart(tmp_path, monkeypatch):
    ran = []

    def run(command, cwd=None, check=False):
        ran.append((command[0] if command[0] == "git" else "pip", command[-1], cwd))
        if command[0] == "git":
            (command[-1] / ".git").mkdir(parents=True)
            (command[-1] / "robovlms_jax").mkdir()
            (command[-1] / "robovlms_jax" / "commands.py").touch()
        elif len(ran) == 2:
            raise subprocess.CalledProcessError(1, command)  # the line went dead

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("ROBOVLMS_REPOSITORY", "https://somewhere.example/robovlms_jax")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    fetched, cell = tmp_path / "robovlms_jax", compile(notebook_cells()[0], "first cell", "exec")
    with pytest.raises(subprocess.CalledProcessError):
        exec(cell, {})
    with pytest.raises(RuntimeError, match="Restart session"):  # numpy is loaded here, as it is on Colab
        exec(cell, {})
    install = ("pip", ".[train]", fetched)
    assert ran == [("git", fetched, None), install, install]
    exec(cell, {})  # after the restart
    assert len(ran) == 3 and pathlib.Path.cwd() == fetched and sys.path[0] == str(fetched)


def test_links_whose_text_is_code_are_links_and_code_is_none():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import site_hooks
    finally:
        sys.path.remove(str(ROOT / "docs"))
    text = "[`table.py`](../robovlms_jax/table.py) [a](https://a.b) `x[0](1)`\n```\n[a](b.py)\n```\n"
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="guide.md"))
    files = types.SimpleNamespace(get_file_from_path=lambda name: None)
    assert site_hooks.on_page_markdown(text, page, None, files) == text.replace(
        "[`table.py`](../robovlms_jax/table.py)", "`table.py`"
    )


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    program = "\n".join(notebook_cells()).replace("runs/notebook", str(tmp_path / "run"))
    done = run_in(ROOT / "docs", program)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(10, 7)" in done.stdout
