"""The training loop: draw a batch, step. Whatever else goes on beside the steps is a hook."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax


class LoaderError(RuntimeError):
    """The data loader's workers died."""


@dataclasses.dataclass
class Step:
    """A step that was made.

    number: counted from 1 over the whole run. state: after it. batch: as it was drawn. log, save: a line in the log, a
    checkpoint is due. last: nothing follows in the whole run. stop: set by a hook that wants the loop to end here.
    """

    number: int
    state: Any
    batch: Any
    log: bool
    save: bool
    last: bool
    stop: bool = False


class Hook:
    """Something that goes on beside the steps. A context for as long as the loop runs; does nothing by itself."""

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def before(self, step: int) -> None:
        """Ahead of drawing the batch of a step."""

    def after(self, step: Step, metrics: Mapping[str, jax.Array]) -> None:
        """After a step was handed to the devices, where it may still run."""

    def finish(self, step: int, stopped: bool) -> None:
        """After the last step, `step`, or the one after which a hook stopped the loop; in reverse order of the hooks.
        Not after an error."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which step is the last one, and what is due when.

    last: of this loop. end: of the run, which may go on with another loop. log_every, checkpoint_every: steps.
    """

    last: int
    end: int
    log_every: int = 10
    checkpoint_every: int = 2_000

    def made(self, number: int, start: int, state: Any, batch: Any) -> Step:
        """A step as hooks see it; `start`: the step that the loop began after."""
        final = number == self.last
        log = number % self.log_every == 0 or final or number == start + 1
        save = number % self.checkpoint_every == 0 or final
        return Step(number, state, batch, log, save, last=number == self.end)


def fit(
    state: Any,
    batches: Iterator[Any],
    step: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]],
    *,
    schedule: Schedule,
    hooks: Sequence[Hook] = (),
) -> tuple[Any, bool]:
    """Make the steps from `state.step` to schedule.last.

    Args:
      batches: endless, positioned at `state.step`. They may be read from a dataset or made by the policy itself.
      step: (state, batch) -> (state, metrics).
      hooks: called in their order.
    Returns:
      The final state and whether all steps were made (False: a hook stopped the loop).
    Raises:
      LoaderError; what hooks raise.
    """
    start, stopped = int(state.step), False
    number = start
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        while number < schedule.last and not stopped:
            number += 1
            for hook in hooks:
                hook.before(number)
            batch = _next(batches, number)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = step(state, batch)
            made = schedule.made(number, start, state, batch)
            for hook in hooks:
                hook.after(made, metrics)
            stopped = made.stop
        for hook in reversed(hooks):
            hook.finish(number, stopped)
    return state, not stopped


def _next(batches: Iterator[Any], step: int) -> Any:
    try:
        return next(batches)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # the data's own errors say what they mean
            raise
        # Grain asks every second whether its workers live.
        raise LoaderError(
            f"no batch for step {step}: {error} If the machine ran out of memory, read with fewer data.num_workers (0: "
            "threads) or a smaller data.prefetch; then go on from the newest checkpoint with --train.resume."
        ) from error
