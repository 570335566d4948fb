"""Environments in processes: parallel, and mortal."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from robovlms_jax import cores
from robovlms_jax.actions import rotations
from robovlms_jax.envs import process
from robovlms_jax.envs.process import ProcessEnv
from robovlms_jax.envs.vector import EnvError, EnvPool
from tests.envs.toy_env import Toy

TOY = "toy_env:Toy"


@pytest.fixture
def here(monkeypatch):
    """Children must be able to import toy_env."""
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))


def action(*values: float) -> np.ndarray:
    return np.array([*values, *[0.0] * (7 - len(values))])


def test_a_process_behaves_like_the_environment_it_runs(here):
    env = ProcessEnv(TOY, {"start": 5})
    assert env.name == "Toy"
    env.reset(count=8)
    env.step(action())
    assert env.info["count"] == 9
    assert env.info["pid"] != os.getpid()
    assert env.observe().images["static"].tolist() == np.full((2, 2, 3), 9).tolist()
    env.reset()
    assert env.info["count"] == 5
    env.close()


def test_a_fresh_process_serves_every_reset_and_results_say_so(here):
    env = ProcessEnv(TOY, {"start": 5}, fresh_process=True)
    assert env.about == {"version": 3, "fresh_process": True}
    pool = EnvPool([env])
    (first,) = pool.reset([0], [{"count": 8}])
    pool.step([0], action()[None])
    (second,) = pool.reset([0], [{"count": 6}])
    env.reset()
    assert len({first["pid"], second["pid"], env.info["pid"]}) == 3
    assert (first["count"], second["count"], env.info["count"]) == (8, 6, 5)
    env.close()
    kept = ProcessEnv(TOY)
    kept.reset()
    pid = kept.info["pid"]
    kept.reset()
    assert kept.info["pid"] == pid
    assert kept.about == {"version": 3}
    kept.close()


def test_a_pool_of_two_versions_is_refused():
    old, new = Toy(), Toy()
    assert EnvPool([old, new]).about == {"version": 3}
    old.about = {"version": 2}
    with pytest.raises(ValueError, match=r"one simulator, but Toy is \{'version': 2\} and \{'version': 3\}"):
        EnvPool([old, new])


def test_wrong_input_is_the_callers_error_and_the_process_lives_on(here):
    env = ProcessEnv(TOY)
    with pytest.raises(ValueError, match="bad action"):
        env.step(action(6))
    env.step(action())
    assert env.info["count"] == 1
    env.close()
    with pytest.raises(ValueError, match="start=-1"):
        ProcessEnv(TOY, {"start": -1})
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        ProcessEnv("no_such_module:Env")


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (3, r"the process died during step \(exit code 7\).*\n.*toy simulator starting\nlast words"),
        (4, r"step took longer than 0.5 s \(still running, ended now\)"),
        (5, r"(?s)KeyError: 'toy bug'.*Traceback"),
    ],
)
def test_a_process_that_dies_hangs_or_raises_says_so_and_can_be_restarted(here, move, message):
    env = ProcessEnv(TOY, timeout_s=0.5)
    with pytest.raises(EnvError, match=message):
        env.step(action(move))
    if move != 5:
        with pytest.raises(EnvError, match="no running process"):
            env.reset()
    env.restart()
    env.reset()
    assert env.info["count"] == 0
    env.close()


def test_what_a_process_waits_for_a_core_does_not_count_as_hanging(here, monkeypatch):
    # Fails if the clock on the wall decides: on a machine with more work than cores, simulators that work are ended.
    env = ProcessEnv(TOY, timeout_s=0.2)
    starved = iter([10.0, 10.2, 10.4, 10.6])  # in each 0.2 s of the first 0.6 it had no core
    monkeypatch.setattr(process, "starved_s", lambda pid: next(starved, 10.6))
    env.step(action(0, 0.5))
    with pytest.raises(EnvError, match=r"step took longer than 0\.2 s"):
        env.step(action(0, 5.0))


@pytest.mark.skipif(not pathlib.Path("/proc/self/schedstat").exists(), reason="the system does not tell")
def test_how_long_a_process_waited_for_a_core_is_what_the_system_says():
    before = process.starved_s(os.getpid())
    crowd = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cores.usable())]
    try:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
    finally:
        for one in crowd:
            one.kill()
    assert process.starved_s(os.getpid()) > before
    assert process.starved_s(2**30) == 0.0


def test_a_hung_process_is_really_gone(here):
    env = ProcessEnv(TOY, timeout_s=0.3)
    pid = env.info["pid"]
    with pytest.raises(EnvError):
        env.step(action(4))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_pool_steps_its_processes_at_the_same_time_and_survives_a_death(here):
    pool = EnvPool([ProcessEnv(TOY, timeout_s=5) for _ in range(3)])
    pool.reset([0, 1, 2], [{}, {"count": 4}, {}])
    begin = time.perf_counter()
    infos = pool.step([0, 1, 2], np.stack([action(0, 0.4)] * 3))
    assert time.perf_counter() - begin < 0.9  # one after the other would take 1.2 s
    assert [info["count"] for info in infos] == [1, 5, 1]
    first, second, third = pool.step([0, 1, 2], np.stack([action(), action(3), action()]))
    assert isinstance(second, EnvError)
    assert (first["count"], third["count"]) == (2, 2)
    assert isinstance(pool.reset([1], [{}])[0], EnvError)
    pool.restart(1)
    assert pool.reset([1], [{}])[0]["count"] == 0
    assert [look.images["static"][0, 0, 0] for look in pool.observe([0, 1])] == [2, 0]
    pool.close()


def test_a_pool_of_environments_without_processes(here):
    pool = EnvPool([Toy(), Toy(start=2)])
    assert [info["count"] for info in pool.reset([0, 1], [{}, {}])] == [0, 2]
    broken, fine = pool.step([0, 1], np.stack([action(5), action()]))
    assert isinstance(broken, EnvError)
    assert "toy bug" in str(broken)
    assert fine["count"] == 3
    with pytest.raises(ValueError, match="bad action"):
        pool.step([0], action(6)[None])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_arrays_of_numpy_2_are_read_where_numpy_is_older(monkeypatch):
    """SimplerEnv asks for NumPy 1.24, which has `numpy.core` only."""
    sent = {"action": np.arange(7.0), "scalar": np.float32(2), "part": np.ones((2, 3))[:, ::2], "text": "open it"}
    asked = []

    def older(name):
        asked.append(name)

    monkeypatch.setattr(process.importlib.util, "find_spec", older)
    read = process._Unpickler(io.BytesIO(pickle.dumps(sent))).load()
    assert set(asked) == {"numpy._core"}
    for name, value in sent.items():
        np.testing.assert_array_equal(read[name], value)
    assert process._Unpickler(io.BytesIO(b"")).find_class("numpy._core.multiarray", "scalar").__module__  # found there


def test_what_runs_beside_a_simulator_takes_arrays_of_numpy_1():
    """They do not know `__array_namespace__`."""

    class Older(np.ndarray):
        @property
        def __array_namespace__(self):
            raise AttributeError("not before NumPy 2")

    angles = np.array([0.1, -0.2, 0.3])
    found = rotations.to_axis_angle(rotations.from_euler(angles.view(Older)))
    np.testing.assert_allclose(found, rotations.to_axis_angle(rotations.from_euler(angles)))
    package = pathlib.Path(process.__file__).parents[1]
    beside = [*(package / "envs").rglob("*.py"), package / "actions/rotations.py", package / "actions/frames.py"]
    assert [path.name for path in beside if "__array_namespace__" in path.read_text()] == []


def test_a_pool_has_one_name():
    other = Toy()
    other.name = "Other"
    with pytest.raises(ValueError, match=r"\['Other', 'Toy'\]"):
        EnvPool([Toy(), other])
