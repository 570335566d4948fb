"""Damage at random: shards, metadata and index files. No hang, no crash, no wrong sample."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest

from robovlms_jax.data import base, rlds, shard_index
from tests.data import toy_rlds
from tests.data.test_rlds import TOY

NUM_EPISODES, LENGTH = 6, 5


@contextlib.contextmanager
def limited(seconds: int):
    """Raise TimeoutError when the body hangs."""

    def stop(*_):
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def open_and_read(root: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Instruction -> (actions, static and wrist images) of everything that is offered as good."""
    read = {}
    for split in ("training", "validation"):
        dataset = rlds.open_dataset(root, TOY, split, options=rlds.Options(max_damaged_share=0.9))
        for episode in dataset.episodes:
            ids = np.arange(episode.start, episode.end)
            with contextlib.suppress(base.CorruptFrameError):
                images = dataset.images(ids, ("static", "wrist"))
                read[episode.instruction] = (dataset.actions(ids), images["static"], images["wrist"])
        dataset.close()
    return read


def damage(path: pathlib.Path, rng: np.random.Generator) -> str:
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "zero", "cut", "grow", "copy", "delete"])
    place = int(rng.integers(len(data)))
    if kind == "flip":
        for index in rng.integers(len(data), size=rng.integers(1, 4)):
            data[index] ^= 1 << rng.integers(8)
    elif kind == "zero":
        data[place : place + int(rng.integers(1, 200))] = bytes(len(data[place : place + int(rng.integers(1, 200))]))
    elif kind == "cut":
        del data[place:]
    elif kind == "grow":
        data += rng.bytes(int(rng.integers(1, 100)))
    elif kind == "copy":  # a part of the file over another part
        piece = data[place : place + 300]
        other = int(rng.integers(len(data)))
        data[other : other + len(piece)] = piece
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{kind} in {path.name} at {place}"


def fuzz(directory: pathlib.Path, seconds: float, seed: int) -> int:
    rng = np.random.default_rng(seed)
    episodes = [toy_rlds.episode(number, LENGTH, text=f"task {number}") for number in range(NUM_EPISODES)]
    root = toy_rlds.write(directory, episodes, shard_bytes=40_000)
    expected = open_and_read(root)
    assert len(expected) == NUM_EPISODES
    pristine = directory / "pristine"
    shutil.copytree(root, pristine)
    names = sorted(
        path.relative_to(root)
        for path in root.rglob("*")
        # Feature names have no checksum; features.json has tests of its own. The copy of the statistics is not read.
        if path.is_file() and path.name not in ("features.json", "dataset_statistics.json")
    )
    assert len([name for name in names if shard_index.BESIDE_DATA in str(name)]) > 10
    end, rounds, compared = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        # In the same place and with the same times, or the index would be made anew before its damage is met.
        shutil.rmtree(root)
        shutil.copytree(pristine, root)
        chosen = rng.choice(len(names), size=rng.integers(1, 3), replace=False)
        what = [damage(root / names[index], rng) for index in chosen]
        rounds += 1
        with limited(30):
            try:
                found = open_and_read(root)
            except (ValueError, OSError):  # what the user is told
                continue
        for instruction, arrays in found.items():
            # An episode without its instruction would be one that nobody recorded.
            assert instruction in expected, what
            for a, b in zip(arrays, expected[instruction], strict=True):
                assert np.array_equal(a, b), what
            compared += 1
    assert compared > rounds  # most damage leaves something to read
    return rounds


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_random_damage_for_some_seconds(tmp_path):
    assert fuzz(tmp_path, 2, seed=1) > 2


@pytest.mark.slow
def test_random_damage_for_a_minute(tmp_path):
    assert fuzz(tmp_path, 60, seed=int(time.time())) > 100
