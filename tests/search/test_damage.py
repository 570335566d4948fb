"""Folders of searches in which something is damaged, or not a trial."""

from __future__ import annotations

import json
import re

import pytest

from robovlms_jax.search import queue, report, workers
from robovlms_jax.search.config import SearchConfig


def settings(tmp_path):
    return SearchConfig(out=str(tmp_path / "s"), space=("rate=0.1",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "finished"}, "status 'finished'"),
        ({"value": None}, "done with value None"),
        ({"value": "0.5"}, "done with value '0.5'"),
        ({"steps": 3}, "unexpected keyword argument 'steps'"),
        (None, "not JSON"),
    ],
)
def test_a_damaged_trial_is_named_with_what_to_do_about_it(tmp_path, changes, message):
    config = settings(tmp_path)
    path = queue.folder(tmp_path / "s", 0) / "trial.json"
    queue.write(tmp_path / "s", queue.Trial(0, {"rate": "0.1"}, 0, "done", 0.5))
    whole = path.read_text()
    path.write_text(whole[:30] if changes is None else json.dumps(json.loads(whole) | changes))
    for use in (workers.work, report.write):
        with pytest.raises(ValueError, match=rf"trial\.json .*{message}.*delete its directory to run it again"):
            use(config)


def test_folders_of_other_names_and_lines_that_say_nothing_do_not_stop_a_search(tmp_path):
    config = settings(tmp_path)
    (tmp_path / "s/trials/notes").mkdir(parents=True)
    (tmp_path / "s/trials/notes/trial.json").write_text("{}")
    run = queue.folder(tmp_path / "s", 0) / "run"
    run.mkdir(parents=True)
    lines = [b'{"step": 1, "validation/loss": 3}', b'{"step": null, "validation/loss": 2}', b"[1]", b'{"step": \xff']
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (run / "report.md").write_text("done")
    workers.work(config)
    assert [(x.status, x.value) for x in queue.read(tmp_path / "s")] == [("done", 3.0)]


@pytest.mark.parametrize("storage", ["foo", "sqlite:////nowhere/study.db", "sqlite:///{here}/text.db", "nosuch://a"])
def test_a_storage_that_does_not_work_is_named_with_what_to_do_about_it(tmp_path, storage):
    pytest.importorskip("optuna")
    (tmp_path / "text.db").write_text("no database")
    storage = storage.format(here=tmp_path)
    asked = SearchConfig(out=str(tmp_path / "s"), space=("rate=0.1,0.2",), sampler="random", trials=1, storage=storage)
    with pytest.raises(ValueError, match=f"^Optuna's storage {re.escape(storage)} does not work: .*mend the storage"):
        workers.work(asked)


def test_a_journal_that_was_cut_off_is_named(tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "optuna.log").write_text("no line of a journal\n{}\n")
    asked = SearchConfig(out=str(tmp_path), space=("rate=0.1,0.2",), sampler="random", trials=1)
    with pytest.raises(ValueError, match=r"^Optuna's storage .*optuna\.log does not work"):
        workers.work(asked)


def test_a_storage_that_fails_in_the_middle_is_named(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")

    def locked(*_):
        raise optuna.exceptions.StorageInternalError("database is locked")

    asked = SearchConfig(out=str(tmp_path / "s"), space=("rate=0.1,0.2",), sampler="random", trials=1)
    monkeypatch.setattr(workers, "_take", locked)
    with pytest.raises(ValueError, match=r"optuna\.log does not work: database is locked"):
        workers.work(asked)
