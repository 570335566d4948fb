"""Arithmetic on recorded fields as text, so that a dataset is described by data and not by code.

observation/state[:6]                columns of a field of `steps`; [3], [-1], [2:5], or none for all
zeros(1)  ones(1)                    constant columns
invert(x)                            1 - x
clip(x)                              into [0, 1]
from_range(x, low, high)             (x - low) / (high - low): low -> 0, high -> 1; low may be the larger one
binarize(x)                          gripper positions -> 0 or 1, see `binarize`
from_relative(x)                     close / open commands -> 1 (open) or 0, see `from_relative`
change(x)                            x of the next step minus x: one step shorter
radians(x)                           degrees -> radians
euler(x)                             quaternion (x, y, z, w) -> roll, pitch, yaw
axis_angle(x)                        rotation vector (axis times angle, radians) -> roll, pitch, yaw
positive(x)                          1 where x > 0, else 0
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from robovlms_jax.actions import rotations


def binarize(positions: np.ndarray) -> np.ndarray:
    """Gripper opening in [0, 1] -> exactly 0 (closed) or 1 (open), as OpenVLA does for Bridge.

    Above 0.95 is open, below 0.05 closed; in between counts as the state that is reached next. Positions in between
    that nothing follows keep the last recorded value.

    Args:
      positions: float[T, n].
    """
    decided = (positions > 0.95) | (positions < 0.05)
    values = np.where(positions > 0.95, 1.0, 0.0).astype(positions.dtype)
    steps = np.arange(len(positions))[:, None]
    following = np.where(decided, steps, len(positions))
    following = np.minimum.accumulate(following[::-1], axis=0)[::-1]
    reached = np.take_along_axis(values, np.minimum(following, len(positions) - 1), axis=0)
    return np.where(following < len(positions), reached, positions[-1:])


def from_relative(commands: np.ndarray) -> np.ndarray:
    """Relative gripper commands (above 0.1 close, below -0.1 open) -> 0 (closed) or 1 (open) at every step.

    Between commands the state holds. Before the first command the gripper is in the opposite state; without any command
    it is open.

    Args:
      commands: float[T, n].
    """
    given = np.where(commands > 0.1, 0.0, np.where(commands < -0.1, 1.0, np.nan))
    steps = np.arange(len(commands))[:, None]
    has = ~np.isnan(given)
    before = np.maximum.accumulate(np.where(has, steps, -1), axis=0)
    held = np.take_along_axis(given, np.maximum(before, 0), axis=0)
    first = np.take_along_axis(given, np.argmax(has, axis=0)[None], axis=0)
    start = np.where(has.any(axis=0, keepdims=True), 1 - first, 1.0)
    return np.where(before >= 0, held, start).astype(commands.dtype)


def euler(quaternions: np.ndarray) -> np.ndarray:
    """Quaternions (x, y, z, w) float[T, 4] of any length but zero -> roll, pitch, yaw float[T, 3] in radians.

    Angles about the fixed axes x, y, z in this order, so R = Rz(yaw) Ry(pitch) Rx(roll).
    """
    x, y, z, w = (quaternions / np.maximum(np.linalg.norm(quaternions, axis=-1, keepdims=True), 1e-12)).T
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = np.arcsin(np.clip(2 * (w * y - z * x), -1, 1))
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return np.stack([roll, pitch, yaw], axis=-1).astype(quaternions.dtype)


def axis_angle(vectors: np.ndarray) -> np.ndarray:
    """Rotation vectors float[T, 3] (the axis, as long as the angle in radians) -> roll, pitch, yaw float[T, 3], as
    `euler` gives them."""
    return rotations.to_euler(rotations.from_axis_angle(vectors.astype(np.float64))).astype(vectors.dtype)


FUNCTIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "invert": lambda x: 1 - x,
    "clip": lambda x: np.clip(x, 0, 1),
    "binarize": binarize,
    "from_relative": from_relative,
    "change": lambda x: x[1:] - x[:-1],
    "radians": np.radians,
    "euler": euler,
    "axis_angle": axis_angle,
    "from_range": lambda x, low, high: (x - low) / (high - low),
    "positive": lambda x: (x > 0).astype(x.dtype),
}

_WIDTHS = {"euler": (4, 3), "axis_angle": (3, 3)}
"""Columns that a function takes and gives, where it does not take any number."""
_CALL = re.compile(r"([a-z_]+)\((.*)\)")
_FIELD = re.compile(r"([^\[\]()]+?)(?:\[(-?\d*)(:?)(-?\d*)\])?")


def _bounds(text: str, name: str, written: list[str]) -> tuple[float, ...]:
    """The numbers that follow x in a call. Raises ValueError."""
    if name != "from_range":
        return ()
    try:
        low, high = map(float, written)
        if math.isfinite(low) and math.isfinite(high) and low != high:
            return low, high
    except ValueError:
        pass
    raise ValueError(f"expression {text!r}: expected from_range(x, low, high) with two different numbers.")


class Expression:
    """A parsed expression.

    field: the field of `steps` it reads, without that prefix; "" for constants.
    source: the field with its columns, such as "action[6]", without functions; "" for constants.
    Raises ValueError, on construction, naming the text and what is allowed.
    """

    def __init__(self, text: str):
        self.text, self.field, self.source = text, "", ""
        self._functions: list[tuple[str, tuple[float, ...]]] = []  # and what follows x
        self._constant: tuple[float, int] | None = None
        self._columns: int | slice = slice(None)
        rest = text.strip()
        while call := _CALL.fullmatch(rest):
            name, rest = call[1], call[2].strip()
            if name in ("zeros", "ones") and rest.isdigit():
                self._constant = (float(name == "ones"), int(rest))
                return
            if name not in FUNCTIONS:
                raise ValueError(
                    f"expression {text!r}: no function {name!r}; there are {sorted(FUNCTIONS)}, zeros(n) and ones(n)."
                )
            bounds: list[str] = []
            if name == "from_range":
                rest, *bounds = rest.rsplit(",", 2)
            self._functions.append((name, _bounds(text, name, bounds)))
        field = _FIELD.fullmatch(rest)
        if not field:
            raise ValueError(f"expression {text!r}: {rest!r} is no field such as 'action', 'action[6]', 'action[:6]'.")
        self.field, self.source = field[1], rest
        first, colon, last = field[2], field[3], field[4]
        if colon:
            self._columns = slice(int(first) if first else None, int(last) if last else None)
        elif first:
            self._columns = int(first)
        elif rest.endswith("]"):
            raise ValueError(f"expression {text!r}: the brackets name no column.")

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the functions applied to the field, outermost first."""
        return tuple(name for name, _ in self._functions)

    def width(self, size: int) -> int:
        """Columns of the result when the field has `size` numbers per step. Raises ValueError when it has too few."""
        if self._constant:
            return self._constant[1]
        if isinstance(self._columns, int):
            if not -size <= self._columns < size:
                raise ValueError(f"{self.text!r} needs more than the {size} numbers of {self.field}")
            width = 1
        else:
            bounds = [abs(bound) for bound in (self._columns.start, self._columns.stop) if bound is not None]
            if max(bounds, default=0) > size:
                raise ValueError(f"{self.text!r} needs {max(bounds)} numbers, {self.field} has {size}")
            width = len(range(size)[self._columns])
        for name in reversed(self.functions):
            takes, gives = _WIDTHS.get(name, (width, width))
            if width != takes:
                raise ValueError(f"{self.text!r} needs {takes} columns, it has {width}")
            width = gives
        return width

    def __call__(self, columns: Mapping[str, np.ndarray], num_steps: int) -> np.ndarray:
        """float32[T, width] of one episode; `change` makes it shorter.

        Args:
          columns: field -> [T, ...] as recorded.
        """
        if self._constant:
            value, width = self._constant
            return np.full((num_steps, width), value, np.float32)
        values = columns[self.field].reshape(num_steps, -1).astype(np.float32)
        chosen = self._columns
        if isinstance(chosen, int):
            chosen = chosen % values.shape[1]
            chosen = slice(chosen, chosen + 1)
        values = values[:, chosen]
        for name, bounds in reversed(self._functions):
            values = FUNCTIONS[name](values, *bounds)
        return values
