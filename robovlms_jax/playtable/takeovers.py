"""Scripted experts that take over where a policy has got to, and finish the task (Ross et al. 2011, arXiv:1011.0686, in
the form of Kelly et al. 2019, arXiv:1810.02890: who takes over acts until the task is done).

What is recorded is a demonstration like any other, from a state that a policy went to and no expert would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from robovlms_jax.playtable import demonstrations, env
from robovlms_jax.playtable.demonstrations import BLOCK, HOLD_STEPS, Chain, Demo, Scenes, Steps
from robovlms_jax.playtable.experts import plans
from robovlms_jax.playtable.mechanics import bodies, physics


class Case(NamedTuple):
    """Where an expert takes over. scene: which of the tables there are. state: there; begin: where the task began,
    which is what its condition compares with. NumPy leaves without a leading axis."""

    scene: int
    task: str
    state: bodies.State
    begin: bodies.State


_info = jax.jit(jax.vmap(physics.info))


class Takeovers:
    """Experts on many tables, a case each; in place of `demonstrations.Tables`.

    Args:
      every: all tables there are. cases: by number. tables: side by side. max_steps: for an expert.
    """

    def __init__(self, every: Scenes, cases: Sequence[Case], *, tables: int, max_steps: int, seed: int):
        self.numbers: Sequence[int] = range(len(cases))
        self.watch: Callable[[int], None] = lambda steps: None
        """Called after every block with the control steps that all tables have made together."""
        self._every, self._cases = every, cases
        self._tables, self._max_steps, self._seed = tables, max_steps, seed

    def __iter__(self) -> Iterator[Chain]:
        made = 0
        for first in range(0, len(self.numbers), self._tables):
            numbers = list(self.numbers[first : first + self._tables])
            yield from self._finish(numbers)
            made += self._max_steps * len(numbers)
            self.watch(made)

    def _finish(self, numbers: Sequence[int]) -> list[Chain]:
        """Those cases, all at once. A chain without a demonstration is one whose expert failed."""
        rows = [self._cases[n] for n in [*numbers, *[numbers[-1]] * (self._tables - len(numbers))]]
        scenes = jax.device_put(env.pick(self._every.stacked, np.array([case.scene for case in rows])))
        states, begin = (_stack([getattr(case, name) for case in rows]) for name in ("state", "begin"))
        tasks = np.array([plans.TASKS.index(case.task) for case in rows], np.int32)
        drawn = [np.random.default_rng([self._seed, n]).integers(2**31) for n in numbers]  # whatever is beside it
        seeds = np.resize(np.array(drawn, np.uint32), self._tables)
        running = demonstrations.begin_tasks(scenes, states, tasks, seeds)
        running = running._replace(start=_info(scenes, begin))
        kicks, blocks, done_at = np.zeros((self._tables, 7), np.float32), [], {}
        for made in range(0, self._max_steps, BLOCK):
            states, running, steps = demonstrations.advance(scenes, states, running, kicks)
            blocks.append(steps)
            for row in set(range(len(numbers))) - set(done_at):
                if steps.done[:, row].any():
                    done_at[row] = made + int(steps.done[:, row].argmax())
            if all(row in done_at and done_at[row] + HOLD_STEPS < made + BLOCK for row in range(len(numbers))):
                break
        whole: Steps = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
        chains = []
        for row, number in enumerate(numbers):
            rng = np.random.default_rng(0)  # nothing is drawn any more
            chain = Chain(number, rows[row].scene, rng, {}, np.zeros(3), rows[row].task, attempted=1)
            length = done_at.get(row, self._max_steps) + HOLD_STEPS + 1
            if length <= len(whole.done):
                cut = jax.tree.map(lambda x, row=row, length=length: x[:length, row], whole)
                chain.demos.append(Demo(rows[row].task, cut))
            chains.append(chain)
        return chains


def _stack(states: Sequence[bodies.State]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)
