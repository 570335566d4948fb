"""The one set-up of logs that all programs share."""

from __future__ import annotations

import logging
import pathlib

from robovlms_jax.runs import logs

ROOT = pathlib.Path(__file__).parents[2]


def test_a_program_says_its_own_progress_and_of_libraries_only_warnings_without_tracebacks(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])  # a library was there first
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    for name in logs.LIBRARIES:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    logs.to_stderr()
    logs.to_stderr(absl=logging.WARNING)
    assert len(logging.getLogger("absl").filters) == 1
    logging.getLogger("robovlms_jax").info("ours")
    for name in logs.LIBRARIES:
        logging.getLogger(name).info("progress of %s", name)
    logging.getLogger("absl").warning("a warning")
    logging.getLogger("absl").error("raised, too", exc_info=ValueError("x"))
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in said] == ["ours", "a warning"]
    logs.to_stderr(level=logging.WARNING)
    logging.getLogger("robovlms_jax").info("not worth a line")
    logging.getLogger("robovlms_jax").warning("a warning of ours")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in said] == ["a warning of ours"]


def test_no_program_sets_up_a_log_of_its_own():
    files = [file for room in ("robovlms_jax", "experiments", "benchmarks") for file in (ROOT / room).rglob("*.py")]
    setting_up = [str(file.relative_to(ROOT)) for file in files if "logging.basicConfig(" in file.read_text()]
    assert setting_up == ["robovlms_jax/runs/logs.py"]
