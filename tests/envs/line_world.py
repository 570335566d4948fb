"""A point on a line, a stand-in for gymnasium with it, and an expert."""

from __future__ import annotations

import types

import numpy as np

from robovlms_jax.control.robot import Camera, Dimension, RobotSpec
from robovlms_jax.envs import gym

LINE = RobotSpec(
    "line",
    10.0,
    (Camera("top", 6, 8),),
    (Dimension("push", "m/s", "velocity", "base", "", -1.0, 1.0),),
    (Dimension("place", "m"), Dimension("goal", "m")),
)
LAYOUT = gym.Layout("Line-v0", {"top": "pixels"}, ("place", "goal"), "go to the goal", options='{"goal": 3}')


class Box:
    def __init__(self, low, high, shape, dtype=np.float32):
        self.low, self.high = np.full(shape, low, dtype), np.full(shape, high, dtype)
        self.shape, self.dtype = shape, np.dtype(dtype)


class Line:
    """A point on a line; the episode ends beyond 5."""

    def __init__(self, goal=3.0, render_mode=None, plain=False):
        self.action_space, self.goal, self.render_mode, self.plain = Box(-1, 1, (1,)), goal, render_mode, plain
        self.unwrapped, self.steps = self, 0

    def reset(self, *, seed=None, options=None):
        self.place, self.steps = np.random.default_rng(seed).uniform(), 0
        return self._observation(), {"sentence": f"begin at {seed}"}

    def step(self, action):
        assert action.dtype == np.float32 and np.all(np.abs(action) <= 1)
        self.steps += 1
        self.place += float(action[0])
        reached = abs(self.place - self.goal) < 0.3
        return self._observation(), 1.0, self.place > 5, False, {"is_success": np.float32(reached), "sentence": "go on"}

    def _observation(self):
        pixels = np.full((6, 8, 3), self.steps, np.uint8)
        return (
            pixels if self.plain else {"pixels": pixels, "place": np.array([self.place]), "goal": np.float64(self.goal)}
        )

    def render(self):
        return np.full((6, 8, 3), 200, np.uint8)

    def close(self): ...


def expert(seen):
    return np.clip(seen["goal"] - seen["place"], -0.5, 0.5)


def gymnasium() -> types.ModuleType:
    module = types.ModuleType("gymnasium")
    module.__version__ = "1.0"
    module.error = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def make(name, **options):
        if name != "Line-v0":
            raise module.error.Error(f"Environment `{name}` doesn't exist")
        return Line(**options)

    module.make, module.register_envs = make, lambda package: None
    return module
