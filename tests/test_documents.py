"""Programs and files that stand in documents: they parse, name what exists, and run."""

from __future__ import annotations

import ast
import codeop
import importlib
import json
import pathlib
import re

import pytest

from experiments import calvin_abcd
from robovlms_jax.envs import gym
from tests.processes import run_python

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "data/README.md"]
POLICY = ROOT / "tests" / "compatibility" / "release_0_1" / "interleaved_discrete"


def blocks(language: str) -> dict[str, str]:
    """page:line -> a block of this language, without the indentation that it has in a list."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^( *)```{language}\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL):
            indent, body = match.groups()
            where = f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 2}"
            found[where] = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
    return found


def test_python_in_documents_parses_and_imports_what_exists():
    seen = 0
    for where, program in blocks("python").items():
        for node in ast.walk(ast.parse(program, where)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("robovlms_jax", "experiments"):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    seen += 1
                    if not hasattr(module, name):
                        importlib.import_module(f"{node.module}.{name}")
    assert seen > 30


def test_python_in_documents_can_be_pasted_into_a_prompt():
    """Python's prompt ends a loop or a `with` at an empty line, and takes none for the end of the text before it."""
    pasted = 0
    for where, program in blocks("python").items():
        if re.search(r"^ *(def|class|@)", program, flags=re.MULTILINE):
            continue  # a part of a file
        waiting: list[str] = []
        for line in [*program.splitlines(), ""]:
            waiting.append(line)
            try:
                whole = codeop.compile_command("\n".join(waiting))
            except SyntaxError as error:
                raise AssertionError(f"{where}: put an empty line before {line!r}") from error
            if whole is not None:
                waiting, pasted = [], pasted + 1
        assert not any(waiting), where
    assert pasted > 60


def test_the_guide_has_every_preset_of_the_main_job():
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    assert [name for name in calvin_abcd.PRESETS if f"`{name}`" not in guide] == []


def test_every_how_to_page_is_named_where_a_reader_begins():
    names = ("README.md", "docs/index.md", "docs/guide.md")
    begin = "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    assert [page.name for page in (ROOT / "docs/how_to").glob("*.md") if f"how_to/{page.name})" not in begin] == []


def test_the_layout_of_an_environment_of_ones_own_is_one():
    (text,) = (text for where, text in blocks("json").items() if where.startswith("docs/how_to/gymnasium.md"))
    layout = gym.Layout.from_json(json.loads(text))
    assert layout.id == "FetchPush-v4" and layout.cameras == {"front": "render:external_camera_0"}


def program(page: str, beginning: str) -> str:
    (found,) = (text for where, text in blocks("python").items() if where.startswith(f"{page}:") and beginning in text)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "beginning", "end"),
    [
        ("docs/guide.md", 'load_policy("runs/sample")', "assert chunk.actions.shape[1:] == (7,)"),
        ("docs/tutorial.md", 'load_policy("runs/sample")', "assert chunk.actions.shape[1:] == (7,)"),
        ("docs/guide.md", 'load_policy("policies/', "assert action.shape == (7,)"),
        ("docs/how_to/share.md", 'load_policy("hf:', "policy.reset('open the drawer')"),
        ("docs/playtable.md", "PlayTable(", "assert table.observe().images['wrist'].shape == (84, 84, 3)"),
    ],
)
def test_programs_in_documents_run_with_a_small_policy_in_place_of_theirs(page, beginning, end):
    text = re.sub(r'load_policy\("[^"]*"\)', f"load_policy({str(POLICY)!r})", program(page, beginning))
    pictures = "static_rgb, wrist_rgb = np.zeros((200, 200, 3), np.uint8), np.zeros((84, 84, 3), np.uint8)"
    run_python("-c", f"import numpy as np\n{pictures}\n{text}\n{end}")
