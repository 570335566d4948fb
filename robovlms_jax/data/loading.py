"""From a dataset to batches on the host: a Grain graph over segment numbers, each batch decoded into one buffer.

    numbers 0 ... N-1 -> shuffle -> repeat -> mix -> batch -> this process's part -> read, decode

Everything before the read works on integers, so shuffling is global and the data's position is the number of the step:
a run resumes by starting at that step, on any number of processes and of workers that read. Images stay uint8; what
depends on the model happens on the device.
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags

from robovlms_jax import cores
from robovlms_jax.data import order
from robovlms_jax.data.samples import PADDING

if TYPE_CHECKING:
    import grain


def train_batches(
    source: order.Source,
    *,
    segments_per_batch: int,
    seed: int,
    start_step: int = 0,
    process: tuple[int, int] = (0, 1),
    num_threads: int = 8,
    prefetch: int = 16,
    num_workers: int = 0,
) -> grain.DatasetIterator[Any]:
    """Endless shuffled batches with NumPy leaves and leading axis segments_per_batch / number of processes.

    Every epoch is a new permutation of all segments; of a mixture, of each dataset's segments, and every batch has
    windows of them in proportion to the weights. The batches of all processes, joined in order of their numbers, are
    the batch that a single process would see, row by row. Call the iterator's `close()` after use.

    Args:
      segments_per_batch: over all processes.
      seed: order of the segments, in [0, 2**32).
      start_step: batches to skip, at no cost.
      process: number of this process, and of all that read parts of each batch.
      num_threads: batches being read at a time, by each worker.
      prefetch: batches kept ready, by each worker.
      num_workers: processes that read; 0: threads of this one do. Batches are the same for any number.
    """
    import grain  # as in order.py

    rows = order.rows_of(process, segments_per_batch)
    numbers = order.endless(source, seed)
    numbers = numbers.batch(segments_per_batch, drop_remainder=True)  # without it an endless one overflows
    numbers = numbers.map_with_index(functools.partial(order.draw, seed))
    batches = numbers[start_step:].map(functools.partial(_read_drawn, source.training_batch, rows))
    reading = batches.to_iter_dataset(_read_options(num_threads, prefetch))
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read an absl flag, which programs without absl never parse
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        reading = reading.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(reading)


def evaluation_batches(
    source: order.Source,
    *,
    segments_per_batch: int,
    num_batches: int = 0,
    process: tuple[int, int] = (0, 1),
    num_threads: int = 8,
    prefetch: int = 16,
) -> grain.DatasetIterator[Any]:
    """The first `num_batches` batches (0: all) of a fixed permutation of the segments, so that few cover many episodes.

    Each segment comes once. The last batch is filled up with rows whose `window_mask` and `action_mask` are False, so
    every process sees the same number of batches of one size. Other arguments as for `train_batches`.
    """
    import grain

    rows = order.rows_of(process, segments_per_batch)
    numbers = np.random.default_rng(0).permutation(len(source))
    numbers = np.append(numbers, np.full(-len(numbers) % segments_per_batch, PADDING)).reshape(-1, segments_per_batch)
    batches = grain.MapDataset.source(numbers[: num_batches or None])
    batches = batches.map(functools.partial(_read_rows, source.evaluation_batch, rows))
    return iter(batches.to_iter_dataset(_read_options(num_threads, prefetch)))


def choose_workers(
    make: Callable[[int], grain.DatasetIterator[Any]],
    windows_per_batch: int,
    *,
    candidates: Sequence[int] | None = None,
    seconds: float = 2.0,
) -> tuple[int, dict[int, float]]:
    """The number of worker processes that reads fastest here, by trying, and windows/s of each one tried.

    Threads of this process (0 workers) win ties: they need no copy of a batch and no start-up.

    Args:
      make: number of workers -> a fresh iterator.
      candidates: increasing; by default 0 and powers of two up to half the cores.
    """
    if candidates is None:
        candidates = [0, *(2**power for power in range(8) if 2**power <= cores.usable() // 2)]
    rates: dict[int, float] = {}
    for count in candidates:
        batches = make(count)
        try:
            rates[count] = measure(batches, windows_per_batch, seconds)
        finally:
            batches.close()
    best = max(rates, key=lambda count: (rates[count] * (1.05 if count == 0 else 1.0), -count))
    return best, rates


def measure(batches: Iterator[Any], windows_per_batch: int, seconds: float) -> float:
    """Windows per second that a fresh iterator delivers to a consumer that does nothing, start-up left out.

    Takes about `seconds`, or as long as two batches take.
    """
    next(batches)
    begin, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    return count * windows_per_batch / (time.perf_counter() - begin)


def _read_options(num_threads: int, prefetch: int) -> grain.ReadOptions:
    import grain

    # Grain warns of threads that can have no batch to read, and may refuse them one day.
    return grain.ReadOptions(num_threads=min(num_threads, prefetch), prefetch_buffer_size=prefetch)


def _start_worker(index: int, count: int) -> None:
    # A terminal sends Ctrl-C to all, and SIGHUP when it goes; the training loop decides what follows.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Grain imports jax in its workers; they must not take an accelerator.
    jax.config.update("jax_platforms", "cpu")


def _read_drawn(
    read: Callable[[np.ndarray, np.ndarray], Any], rows: slice, drawn: tuple[np.ndarray, np.ndarray]
) -> Any:
    numbers, draws = drawn
    return read(numbers[rows], draws[rows])


def _read_rows(read: Callable[[np.ndarray], Any], rows: slice, indices: np.ndarray) -> Any:
    return read(indices[rows])
