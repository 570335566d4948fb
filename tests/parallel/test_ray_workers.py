"""Jobs shared out to workers: by a few lines in Ray's place here, by Ray itself in tests/launch/test_ray.py."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import sys
import types

import pytest

from experiments import evaluation_workers
from robovlms_jax.data import workers
from robovlms_jax.parallel import ray_workers
from robovlms_jax.parallel.config import RayConfig


class TaskError(Exception):
    def __init__(self, cause):
        super().__init__("Traceback of there")
        self.cause = cause


class ActorError(Exception):
    pass


class FakeRay:
    """Calls everything in this process, when its result is waited for; the last that was begun ends first.

    deaths: job -> how often its worker dies."""

    exceptions = types.SimpleNamespace(RayTaskError=TaskError, RayActorError=ActorError)

    def __init__(self, deaths=()):
        self.deaths, self.born, self.most = dict(deaths), 0, 0

    def remote(self, **resources):
        self.resources = resources
        return self._kind

    def _kind(self, cls):
        def born(*arguments):
            self.born += 1
            worker = cls(*arguments)
            return types.SimpleNamespace(do=types.SimpleNamespace(remote=lambda job: (object(), worker, job)))

        return types.SimpleNamespace(remote=born)

    def wait(self, references, num_returns):
        self.most = max(self.most, len(references))
        return [references[-1]], references[:-1]

    def get(self, reference):
        _, worker, job = reference
        if self.deaths.get(job, 0):
            self.deaths[job] -= 1
            raise ActorError("the machine was taken away")
        try:
            return worker.do(job)
        except Exception as error:
            raise TaskError(error) from error


def pool(ray, count=2, make=lambda: lambda job: job * 10):
    return ray_workers.Pool(ray, RayConfig(workers=count, cpus=2, gpus=0.5), make)


def test_every_job_is_done_once_by_workers_that_are_made_once():
    ray, made = FakeRay(), []
    make = lambda: made.append(1) or (lambda job: job * 10)  # noqa: E731
    found = dict(pool(ray, make=make).results(range(7)))
    assert found == {position: position * 10 for position in range(7)}
    assert (ray.born, len(made), ray.most) == (2, 2, 2)
    assert ray.resources == {"num_cpus": 2, "num_gpus": 0.5}


def test_a_job_whose_worker_dies_is_done_by_another_and_not_for_ever(caplog):
    ray = FakeRay({3: ray_workers.ATTEMPTS - 1})
    assert dict(pool(ray).results(range(5))) == {position: position * 10 for position in range(5)}
    assert ray.born == 2 + ray_workers.ATTEMPTS - 1 and "the machine was taken away" in caplog.text
    with pytest.raises(RuntimeError, match=r"job 3 of 5 ended its worker 3 times, last so: the machine was taken away"):
        list(pool(FakeRay({3: ray_workers.ATTEMPTS})).results(range(5)))


def test_a_mistake_of_a_job_is_told_as_it_was_there():
    def make():
        raise FileNotFoundError("no checkpoint in runs/x")

    with pytest.raises(FileNotFoundError, match="no checkpoint in runs/x"):
        list(pool(FakeRay(), make=make).results([1]))


def test_relative_paths_mean_what_they_mean_where_the_work_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = pool(FakeRay(), make=lambda: lambda job: os.getcwd()).results([1])
    assert dict(results) == {0: str(tmp_path)}
    ray_workers._enter(str(tmp_path / "not on this machine"))


def work(number, name, advance):
    advance(number)
    advance(1)
    return f"{name} {number}"


def test_work_over_files_goes_to_the_cluster_and_its_progress_comes_back():
    ray, jobs, seen = FakeRay(), [(3, "a"), (4, "b")], collections.Counter()
    advance = lambda count: seen.update(done=count)  # noqa: E731
    here = dict(workers.completed(work, jobs, workers=1, advance=advance))
    with workers.elsewhere(ray_workers.completed(RayConfig(workers=2), ray)):
        there = dict(workers.completed(work, jobs, workers=1, advance=advance))
    assert there == here == {0: "a 3", 1: "b 4"}
    assert seen["done"] == 2 * (3 + 1 + 4 + 1) and ray.born == 2
    dict(workers.completed(work, jobs, workers=1, advance=advance))
    assert ray.born == 2  # here again


@pytest.mark.parametrize(("count", "number", "processes"), [(100, 4, 2), (7, 4, 2), (1000, 3, 64), (1, 8, 16)])
def test_parts_of_an_evaluation_are_all_its_trials_and_fill_the_simulators(count, number, processes):
    parts = evaluation_workers.chunks(range(count), number, processes)
    assert [trial for part in parts for trial in part] == list(range(count))
    assert all(len(part) >= min(processes, count) for part in parts[:-1])


def test_a_workers_simulators_stay_open_as_long_as_it_lives(monkeypatch):
    closed = []

    @contextlib.contextmanager
    def acting(config, criterion):
        try:
            yield None, types.SimpleNamespace(name="calvin", about={}), None
        finally:
            closed.append(config)

    monkeypatch.setattr(evaluation_workers.evaluate, "acting", acting)
    play = evaluation_workers._player(None, None, ())
    gc.collect()
    assert play([]).name == "calvin" and not closed
    evaluation_workers._open.close()


def test_workers_that_no_machine_has_room_for_are_told_of(monkeypatch, caplog):
    fake = types.SimpleNamespace(
        init=lambda **_: None, shutdown=lambda: None, cluster_resources=lambda: {"CPU": 4.0, "memory": 1e9}
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    for config, words in (
        (RayConfig(2, cpus=4), ""),
        (RayConfig(2, gpus=1), "ray.gpus=1"),
        (RayConfig(1, cpus=6), "ray.cpus=6"),
    ):
        caplog.clear()
        with ray_workers.joined(config):
            said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(said) == bool(words) and words in "".join(said)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ImportError, match=r"ray\.workers of 1 or more needs the package ray .*'\.\[ray\]'"),
        ray_workers.joined(RayConfig(workers=2)),
    ):
        pass


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": -1}, r"ray\.workers=-1 must be 0"),
        ({"workers": 1, "cpus": 0.0}, r"ray\.cpus=0\.0 must be positive"),
        ({"gpus": 1.0, "address": "head:6379"}, r"ray\.address, ray\.gpus without ray\.workers has no effect"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RayConfig(**values)
