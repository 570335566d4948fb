"""Hooks that notice a run which no longer gets on, and a process that holds the others up."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.parallel import distributed
from robovlms_jax.training.goodput import Goodput
from robovlms_jax.training.loop import Hook, Step

logger = logging.getLogger(__name__)

SLOW = 1.3
"""A process is named whose devices take this many times as long as the median process's."""
SUSTAINED = 3
"""Logged steps in a row after which it is named: one alone may have been disturbed."""

_SIZE, _PRODUCTS, _TRIES = 2048, 64, 3  # 1.1 TFLOP: milliseconds on the accelerators that runs of many processes have


class Watchdog(Hook):
    """Ends the process when no step has ended for `limit_s` seconds, with what it was doing and every thread's stack in
    the log. Evaluation does not count (rollouts may take hours), nor does what comes before the first step is made
    (compilation); checkpoints do.

    A dead process is noticed by its silence (`distributed.joined`); this is for one that lives and waits for ever: for
    a disk, a lock, a collective that a device does not take part in. All processes of a run end within the same
    seconds, and the one that was in another phase than the others is the one to look at.

    Args:
      limit_s: 0: never.
      goodput: knows the phase.
      end: is called with the exit status, on another thread.
    """

    def __init__(self, limit_s: float, goodput: Goodput, end: Callable[[int], object] = os._exit):
        self._limit, self._goodput, self._end = limit_s, goodput, end
        self._made, self._silent = 0, 0.0
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._limit:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        self._made, self._silent = step.number, 0.0

    def _watch(self) -> None:
        pause = min(self._limit / 4, 10.0)
        before = time.monotonic()
        while not self._over.wait(pause):
            now = time.monotonic()
            # A process that was stopped, or a machine that slept, did not hang.
            passed, before = min(now - before, 2 * pause), now
            counts = self._made and self._goodput.phase != "evaluation"
            self._silent = self._silent + passed if counts else 0.0
            if self._silent >= self._limit:
                self._give_up()
                return

    def _give_up(self) -> None:
        logger.error(
            "process %d on %s: no step since step %d, for %.0f s (train.hang_timeout_s); it is in phase %r. The "
            "process ends, with status %d, and what its threads were doing follows; go on with --train.resume.",
            *(jax.process_index(), socket.gethostname(), self._made, self._silent),
            *(self._goodput.phase, distributed.AGAIN),
        )
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        self._end(distributed.AGAIN)


class Stragglers(Hook):
    """Names processes whose devices compute slower than the others' (a hot or throttled card), by timing the same small
    product on all of them at every logged step, when nothing else runs. Slow disks are told by the wait for data
    (`progress.Log`); slow networks by neither.

    Args:
      probe: seconds that this process's devices take.
    """

    def __init__(self, probe: Callable[[], float]):
        self._probe = probe
        self._slow = np.zeros(jax.process_count(), int)  # logged steps in a row

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        if not step.log:
            return
        seconds = distributed.of_all(self._probe())
        usual = float(np.quantile(seconds, 0.5, method="lower"))  # of a process: of two, the quicker one's
        self._slow = np.where(seconds > SLOW * usual, self._slow + 1, 0)
        for process in np.flatnonzero(self._slow == SUSTAINED):
            if process == jax.process_index():  # it knows its own host
                logger.warning(
                    "process %d on %s: its devices take %.2f ms for what the median process's take %.2f ms for, at %d "
                    "logged steps in a row, and every step waits. Look at their temperature, clock and neighbours.",
                    *(process, socket.gethostname(), 1000 * seconds[process], 1000 * usual, SUSTAINED),
                )


def device_probe() -> float:
    """Seconds that the slowest of this process's devices takes for some products of matrices; the quickest of a few
    tries."""
    return max(_seconds(device) for device in jax.local_devices())


def _seconds(device: jax.Device) -> float:
    matrix = jax.device_put(jnp.full((_SIZE, _SIZE), 1 / _SIZE, jnp.bfloat16), device)
    jax.block_until_ready(_products(matrix))  # compiled, the first time
    tries = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        jax.block_until_ready(_products(matrix))
        tries.append(time.perf_counter() - begin)
    return min(tries)


@jax.jit
def _products(matrix: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: x @ matrix, matrix)
