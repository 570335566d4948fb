"""Limits on speed, acceleration, jerk and place that hold at every step, whatever is asked for.

The filter never sends a velocity that it does not know how to stop from. It keeps a *stopping plan*: the velocities of
the coming ticks, down to rest, whose speeds, accelerations, jerks and positions were all checked. A request becomes
a new plan (the requested velocity, then a smooth stop). What is sent belongs to a mix of both plans,

    plan = share * (request, then its stop) + (1 - share) * (what is left of the old plan),

with the largest share for which every limit holds at every tick until rest. A share of 0 is the old plan, which was
checked already: so there is always something allowed to send, and it ends at rest within all limits. Limits on speed,
acceleration and jerk hold for a mix of two plans that keep them; that they hold is checked all the same.

All arrays have a leading axis B of independent robots. NumPy only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Outside = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Positions float[M, N, D] after each tick and velocities float[M, N, D] of plans, and whose they are, int[M] ->
bool[M], whether the plan goes where it must not."""

WHOLE = ((1.0, 1.0), (1.0, 1.6))
PARTS = ((0.8, 1.6), (0.5, 1.6), (0.25, 1.3), (0.1, 1.3), (0.03, 1.0))
"""What is tried in turn, before the rest of the old plan: a share of the request, and how much longer than the shortest
possible its stop takes. A longer stop is smoother, so it leaves more room to accelerate; a shorter one to come near."""

ROUNDING = 1e-9
"""Limits are compared with this relative slack, so that a plan at its limits is not refused for rounding."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Columns that are limited together, by the length of their vector.

    columns: neighbouring columns. speed, acceleration, jerk: per s, s^2, s^3, in the unit of the columns' positions.
    """

    name: str
    columns: tuple[int, ...]
    speed: float
    acceleration: float
    jerk: float

    def __post_init__(self):
        for field in ("speed", "acceleration", "jerk"):
            value = getattr(self, field)
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"limits of {self.name}: {field}={value} must be a finite number above 0.")


@dataclasses.dataclass(frozen=True)
class Filtered:
    """What a tick came to.

    velocity: float[B, D], to send. within: float[B, D], the request after this tick's speed, acceleration and jerk were
      limited. share: float[B], how much of that is in the plan that is followed now; 0: none, the robot brakes.
    bound, blocked: bool[B], whether bounds of positions, or obstacles, refused what was tried first.
    """

    velocity: np.ndarray
    within: np.ndarray
    share: np.ndarray
    bound: np.ndarray
    blocked: np.ndarray


@dataclasses.dataclass(frozen=True)
class Stops:
    """Smooth stops of every length up to N ticks, for a group.

    speed_part, change_part: float[N + 1, N]; row n is the stop that rests from tick n on: the velocities of its ticks
      are speed_part[n] * v + change_part[n] * (v - the velocity before).
    capacity: float[N + 1], the largest speed that row n stops from, without exceeding acceleration and jerk.
    """

    speed_part: np.ndarray
    change_part: np.ndarray
    capacity: np.ndarray


@functools.lru_cache(maxsize=32)
def stops(speed: float, acceleration: float, jerk: float, period_s: float) -> Stops:
    """Stops with the least sum of squared jerks, long enough for the group's speed. Raises ValueError where limits need
    stops of more than 200 ticks."""
    seconds = max(1.6 * speed / acceleration, 2.6 * (speed / jerk) ** 0.5) + 3 * period_s
    length = int(np.ceil(seconds / period_s))
    if length > 200:
        raise ValueError(
            f"stopping from {speed:g}/s with at most {acceleration:g}/s^2 and {jerk:g}/s^3 takes {seconds:.1f} s, "
            f"{length} ticks of {period_s:g} s; at most 200 are planned. Allow less speed or more deceleration."
        )
    rows = [_stop(n, length) for n in range(length + 1)]
    speed_part, change_part = (np.stack(parts) for parts in zip(*rows))
    # of a robot that moved at a constant speed before
    padded = np.pad(speed_part, ((0, 0), (2, 2)), constant_values=((0, 0), (1, 0)))
    changes = np.diff(padded, axis=1)
    decelerations = np.abs(changes).max(axis=1) / period_s
    jerks = np.abs(np.diff(changes, axis=1)).max(axis=1) / period_s**2
    with np.errstate(divide="ignore"):
        capacity = np.minimum(acceleration / decelerations, jerk / jerks)
    capacity[0] = 0
    return Stops(speed_part, change_part, np.maximum.accumulate(capacity))


