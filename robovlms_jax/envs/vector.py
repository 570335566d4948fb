"""Several environments stepped together: what a rollout drives, be they processes or one jitted batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from robovlms_jax.control.interface import Env, Observation

Info = Mapping[str, Any]


class EnvError(RuntimeError):
    """An environment broke: it raised, hung or died. After `restart` it can be reset and used again."""


class VectorEnv(Protocol):
    """N environments with one name. Every call names the slots it is about; the others stand still.

    Answers come in the order of `slots`. A slot that breaks answers with its `EnvError` in place of the result, so the
    others go on. Rendering happens in `observe` only.
    """

    name: str
    size: int
    about: Mapping[str, Any]
    """What numbers depend on beyond the name, as JSON values: versions, renderer. Kept with results."""

    def reset(self, slots: Sequence[int], starts: Sequence[Mapping[str, Any]]) -> list[Info | EnvError]:
        """Put each slot into the state that its keyword arguments for `Env.reset` name."""

    def step(self, slots: Sequence[int], actions: np.ndarray) -> list[Info | EnvError]:
        """Execute one action in each slot, float[len(slots), 7]."""

    def observe(self, slots: Sequence[int]) -> list[Observation | EnvError]:
        """Render the given slots."""

    def restart(self, slot: int) -> None:
        """Build a broken slot anew."""


@runtime_checkable
class Viewed(Protocol):
    """A `VectorEnv` that also has a camera for people, which no policy sees."""

    def views(self, slots: Sequence[int]) -> list[Callable[[], np.ndarray]]:
        """For each of these slots, what draws it as it is now, uint8[height, width, 3], whenever it is called; making
        these functions must cost next to nothing. They can be pickled."""


class EnvPool:
    """Single environments as one `VectorEnv`.

    Environments in processes of their own (`envs.process.ProcessEnv`, recognised by `send` and `receive`) work at the
    same time; others take turns.
    """

    def __init__(self, envs: Sequence[Env]):
        if not envs:
            raise ValueError("EnvPool needs at least one environment.")
        names = {env.name for env in envs}
        if len(names) > 1:
            raise ValueError(f"one pool reports under one name, but these environments are called {sorted(names)}.")
        self.name = names.pop()
        self.about = dict(getattr(envs[0], "about", {}))
        for env in envs:
            if (other := dict(getattr(env, "about", {}))) != self.about:
                raise ValueError(f"one pool reports as one simulator, but {self.name} is {self.about} and {other}.")
        self.size = len(envs)
        self._envs = list(envs)

    def reset(self, slots: Sequence[int], starts: Sequence[Mapping[str, Any]]) -> list[Info | EnvError]:
        return self._call("reset+info", slots, [((), dict(start)) for start in starts])

    def step(self, slots: Sequence[int], actions: np.ndarray) -> list[Info | EnvError]:
        return self._call("step+info", slots, [((action,), {}) for action in actions])

    def observe(self, slots: Sequence[int]) -> list[Observation | EnvError]:
        return self._call("observe", slots, [((), {})] * len(slots))

    def restart(self, slot: int) -> None:
        env = self._envs[slot]
        if hasattr(env, "restart"):
            env.restart()

    def close(self) -> None:
        """End the processes of environments that have one."""
        for env in self._envs:
            if hasattr(env, "close"):
                env.close()

    def _call(self, method: str, slots: Sequence[int], arguments: Sequence[tuple[tuple, dict]]) -> list[Any]:
        envs = [self._envs[slot] for slot in slots]
        if all(hasattr(env, "send") for env in envs):
            # two passes, so that all processes compute while the first answer is awaited
            sent = [_caught(env.send, method, *args, **kwargs) for env, (args, kwargs) in zip(envs, arguments)]
            return [error if isinstance(error, EnvError) else _caught(env.receive) for env, error in zip(envs, sent)]
        return [_caught(perform, env, method, *args, **kwargs) for env, (args, kwargs) in zip(envs, arguments)]


def perform(env: Env, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of an environment by name, or read "info"; "step+info" does the one and returns the other."""
    name, _, then = method.partition("+")
    result = env.info if name == "info" else getattr(env, name)(*args, **kwargs)
    return perform(env, then) if then else result


def _caught(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The function's result, or the EnvError it raised. ValueError passes: wrong input, not a broken environment."""
    try:
        return function(*args, **kwargs)
    except EnvError as error:
        return error
    except ValueError:
        raise
    except Exception as error:
        return EnvError(f"{type(error).__name__}: {error}")
