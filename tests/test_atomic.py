"""Files are complete or not there, whatever ends the process that writes them."""

from __future__ import annotations

import ast
import contextlib
import pathlib
import sys

import numpy as np
import pytest

from experiments import bundle
from robovlms_jax import atomic
from robovlms_jax.evaluation.report import tables
from robovlms_jax.search import queue
from robovlms_jax.strategies import support
from robovlms_jax.training import consolidation, metrics, provenance
from tests.labeling import made_up
from tests.processes import limit_files
from tests.test_imports import library_files


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_json(path, ["old"])
    with contextlib.suppress(RuntimeError), atomic.replacing(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert [x.name for x in tmp_path.iterdir()] == ["a.json"] and "old" in path.read_text()
    with atomic.replacing(path, durable=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    with contextlib.suppress(RuntimeError), atomic.becoming(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise RuntimeError
    assert [x.name for x in tmp_path.iterdir()] == ["a.json"] and path.read_bytes() == b"new"


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with contextlib.suppress(RuntimeError), atomic.becoming_folder(tmp_path / "new") as folder:
        (folder / "half").write_text("of it")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic.becoming_folder(tmp_path / "in" / "new") as folder:
        (folder / "all").write_text("of it")
    assert (tmp_path / "in" / "new" / "all").is_file() and len(list((tmp_path / "in").iterdir())) == 1
    with pytest.raises(FileExistsError, match="not an empty folder"), atomic.becoming_folder(tmp_path / "in" / "new"):
        pass


def test_on_a_full_disk_a_bundle_is_not_there_and_the_program_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    def half(run, params, serving):
        (run / "checkpoints").mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(bundle.checkpoints, "locate", lambda path, **_: tmp_path)
    monkeypatch.setattr(bundle.items, "read_serving", lambda path: {})
    monkeypatch.setattr(bundle, "open_model", lambda path, **_: (None, {"a": np.zeros(3)}, None))
    monkeypatch.setattr(bundle.checkpoints, "write_policy", half)
    monkeypatch.setattr(sys, "argv", ["bundle", "--checkpoint", "x", "--out", str(tmp_path / "small")])
    with pytest.raises(SystemExit, match="error: No space left on device"):
        bundle.main()
    assert list(tmp_path.iterdir()) == []


WRITERS = {
    "results": (lambda path, n: tables.write_json(path / "a.json", [n] * 100), "a.json"),
    "rollouts": (lambda path, n: made_up.rollouts((n,), ("open_drawer",)).save(path / "rollouts.npz"), "rollouts.npz"),
    "fisher": (lambda path, n: consolidation.write(path, {"a": np.full(99, n)}), consolidation.FILE),
    "support": (lambda path, n: support.write(path / "few.json", {"a": [(n, n)] * 50}), "few.json"),
    "trial": (lambda path, n: queue.agree(path, f"{n}.json", {"a": [n] * 100}), "5.json"),
    "record": (lambda path, n: provenance.write_record(path, "sample", {"a": [n] * 100}), "config.json"),
    "metrics": (lambda path, n: metrics.JsonLines(path / "metrics.jsonl", n), "metrics.jsonl"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_what_was_there_stays_as_it_was(name, tmp_path):
    write, file = WRITERS[name]
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0.123456}}\n' for step in range(12)))
    write(tmp_path, 5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert tmp_path / file in before
    limit_files(60)
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, 4)
    finally:
        limit_files(-1)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


BY_HAND = {
    "deploy/latch.py": "the robot's computer: imports control/ alone, renames by itself",
    "search/queue.py": "a claim, which only one process can create",
    "search/workers.py": "a search's mark, linked when it is whole by whoever comes first",
    "inputs/tokenizers.py": "folders made for a moment, or for an export that is made anew",
    "data/rlds_writer.py": "shards are renamed when all are there, since names hold their number",
    "data/lerobot/writing.py": "a film counts once the table of episodes has it",
    "data/lerobot/synthetic.py": "a made-up dataset in a folder for a moment",
    "envs/calvin/task_chains.py": "writes the list that is kept in this repository",
    "playtable/splits.py": "a frame counts once the journal has it",
    "playtable/questions.py": "a picture counts once the list of questions is there",
}
"""Library files that write without `atomic`, and why a killed process does no harm there."""


def writes_by_hand(source: str) -> bool:
    if not any(word in source for word in ("write_text", "write_bytes", "open(", "np.save")):  # parsing takes seconds
        return False
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        of = node.func.value if isinstance(node.func, ast.Attribute) else None
        whom = of.id if isinstance(of, ast.Name) else ""
        modes = [x.value for x in [*node.args, *(k.value for k in node.keywords)] if isinstance(x, ast.Constant)]
        if called in ("write_text", "write_bytes") and whom != "atomic":
            return True
        if called in ("open", "fdopen") and any(mode in ("w", "wb", "x", "xb") for mode in modes):
            return True
        if whom == "np" and called.startswith("save") and ast.unparse(node.args[0]) != "file":
            return True
    return False


def test_the_library_writes_files_whole_but_for_those_that_say_why_not():
    package = pathlib.Path(atomic.__file__).parent
    files = [path for module, path in library_files().items() if module != "atomic"]
    found = {path.relative_to(package).as_posix() for path in files if writes_by_hand(path.read_text())}
    assert found == set(BY_HAND)