def _stop(rest: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """float[length] twice: the velocities of a stop that begins with v at tick 0 and rests from tick `rest` on, as
    multiples of v and of the last change of v."""
    parts = np.zeros((2, length))
    parts[0, 0] = float(rest > 0)
    if rest > 1:
        free = rest - 1
        # second differences of (v_-1, v_0, free..., 0, 0)
        matrix = np.zeros((rest + 1, rest + 3))
        for row in range(rest + 1):
            matrix[row, row : row + 3] = 1, -2, 1
        known = np.zeros((2, rest + 3))
        known[0, :2] = 1, 1
        known[1, 0] = -1
        inner = matrix[:, 2 : 2 + free]
        solution = np.linalg.solve(inner.T @ inner, -inner.T @ matrix @ known.T)
        parts[:, 1:rest] = solution.T
    return parts[0], parts[1]


class MotionFilter:
    """Filters velocities of B robots, tick by tick.

    groups: limits; together they hold the columns 0 ... D - 1, in order.
    low, high: float[D], bounds of positions, infinite where there are none; or None.
    outside: a further check of plans, for obstacles.
    path: velocities float[M, N, D], positions float[M, D] -> positions after each tick, float[M, N, D]; None: sums.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        period_s: float,
        *,
        robots: int = 1,
        low: np.ndarray | None = None,
        high: np.ndarray | None = None,
        outside: Outside | None = None,
        path: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ):
        if not (np.isfinite(period_s) and period_s > 0):
            raise ValueError(f"period_s={period_s} must be a finite number above 0.")
        order = [column for group in groups for column in group.columns]
        columns = len(order)
        if order != list(range(columns)) or not columns:
            raise ValueError(f"groups limit columns {order}; expected neighbouring columns from 0 on, each once.")
        self.groups, self.period_s, self.robots = tuple(groups), period_s, robots
        self._starts = np.cumsum([0, *(len(group.columns) for group in groups)])[:-1]
        self._of_group = np.repeat(np.arange(len(groups)), [len(group.columns) for group in groups])
        tables = [stops(g.speed, g.acceleration, g.jerk, period_s) for g in groups]
        self._longest = np.array([len(x.capacity) - 1 for x in tables])
        self.length = int(self._longest.max())
        # All groups' tables as one, so that a stop of all of them is a few calls of NumPy. float[groups, N + 1, N]
        self._speed_parts, self._change_parts = (
            np.stack([_padded(getattr(x, name), (self.length + 1, self.length), 0.0) for x in tables])
            for name in ("speed_part", "change_part")
        )
        self._capacities = np.stack([_padded(x.capacity, (self.length + 1,), np.inf) for x in tables])
        self._ramps = np.array([g.jerk * period_s**2 for g in groups])
        # as changes from tick to tick
        powers = {"speed": 0, "acceleration": 1, "jerk": 2}
        self._squares = {
            name: np.array([(getattr(g, name) * period_s**power) ** 2 for g in groups]) * (1 + ROUNDING)
            for name, power in powers.items()
        }
        self._square_limits = np.stack([self._squares[name] for name in powers])[:, None, None]
        self._low = np.full(columns, -np.inf) if low is None else np.asarray(low, np.float64)
        self._high = np.full(columns, np.inf) if high is None else np.asarray(high, np.float64)
        self._bounded = bool(np.isfinite(self._low).any() or np.isfinite(self._high).any())
        self._outside, self._path = outside, path or self._sums
        self.velocity = np.zeros((robots, columns))
        """float[B, D]: what was sent last, per second."""
        self.change = np.zeros((robots, columns))
        """float[B, D]: by how much it differed from what was sent before."""
        self.plan = np.zeros((robots, self.length, columns))
        """float[B, N, D]: velocities of the coming ticks if nothing is asked for; then rest."""

    def _sums(self, velocities: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return positions[:, None] + velocities.cumsum(axis=1) * self.period_s

    def step(
        self, positions: np.ndarray, wanted: np.ndarray, otherwise: Callable[[], np.ndarray] | None = None
    ) -> Filtered:
        """One tick.

        Args:
          positions: float[B, D], where the robots are (columns without bounds may hold anything finite).
          wanted: float[B, D], finite velocities.
          otherwise: float[B, D], what is asked for, in whole or in part, where `wanted` cannot be; called only then.
            None: the same.
        """
        within = self._within_one_step(wanted)
        plan, share = self.plan, np.zeros(self.robots)
        bound, blocked = np.zeros((2, self.robots), bool)
        rows = np.arange(self.robots)
        for request, part, stretch in self._attempts(within, otherwise):
            mixed = self._with_stop(request, rows, stretch)
            if part != 1:
                mixed = part * mixed + (1 - part) * self.plan[rows]
            good = self._moves_well(mixed, rows)
            if self._bounded or self._outside is not None:
                tried, plans = (rows, mixed) if good.all() else (rows[good], mixed[good])
                within_bounds, clear = self._stays(plans, positions[self._all_or(tried)], tried)
                if not (within_bounds.all() and clear.all()):
                    bound[tried[~within_bounds]] = True
                    blocked[tried[~clear]] = True
                    good[good] = within_bounds & clear
            if len(rows) == self.robots and good.all():  # as almost always: nothing has to be picked out
                plan, share[:] = mixed, part
                break
            plan = plan.copy()
            plan[rows[good]], share[rows[good]] = mixed[good], part
            rows = rows[~good]
            if not len(rows):
                break
        self.plan = plan
        return Filtered(self._send(), within, share, bound, blocked)

    def _all_or(self, rows: np.ndarray) -> np.ndarray | slice:
        """To index robots with: of all of them, what is indexed is not copied."""
        return slice(None) if len(rows) == self.robots else rows

    def _attempts(
        self, within: np.ndarray, otherwise: Callable[[], np.ndarray] | None
    ) -> Iterator[tuple[np.ndarray, float, float]]:
        """Requests float[B, D], shares and stretches, in the order in which they are tried."""
        yield from ((within, *attempt) for attempt in WHOLE)
        if otherwise is not None:
            within = self._within_one_step(otherwise())
            yield from ((within, *attempt) for attempt in WHOLE)
        yield from ((within, *attempt) for attempt in PARTS)

    def brake(self) -> np.ndarray:
        """float[B, D]: the next velocities of the stopping plans."""
        return self._send()

    def rest(self) -> None:
        """The robots stand, whatever was planned."""
        self.velocity[:], self.change[:], self.plan[:] = 0, 0, 0

    @property
    def at_rest(self) -> np.ndarray:
        """bool[B]; a tick after the last motion, so that what follows may be followed within the limit of jerk."""
        moves = self.velocity.any(axis=-1)
        return ~moves if moves.all() else ~(moves | self.change.any(axis=-1) | self.plan.any(axis=(1, 2)))

    def _send(self) -> np.ndarray:
        sent = self.plan[:, 0].copy()
        self.change, self.velocity = sent - self.velocity, sent
        coming = np.zeros_like(self.plan)
        coming[:, :-1] = self.plan[:, 1:]
        self.plan = coming
        return sent.copy()

    def _within_one_step(self, wanted: np.ndarray) -> np.ndarray:
        """The velocity nearest in direction that keeps speed, then acceleration, then jerk at this very tick. What is
        within them already comes back bit for bit."""
        x = wanted
        for name, base in (("speed", 0), ("acceleration", self.velocity), ("jerk", self.velocity + self.change)):
            gap, limits = x - base, self._squares[name]
            squares = self._lengths(gap)
            over = squares > limits
            if over.any():
                with np.errstate(divide="ignore", invalid="ignore"):  # of those that are not over
                    scale = np.sqrt(limits / squares) * (1 - ROUNDING)
                    scaled = base + gap * scale[..., self._of_group]
                x = np.where(over[..., self._of_group], scaled, x)
        return x

    def _lengths(self, x: np.ndarray) -> np.ndarray:
        """Squared lengths of the groups' vectors: float[..., D] -> float[..., groups]."""
        return np.add.reduceat(np.square(x), self._starts, axis=-1)

    def _with_stop(self, wanted: np.ndarray, rows: np.ndarray, stretch: float) -> np.ndarray:
        """float[M, N, D]: the velocity, then a smooth stop."""
        chosen = self._all_or(rows)
        velocity = wanted[chosen]
        change = velocity - self.velocity[chosen]
        speeds, changes = np.sqrt(self._lengths(np.stack([velocity, change])))  # [M, groups]
        # an acceleration has to be taken back before the stop begins, which adds speed and takes time
        ramp = changes / self._ramps
        effective = speeds + 0.5 * changes * ramp
        # the first row of its group's table whose capacity is not below
        rest = (self._capacities < effective[..., None]).sum(axis=-1) + np.ceil(ramp)
        rest = np.minimum(np.ceil(rest * stretch).astype(int), self._longest)[:, self._of_group]
        parts = self._speed_parts[self._of_group, rest], self._change_parts[self._of_group, rest]  # [M, D, N]
        asked = (parts[0] * velocity[..., None] + parts[1] * change[..., None]).swapaxes(1, 2)
        asked[:, 0] = velocity  # exactly
        return asked

    def _moves_well(self, plans: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """bool[M]: speed, acceleration and jerk are within limits at every tick until rest."""
        size, length, columns = plans.shape
        velocities, changes = np.zeros((2, size, length + 3, columns))  # two ticks of rest behind the plan
        chosen = self._all_or(rows)
        velocities[:, 0], velocities[:, 1:-2], changes[:, 0] = self.velocity[chosen], plans, self.change[chosen]
        np.subtract(velocities[:, 1:], velocities[:, :-1], out=changes[:, 1:])
        found = np.empty((3, size, length + 2, columns))
        found[0], found[1] = velocities[:, 1:], changes[:, 1:]
        np.subtract(changes[:, 1:], changes[:, :-1], out=found[2])
        return (self._lengths(found) <= self._square_limits).all(axis=(0, 2, 3))

    def _stays(self, plans: np.ndarray, positions: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool[M] twice: the plan stays within bounds; it keeps clear of obstacles."""
        path = self._path(plans, positions)
        # who is outside already may come back, and goes no further
        low, high = np.minimum(self._low, positions)[:, None], np.maximum(self._high, positions)[:, None]
        within = ((path >= low) & (path <= high)).all(axis=(1, 2))
        clear = np.ones(len(rows), bool)
        if self._outside is not None and len(rows):
            clear = ~self._outside(path, plans, rows)
        return within, clear


def _padded(table: np.ndarray, shape: tuple[int, ...], value: float) -> np.ndarray:
    """float[shape]: the table, with `value` behind its ends."""
    padded = np.full(shape, value)
    padded[tuple(slice(size) for size in table.shape)] = table
    return padded


def slowed_near_bounds(
    velocity: np.ndarray, positions: np.ndarray, low: np.ndarray, high: np.ndarray, groups: Sequence[Group]
) -> np.ndarray:
    """A request, float[D], whose every column comes to its bounds gently and leaves the other columns as they are: at a
    wall, only what goes into it is taken away."""
    speeds = []
    for group in groups:
        columns = slice(group.columns[0], group.columns[-1] + 1)
        gentle, ramp_s = group.acceleration / 2, 3 * group.acceleration / group.jerk + 0.05
        for room in (positions - low, high - positions):
            room = np.maximum(room[columns], 0)
            speeds.append(np.minimum(np.sqrt(2 * gentle * room), room / ramp_s))
    down, up = np.concatenate(speeds[::2]), np.concatenate(speeds[1::2])
    return np.clip(velocity, -down, up)
