"""The loop's decisions, with a step that computes nothing: what ends a run, what is saved, what is written down."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import signal
import time
import types

import numpy as np
import pytest

from robovlms_jax import cli
from robovlms_jax.data import cutting, opening, samples, sources
from robovlms_jax.data.config import DataConfig
from robovlms_jax.parallel import distributed
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import guards, hooks, loop
from tests.data import toy_rlds
from tests.toy import make_batch


@dataclasses.dataclass(frozen=True)
class State:
    step: int = 0
    skipped: int = 0


class Disk:
    """Records what a checkpointer was asked for."""

    def __init__(self):
        self.saved = []

    def save(self, state, data):
        self.saved.append((state.step, data["next_step"]))

    def check(self):
        pass

    def wait(self):
        pass


def fit(output, *, bad=(), terminated=0, pressed=0, state=State(), steps=8, batches=None, numbers=None, **changes):
    """Run the loop over a step that finds the batches numbered in `bad` not finite, and is sent SIGTERM during step
    `terminated` and SIGINT during `pressed`; (state, saved, logged lines).

    numbers: fields of `Services` about evaluation and rollouts.
    """
    config = cli.override(
        ExperimentConfig(),
        **{"train.output": str(output), "train.steps": steps, "train.log_every": 4, "train.eval_every": 0, **changes},
    )
    skip, number, halted = config.train.on_nonfinite == "skip", itertools.count(state.step + 1), False

    def train_step(state, batch):
        nonlocal halted
        current = next(number)
        if current == terminated:
            signal.raise_signal(signal.SIGTERM)
        if current == pressed:
            signal.raise_signal(signal.SIGINT)
        finite = current not in bad
        halted |= not finite and not skip
        step = state.step + (0 if halted else 1)
        loss = 1.0 if finite else float("nan")
        metrics = {"loss": np.float32(loss), "nonfinite": np.float32(not finite)}
        return State(step, state.skipped + (skip and not finite)), metrics

    batch = {"robot": make_batch(np.random.default_rng(0)).replace(episode=np.array([5, 7], np.int32))}
    disk, lines = Disk(), []
    services = hooks.Services(
        train=config.train,
        checkpointer=disk,
        position=lambda step: {"next_step": step},
        writer=types.SimpleNamespace(write=lambda step, values: lines.append((step, values))),
        describe=lambda source, episode: f"episode {episode}",
        max_corrupt_share=config.data.max_corrupt_share,
        **{"evaluate": lambda state: {}} | (numbers or {}),
    )
    schedule = loop.Schedule(steps, steps, config.train.log_every, config.train.checkpoint_every)
    try:
        state, _ = loop.fit(
            state,
            services.timed(itertools.repeat(batch) if batches is None else batches),
            train_step,
            schedule=schedule,
            hooks=services.hooks(state, schedule),
        )
    except guards.DivergedError as error:
        return error, disk.saved, lines
    return state, disk.saved, lines


def test_abort_saves_the_last_good_state_and_names_the_batch(tmp_path):
    # Noticed at the next log, four steps later at most; what is saved is the state from before all the same.
    error, saved, _ = fit(tmp_path, bad=(3,))
    assert isinstance(error, guards.DivergedError) and "step 3: {'loss': nan} not finite" in str(error)
    assert saved == [(2, 2)]
    (line,) = (tmp_path / guards.NONFINITE).read_text().splitlines()
    assert json.loads(line) == {
        "step": 3,
        "episodes": [5, 7],
        "names": ["episode 5", "episode 7"],
        "values": {"loss": "nan"},
    }


def test_sigterm_right_after_a_bad_batch_does_not_pass_for_a_good_end(tmp_path):
    # Steps 5 and 6 are not logged yet. Fails if the frozen state is saved under the loader's position, a step ahead.
    error, saved, _ = fit(tmp_path, bad=(5,), terminated=6)
    assert isinstance(error, guards.DivergedError) and saved == [(4, 4)]
    state, saved, _ = fit(tmp_path, terminated=6)
    assert (state.step, saved) == (6, [(6, 6)])


def test_skip_goes_on_counts_and_leaves_bad_steps_out_of_the_mean(tmp_path):
    state, saved, lines = fit(tmp_path, bad=(2, 6), **{"train.on_nonfinite": "skip"})
    assert (state.step, state.skipped, saved) == (8, 2, [(8, 8)])
    logged = [(step, x["train/skipped_steps"], x["train/loss"]) for step, x in lines if "train/loss" in x]
    assert logged == [(1, 0, 1), (4, 1, 1), (8, 2, 1)]
    steps = [json.loads(line)["step"] for line in (tmp_path / guards.NONFINITE).read_text().splitlines()]
    assert steps == [2, 6]


def test_skipping_ends_at_the_limit_which_counts_what_was_skipped_before_a_resume(tmp_path):
    changes = {"train.on_nonfinite": "skip", "train.max_skipped": 2}
    assert not isinstance(fit(tmp_path, bad=(3, 5), **changes)[0], guards.DivergedError)
    error, saved, _ = fit(tmp_path, bad=(5,), state=State(step=4, skipped=2), **changes)
    assert isinstance(error, guards.DivergedError) and "3 batches so far, more than train.max_skipped=2" in str(error)
    assert saved == [(5, 5)]


def test_speed_and_time_left_do_not_mind_that_the_clock_is_set(tmp_path, monkeypatch, caplog):
    # A year back, two years on, with every look: only a clock that nobody sets can tell how long a step took.
    shown = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + (-1) ** next(shown) * 3.2e7)
    caplog.set_level(logging.INFO)
    begin = time.perf_counter()
    _, _, lines = fit(tmp_path, steps=12)
    took = time.perf_counter() - begin
    values = {name: value for _, line in lines for name, value in line.items()}
    assert 4 / took < values["train/steps_per_second"] < 1e6
    assert all(0.0 <= value <= 1.0 for name, value in values.items() if name.startswith("goodput/"))
    assert caplog.text.count("eta 0:00:00") == 3


def test_a_process_that_waits_longer_for_its_data_is_named(tmp_path, monkeypatch, caplog):
    # The first process's own share says nothing: it waits inside its step for the slow one.
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(distributed, "of_all", lambda value: np.array([0.1, 0.6]) if 0 < value < 1 else np.array([0]))
    _, _, lines = fit(tmp_path, steps=12)
    assert [line["train/data_wait_share"] for _, line in lines if "train/data_wait_share" in line][-1] == 0.6
    assert "process 1 waits 60% of the time for its data, process 0 10%" in caplog.text


@dataclasses.dataclass(frozen=True)
class Encode:
    """Importable, as worker processes need it."""

    def __call__(self, sentence):
        return np.ones(4, np.int32), np.ones(4, bool)


def test_a_dead_loader_worker_ends_the_run(tmp_path):
    # Out of memory, the kernel kills one of them. Fails if the run waits for it, or goes on without its batches.
    toy_rlds.write(tmp_path, [toy_rlds.episode(seed, 20) for seed in range(4)], name="arm")
    (tmp_path / "mine.yaml").write_text("datasets: {}\nmixture: {arm: 1.0}\n")
    settings = DataConfig(dataset=str(tmp_path / "mine.yaml"), root=str(tmp_path), index_workers=1)
    source = samples.SegmentSource(
        opening.open_split(settings, "training"),
        cutting.Cut(window=2, chunk=2, windows_per_segment=2),
        cameras=("static",),
        encode_text=Encode(),
    )
    reading = {"seed": 0, "num_threads": 1, "prefetch": 1, "num_workers": 2}
    with contextlib.closing(sources.train_batches({"robot": source}, {"robot": 4}, **reading)) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        begin = time.perf_counter()
        with pytest.raises(loop.LoaderError, match=r"no batch for step .*exit code -9.*data.num_workers.*train.resume"):
            fit(tmp_path, steps=10_000, batches=batches)
        assert time.perf_counter() - begin < 30.0


def test_a_run_that_skipped_may_go_on_as_one_that_aborts(tmp_path):
    # Fails if batches skipped before count as a reason to end.
    state, _, _ = fit(tmp_path, state=State(step=4, skipped=2))
    assert state.step == 8


@pytest.mark.parametrize("field", ["max_skipped", "profile"])
def test_a_negative_number_is_refused(field):
    with pytest.raises(ValueError, match=rf"train.{field}=-1 must"):
        cli.override(ExperimentConfig(), **{f"train.{field}": -1})
