"""Which checkpoint a run directory stands for, and which one a run goes on from."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.training import checkpoints, seals
from robovlms_jax.training import state as states
from tests.processes import run_python


def at_step(state, step):
    return state.replace(step=jnp.int32(step), trainable={"head/kernel": jnp.full((2, 3), float(step))})


def small_state():
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    params = {"head": {"kernel": jax.device_put(np.zeros((2, 3), np.float32), meshes.replicated(mesh))}}
    return states.create(params, (".*",), optax.adam(0.1), 0, mesh)


def test_best_outlives_newer_and_is_what_the_run_stands_for(tmp_path):
    # Fails if the best is deleted with the old ones, a worse one replaces it, or `locate` prefers the newest.
    state = small_state()
    saver = checkpoints.Checkpointer(tmp_path, keep=1, serving={"config": {}})
    kept = [saver.offer_best(at_step(state, step), {}, score) for step, score in ((1, 0.2), (2, 0.5), (3, 0.4))]
    assert kept == [True, True, False]
    saver.save(at_step(state, 4), {})
    saver.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["4"]
    assert checkpoints.locate(tmp_path) == tmp_path / "best" / "2"
    assert checkpoints.locate(tmp_path / "checkpoints").name == "4"
    np.testing.assert_array_equal(saver.restore_best(state).trainable["head/kernel"], 2.0)
    assert saver.offer_best(at_step(state, 5), {}, 0.5)  # of equals the later
    saver.close()
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["5", "score.json"]
    assert checkpoints.locate(tmp_path).name == "5"


def test_the_last_checkpoints_of_stages_stay_beside_the_newest(tmp_path):
    state = small_state()
    saver = checkpoints.Checkpointer(tmp_path, keep=2, serving={"config": {}}, always=[2, 6])
    for step in range(1, 7):
        saver.save(at_step(state, step), {})
    saver.wait()
    saver.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "5", "6"]


def write_steps(run: pathlib.Path, *steps: int) -> None:
    state = small_state()
    saver = checkpoints.Checkpointer(run, keep=9, serving={"config": {}})
    for step in steps:
        saver.save(at_step(state, step), {"next_step": step})
    saver.wait()
    saver.close()


def restore(run: pathlib.Path) -> tuple[int, float]:
    saver = checkpoints.Checkpointer(run, keep=9, serving={})
    try:
        state, data = saver.restore(small_state())
        assert int(state.step) == data["next_step"]
        return int(state.step), float(state.trainable["head/kernel"][0, 0])
    finally:
        saver.close()


def files_of(directory: pathlib.Path) -> list[str]:
    return [seals.SEAL, *json.loads((directory / seals.SEAL).read_text())]


def test_any_file_cut_short_or_gone_is_noticed(tmp_path):
    # Orbax alone reads some damaged steps and fails on others (docs/log.md, 2026-11-21).
    write_steps(tmp_path, 1)
    step = tmp_path / "checkpoints" / "1"
    assert seals.damage(step) is None
    names = files_of(step)
    assert {name.split("/")[0] for name in names} == {seals.SEAL, "params", "train", "data", "serving"}
    for name in names:
        path, whole = step / name, (step / name).read_bytes()
        path.write_bytes(whole[:-1])
        assert "bytes of" in seals.damage(step) or name == seals.SEAL, name
        path.write_bytes(whole)
        if name != seals.SEAL:
            path.unlink()
            assert "is missing" in seals.damage(step)
            path.write_bytes(whole)
    (step / seals.SEAL).unlink()  # written by an earlier version
    assert seals.damage(step) is None


def test_a_run_goes_on_from_the_newest_complete_checkpoint(tmp_path, caplog):
    # The two newest are cut: the third is taken, the damaged ones stand in nobody's way when their steps come again.
    write_steps(tmp_path, 1, 2, 3)
    for step in (2, 3):
        directory = tmp_path / "checkpoints" / str(step)
        os.truncate(directory / files_of(directory)[1], 1)
    assert checkpoints.locate(tmp_path).name == "1"
    # An older policy than asked for: that is said.
    assert re.search(r"checkpoint .*3 is passed over: .*has 1 bytes of .*; .*checkpoints/1 is taken, an", caplog.text)
    assert restore(tmp_path) == (1, 1.0)
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["2", "3"]
    write_steps(tmp_path, 2)
    assert restore(tmp_path) == (2, 2.0)


def test_no_complete_checkpoint_is_said(tmp_path):
    write_steps(tmp_path, 1)
    seal = tmp_path / "checkpoints" / "1" / seals.SEAL
    seal.write_text(seal.read_text()[:10])
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .*seal.json is cut off"):
        restore(tmp_path)
    for path in (tmp_path, seal.parents[1], seal.parent):  # however it is named to those who only read
        with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .*seal.json is cut off.*Name another"):
            checkpoints.locate(path)
    assert seal.exists(), "the only one there is must stay where it is"


@pytest.mark.parametrize("path", ["", " ", None, 3])
def test_what_names_no_path_is_refused_and_not_looked_for_in_the_working_directory(path, tmp_path, monkeypatch):
    write_steps(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint={path!r} names no path; pass a run directory"):
        checkpoints.locate(path)
    assert checkpoints.locate(".").name == "1"


KILLED = """
import os, pathlib, sys
from robovlms_jax.training import checkpoints
from tests.training import test_checkpoints as tests
run = pathlib.Path(sys.argv[1])
tests.write_steps(run, 1)
checkpoints._seal_new = lambda folder: os.kill(os.getpid(), 9)  # all is written, nothing has its name yet
tests.write_steps(run, 2)
"""


def test_killed_while_saving(tmp_path):
    # What was being written is no checkpoint, and is gone when the run goes on.
    run_python("-c", KILLED, tmp_path, status=-9)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name.split(".")[0] for path in folder.iterdir()) == ["1", "2"]
    assert restore(tmp_path) == (1, 1.0)
    until = time.monotonic() + 10  # Orbax may delete in a thread of its own
    while [path.name for path in folder.iterdir()] != ["1"]:
        assert time.monotonic() < until, list(folder.iterdir())
        time.sleep(0.05)


FULL = """
import json, pathlib, sys, time
from robovlms_jax.training import checkpoints
from tests.processes import limit_files
from tests.training import test_checkpoints as tests

