"""The one set-up of logs that all programs share."""

from __future__ import annotations

import logging

from robovlms_jax.runs import logs


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
