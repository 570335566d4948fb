"""Many robots, one model: requests are gathered for a moment and answered by one batched call, in one thread."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from robovlms_jax.control.interface import ActionChunk, EpisodesFailed, Observation

log = logging.getLogger(__name__)


RECENT_S = 1.0
"""A robot that has asked within this may ask again."""


class ServedPolicy(Protocol):
    """What is served: a `BatchedPolicy` that can also be told of episodes that are over."""

    slots: int

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None: ...

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> Sequence[ActionChunk]: ...

    def release(self, slots: Sequence[int]) -> None: ...


@dataclasses.dataclass
class Request:
    """A step of one slot. instruction: not None begins an episode with it."""

    slot: int
    observation: Observation
    instruction: str | None
    answer: concurrent.futures.Future
    """Of an `ActionChunk`."""


@dataclasses.dataclass(frozen=True)
class Release:
    """A slot whose client has gone."""

    slot: int
    done: Callable[[], None]


class InferenceThread:
    """The one thread that calls the policy.

    max_batch: steps of one call. max_wait_s: how long the first of them waits for other robots that are at work.
    on_batch: told the size and the seconds of every call.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        max_batch: int = 0,
        max_wait_s: float = 0.002,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        if max_batch < 0 or not max_wait_s >= 0:
            raise ValueError(f"max_batch={max_batch} and max_wait_s={max_wait_s} must not be negative.")
        self._policy, self._max_batch, self._max_wait_s = policy, max_batch or policy.slots, max_wait_s
        self._on_batch = on_batch
        self._queue: queue.Queue[Request | Release | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._last_request: dict[int, float] = {}
        """When each slot asked last: nobody waits for a robot that has not asked for a while."""

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Answers what was asked before, then ends."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def submit(self, slot: int, observation: Observation, instruction: str | None) -> concurrent.futures.Future:
        answer: concurrent.futures.Future = concurrent.futures.Future()
        self._last_request[slot] = time.monotonic()
        self._queue.put(Request(slot, observation, instruction, answer))
        return answer

    def release(self, slot: int, done: Callable[[], None]) -> None:
        """Ends a slot's episode after what was asked for it; `done` is called in the inference thread."""
        self._last_request.pop(slot, None)
        self._queue.put(Release(slot, done))

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            batch, after = self._gather(item)
            try:
                if batch:
                    self._answer(batch)
            except BaseException:  # this thread is the only one that answers: whatever is wrong, it goes on
                log.exception("a batch of %d steps could not be answered", len(batch))
            for request in batch:
                if not request.answer.done():
                    request.answer.set_exception(RuntimeError("the policy gave no answer; the server's log says more."))
            for item in after:
                if item is None:
                    return
                self._end(item)

    def _gather(self, first: Request | Release) -> tuple[list[Request], list[Release | None]]:
        """Requests that come within the wait, each of another slot, up to what ends the batch."""
        if isinstance(first, Release):
            return [], [first]
        batch, deadline = [first], time.monotonic() + self._max_wait_s
        recent = time.monotonic() - RECENT_S
        expected = sum(last > recent for last in list(self._last_request.values()))
        while len(batch) < min(self._max_batch, expected):
            try:
                item = self._queue.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                break
            if not isinstance(item, Request):
                return batch, [item]
            batch.append(item)
        return batch, []

    def _end(self, item: Release) -> None:
        try:
            self._policy.release([item.slot])
        except Exception:
            log.exception("slot %d could not be released", item.slot)
        try:
            item.done()
        except RuntimeError:  # the event loop is over, and nobody will ask for the slot
            log.debug("slot %d is free after the end", item.slot)

    def _answer(self, batch: list[Request]) -> None:
        batch = [request for request in batch if request.answer.set_running_or_notify_cancel()]
        started = time.perf_counter()
        ready = [request for request in batch if self._begin(request)]
        if not ready:
            return
        try:
            chunks = self._act(ready)
        except EpisodesFailed as error:  # the others have taken their step
            for request in ready:
                if request.slot in error.chunks:
                    request.answer.set_result(error.chunks[request.slot])
                else:
                    request.answer.set_exception(ValueError(error.failed[request.slot]))
        except Exception as error:
            # One bad observation must not fail the others. A call that was refused changed nothing; after one that
            # failed, episodes are gone, and each client is told.
            if len(ready) == 1:
                ready[0].answer.set_exception(error)
            else:
                for request in ready:
                    self._alone(request)
        else:
            for request, chunk in zip(ready, chunks):
                request.answer.set_result(chunk)
        self._on_batch(len(batch), time.perf_counter() - started)

    def _alone(self, request: Request) -> None:
        try:
            request.answer.set_result(self._act([request])[0])
        except Exception as error:
            request.answer.set_exception(error)

    def _begin(self, request: Request) -> bool:
        if request.instruction is None:
            return True
        try:
            self._policy.reset([request.slot], [request.instruction])
        except Exception as error:
            request.answer.set_exception(error)
            return False
        return True

    def _act(self, requests: list[Request]) -> list[ActionChunk]:
        observations = [request.observation for request in requests]
        return list(self._policy.act(observations, [request.slot for request in requests]))