def fill(run, way):
    saver = checkpoints.Checkpointer(run, keep=1, serving={"config": {}})
    saver.save(tests.at_step(tests.small_state(), 1), {"next_step": 1})
    saver.wait()
    limit_files(100)
    saver.save(tests.at_step(tests.small_state(), 2), {"next_step": 2})
    try:
        if way == "look":
            for _ in range(300):  # as the loop does at every log
                saver.check()
                time.sleep(0.1)
        elif way == "save":
            saver.save(tests.at_step(tests.small_state(), 3), {"next_step": 3})
        else:
            saver.wait()
        return "went on as if nothing had happened"
    except checkpoints.UnwrittenError as error:
        return str(error)
    finally:
        saver.close()
        limit_files(-1)

root = pathlib.Path(sys.argv[1])
print(json.dumps({way: fill(root / way, way) for way in sys.argv[2:]}))
"""
WAYS = ("look", "save", "wait")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder of runs whose disk was full at their second checkpoint, and what was said, by when it was noticed."""
    root = tmp_path_factory.mktemp("full")
    return root, json.loads(run_python("-c", FULL, root, *WAYS).splitlines()[-1])


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_is_full_is_named_and_costs_no_older_checkpoint(full, way):
    # keep=1: the old one must not go before the new one is complete.
    run, said = full[0] / way, full[1][way]
    assert "the checkpoint of step 2 could not be written to" in said and "File too large" in said
    assert "That of step 1 is complete: go on from there with --resume" in said
    assert restore(run) == (1, 1.0)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]  # what was begun is cleared away
    write_steps(run, 2)
    assert restore(run) == (2, 2.0)


UNREADABLE = """
import os, pathlib, sys, tempfile
from robovlms_jax.training import checkpoints
there = pathlib.Path(tempfile.mkdtemp())
for name in ("sealed", "seen"):
    (there / name / "checkpoints").mkdir(parents=True)
there.chmod(0o755)
(there / "sealed").chmod(0)
if os.getuid() == 0:  # who may read everything
    os.setuid(65534)
try:
    checkpoints.locate(there / "mine")
except FileNotFoundError as error:
    print(error)
"""


def test_folders_that_may_not_be_read_are_passed_over_where_a_checkpoint_is_looked_for():
    # As below / for somebody who is not root. Fails if "Permission denied" is said of a folder that nobody named.
    said = run_python("-c", UNREADABLE)
    found = re.search(r"mine is not a directory \(nothing is there\).* Runs in (\S+): seen\.", said)
    assert found, said
    shutil.rmtree(found[1])
