"""Any environment in a process of its own: it may hang, crash or be one per process, and the evaluation goes on.

The child is a plain `python -m robovlms_jax.envs.process`, not a fork: it inherits no jax state and does not import the
parent's main module again. It may even be another Python installation, e.g. one a simulator has packages for.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Mapping
from multiprocessing import connection
from typing import Any

import numpy as np

from robovlms_jax.control.interface import Observation
from robovlms_jax.envs import vector
from robovlms_jax.envs.vector import EnvError

_PACKAGE_PARENT = pathlib.Path(__file__).parents[2]
_CALLERS_MISTAKES = (ImportError, FileNotFoundError, ValueError, TypeError)  # while building; ValueError later on


class ProcessEnv:
    """An `Env` whose simulator lives in another process.

    Args:
      factory: "package.module:callable" that builds the environment in the child.
      kwargs: its keyword arguments; must be picklable.
      timeout_s: longest wait for one reset, step or rendering before the process counts as hung and is ended. What it
        waits for a core of its own does not count, where the system tells it (Linux).
      start_timeout_s: the same for building the environment.
      python: interpreter that runs the child; needs the simulator's packages and NumPy, but no jax.
      fresh_process: start a new process at every reset but a process's first, for simulators that keep something of
        what they simulated before.
    Raises:
      ImportError, FileNotFoundError, ValueError, TypeError: as `factory` raised them.
      EnvError: the process died or hung. `restart` makes a new one.

    `about` is the environment's own, and says whether processes are fresh.
    """

    def __init__(
        self,
        factory: str,
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = 60.0,
        start_timeout_s: float = 180.0,
        python: str = sys.executable,
        fresh_process: bool = False,
    ):
        self._fresh, self._used = fresh_process, False
        self._factory, self._kwargs, self._python = factory, dict(kwargs or {}), python
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._process: subprocess.Popen | None = None
        self._waiting: collections.deque[str] = collections.deque()
        self.name: str = ""
        self.about: dict[str, Any] = {}
        self.restart()

    def restart(self) -> None:
        """End the process, if there is one, and start a fresh one."""
        self.close()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._pipe, child = connection.Pipe()
        paths = [str(_PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [self._python, "-m", __name__, str(child.fileno())],
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        finally:
            child.close()
        weakref.finalize(self, self._process.kill)  # a hung simulator must not outlive an interrupted evaluation
        self._waiting.append("start")
        self._write((self._factory, self._kwargs))
        self.name, self.about = self.receive(timeout_s=self._start_timeout_s)
        if self._fresh:
            self.about["fresh_process"] = True
        self._used = False

    def close(self) -> None:
        """End the process; nothing is asked of it, since it may hang."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._log.close()
        self._process = None
        self._waiting.clear()

    def reset(self, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None, **start: Any) -> None:
        self._ask("reset", robot_obs=robot_obs, scene_obs=scene_obs, **start)

    def step(self, action: np.ndarray) -> None:
        self._ask("step", action)

    def observe(self) -> Observation:
        return self._ask("observe")

    @property
    def info(self) -> Mapping[str, Any]:
        return self._ask("info")

    def send(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Ask for a method (see `vector.perform`) without waiting; the answer comes with the matching `receive`."""
        if self._process is None:
            raise EnvError(f"{self._factory} has no running process; call restart().")
        if method.partition("+")[0] == "reset":
            if self._fresh and self._used:
                self.restart()
            self._used = True
        self._waiting.append(method)
        self._write((method, args, kwargs))

    def receive(self, timeout_s: float | None = None) -> Any:
        """The answer to the oldest unanswered `send`."""
        method = self._waiting.popleft()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            if not self._answered(timeout_s):
                self._fail(f"{method} took longer than {timeout_s:g} s")
            result, error = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._fail(f"the process died during {method}")
        if error is not None:
            raise error
        return result

    def _answered(self, timeout_s: float) -> bool:
        """Whether there is an answer within `timeout_s` of time in which the process could have worked."""
        before, left = starved_s(self._process.pid), timeout_s
        while left > 0:
            if self._pipe.poll(left):
                return True
            now = starved_s(self._process.pid)
            before, left = now, now - before
        return False

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.send(method, *args, **kwargs)
        return self.receive()

    def _write(self, message: Any) -> None:
        # a process that just died: `receive` says so, with its last words
        with contextlib.suppress(ConnectionError):
            self._pipe.send(message)

    def _fail(self, what: str) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.5)  # a dying process closes its pipe before its exit code is known
        code = self._process.poll()
        state = "still running, ended now" if code is None else f"exit code {code}"
        self._log.seek(max(os.fstat(self._log.fileno()).st_size - 1500, 0))
        last_words = self._log.read().decode(errors="replace").strip()
        self.close()
        raise EnvError(f"{self._factory}: {what} ({state}). Its last output:\n{last_words or '(none)'}")


class _Unpickler(pickle.Unpickler):
    """Reads arrays that NumPy 2 pickled: they name modules `numpy._core...`, which older NumPy has as `numpy.core`.

    Simulators may need such a NumPy; SimplerEnv asks for 1.24. The names are not registered as modules: compiled
    packages take `numpy._core` for NumPy 2.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy._core") and importlib.util.find_spec("numpy._core") is None:
            module = module.replace("numpy._core", "numpy.core", 1)
        return super().find_class(module, name)


def starved_s(pid: int) -> float:
    """Seconds that a process's first thread has waited for a core since it began (proc(5), schedstat); 0 where no
    system tells it. On a machine with more work than cores that is most of its time, and not its fault."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def read(pipe: connection.Connection) -> Any:
    """The next object of a pipe. Raises EOFError: the other end is closed."""
    return _Unpickler(io.BytesIO(pipe.recv_bytes())).load()


def _serve(pipe: connection.Connection) -> None:
    """The child: build the environment, then answer until the pipe closes."""

    def answer(mistakes: tuple, function: Any, *args: Any, **kwargs: Any) -> None:
        result, error = None, None
        try:
            result = function(*args, **kwargs)
        except mistakes as caught:
            error = caught
        except Exception as caught:
            error = EnvError(f"{type(caught).__name__}: {caught}\n{traceback.format_exc()}")
        pipe.send((result, error))

    def build() -> tuple[str, dict[str, Any]]:
        module, _, name = factory.partition(":")
        env.append(getattr(importlib.import_module(module), name)(**kwargs))
        return env[0].name, dict(getattr(env[0], "about", {}))

    env: list[Any] = []
    factory, kwargs = read(pipe)
    answer(_CALLERS_MISTAKES, build)
    while True:
        try:
            method, args, kwargs = read(pipe)
        except EOFError:  # the parent is gone or done
            return
        answer((ValueError,), vector.perform, env[0], method, *args, **kwargs)


if __name__ == "__main__":
    _serve(connection.Connection(int(sys.argv[1])))
