"""A toy environment for the tests of processes; a file of its own, so that children import no more than they need."""

from __future__ import annotations

import os
import time
from typing import ClassVar

import numpy as np

from robovlms_jax.control.interface import Observation


class Toy:
    """Counts its steps; some actions make it misbehave."""

    name = "Toy"
    about: ClassVar = {"version": 3}

    def __init__(self, start: int = 0):
        if start < 0:
            raise ValueError(f"start={start} must not be negative.")
        print("toy simulator starting")
        self.count, self._start = start, start

    def reset(self, robot_obs=None, scene_obs=None, *, count: int | None = None) -> None:
        self.count = self._start if count is None else count

    def step(self, action: np.ndarray) -> None:
        if action[0] == 3:
            print("last words", flush=True)
            os._exit(7)
        if action[0] == 4:
            time.sleep(60)
        if action[0] == 5:
            raise KeyError("toy bug")
        if action[0] == 6:
            raise ValueError("bad action")
        time.sleep(action[1])
        self.count += 1

    def observe(self) -> Observation:
        return Observation({"static": np.full((2, 2, 3), self.count, np.uint8)})

    @property
    def info(self):
        return {"count": self.count, "pid": os.getpid()}
