"""The last word before the robot: every action is checked, limited or replaced by a stop, and what was changed is said.

    layer = SafetyLayer(robot_spec, Limits(...), period_s=0.02)
    decision = layer.check(action, Measured(position=...))      # once per control tick
    robot.send(decision.action)

It knows nothing of the policy, needs NumPy only and belongs into the robot's process. What it promises holds for what
is *sent*, as far as the robot follows it and positions and obstacles are as they were told. It is a software protective
stop in an uncertified process: it has no performance level, and it is no emergency stop. docs/serving.md says what that
means.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import numpy as np

from robovlms_jax.control.robot import RobotSpec
from robovlms_jax.deploy import geometry, mobile, motion, signals
from robovlms_jax.deploy.latch import Latch
from robovlms_jax.deploy.limits import Limits, is_number, layout
from robovlms_jax.deploy.signals import Decision, Event, Measured

GRIPPER_SLACK = 0.01
"""Share of a gripper's range by which its measured command may be outside, for rounding; more is another unit."""


class SafetyLayer:
    """Safety of one robot. Calls come from one thread.

    Args:
      spec: the robot; every action dimension's unit and kind must be known.
      tool: of an arm, capsules around its tool, relative to `position`; of a base, around its centre.
      latch_file: where a stop is kept over restarts; None: nowhere.
    Raises:
      ValueError: something of the robot cannot be limited.
    """

    def __init__(
        self,
        spec: RobotSpec,
        limits: Limits,
        period_s: float | None = None,
        *,
        tool: tuple[geometry.Capsule, ...] = (),
        latch_file: str | pathlib.Path | None = None,
    ):
        if period_s is None and not spec.rate_hz:
            raise ValueError(f"robot {spec.name!r} has no rate; give period_s, the time between two actions.")
        self.spec, self.limits = spec, limits
        self.period_s = 1 / spec.rate_hz if period_s is None else period_s
        self.latch = Latch(latch_file)
        self._layout = layout(spec, limits)
        self._tool = tuple(tool) or (geometry.ball("tool", (0.0, 0.0, 0.0), 0.0),)
        self._filter = motion.MotionFilter(
            self._layout.groups,
            self.period_s,
            low=self._layout.low,
            high=self._layout.high,
            outside=self._outside,
            path=self._base_path if self._layout.base else None,
        )
        self._tick, self._missing = 0, 0
        self._scene = self._body = geometry.Scene(())
        self._target: np.ndarray | None = None
        """float[D]: where the robot was sent; of a base, where it was measured."""
        self._measured: np.ndarray | None = None
        """float[D]: where it was measured last."""
        self._grippers = np.array([np.nan] * len(self._layout.grippers))
        self._gripper_bounds = (
            np.array([(spec.action[i].low, spec.action[i].high) for i in self._layout.grippers], np.float64)
            .reshape(-1, 2)
            .T
        )
        """float[2, G]: lowest and highest commands."""
        self._cause = ""
        self._order = np.array(self._layout.order)
        self._absolute, self._delta = (
            np.array([x == kind for x in self._layout.kinds]) for kind in ("absolute", "delta")
        )
        self._needed = {near: self._needed_positions(*near) for near in itertools.product((False, True), repeat=2)}

    def check(self, action: Any, measured: Measured, action_age_s: float = 0.0) -> Decision:
        """One tick: what to send instead of `action`, float[A] in the units of the robot's description."""
        self._tick += 1
        events: list[Event] = []
        usable = self._observe(measured)
        wanted = self._read(action)
        if isinstance(wanted, str):
            self.latch.trip(wanted)
        elif not (is_number(action_age_s) and 0 <= action_age_s <= self.limits.action_age_s):  # NaN is refused, too
            return self._miss(f"stale_action: {action_age_s} s old, at most {self.limits.action_age_s:g} s")
        self._missing = 0
        if self.latch.state != "run" or not usable:
            return self._stopped(events)
        numbers, asked = wanted
        if np.isnan(self._grippers).any():  # from now on the arm may move, and its grippers are told something
            events += self._grip(numbers, measured)
        velocity = self._joints_together(np.minimum(np.maximum(asked, -1e6), 1e6))
        result = self._filter.step(self._target[None], velocity[None], lambda: self._gentle(velocity)[None])
        if result.blocked[0] and self.limits.on_collision_risk == "stop":
            self.latch.trip("collision_risk: the request would bring the robot nearer to an obstacle than allowed")
            events.append(self._event("collision", self.latch.reason, velocity, result.velocity[0]))
            return self._finish(result.velocity[0], events)
        as_asked = bool((result.velocity[0] == asked).all())
        if not as_asked:
            stage, reason = _what_limited(result, asked)
            events.append(self._event(stage, reason, asked, result.velocity[0]))
        events += self._grip(numbers, measured)
        return self._finish(result.velocity[0], events, numbers if as_asked else None)

    def missing(self, measured: Measured, reason: str = "no action arrived") -> Decision:
        """One tick without an action: the robot is braked, and after `missing_ticks` in a row the stop is latched."""
        self._tick += 1
        self._observe(measured)
        return self._miss(f"missing_action: {reason}")

    def brake(self, measured: Measured) -> Decision:
        """One tick of coming to rest, when nothing is asked for and nothing is missing."""
        self._tick += 1
        self._observe(measured)
        return self._stopped([])

    def brake_blind(self) -> Decision:
        """As `brake`, where nothing is known of where the robot is."""
        self._tick += 1
        return self._stopped([])

    def stop(self, reason: str) -> None:
        """Latch a stop; the next ticks brake."""
        self.latch.trip(reason)

    def reset(self, operator: str) -> None:
        """A person lifts the stop (see `Latch.reset`); then `start`. Refused while what was measured last would trip it
        again."""
        self.latch.reset(operator, self._cause)
        self._begin_where_it_is()

    def start(self, operator: str) -> None:
        """The robot may move again, from where it was measured last: it may have been moved, or have sunk."""
        self.latch.start(operator)
        self._begin_where_it_is()

    def _begin_where_it_is(self) -> None:
        self._filter.rest()
        self._missing = 0
        if self._measured is not None and self._target is not None:
            self._target = np.where(np.isfinite(self._measured), self._measured, self._target)

    @property
    def at_rest(self) -> bool:
        """The last action stands still, and nothing else is planned."""
        return bool(self._filter.at_rest[0])

    def _observe(self, measured: Measured) -> bool:
        """Whether there is a position to work with. Trips the latch where the measurement itself says so."""
        self._cause = self._wrong_measurement(measured)
        if self._cause:
            self.latch.trip(self._cause)
            return False
        self._measured = position = np.asarray(measured.position, np.float64)
        if measured.grippers is not None:
            found = np.asarray(measured.grippers, np.float64)
            told = np.isfinite(self._grippers)
            self._grippers = np.where(told, self._grippers, np.clip(found, *self._gripper_bounds))
        if self._target is None or self._layout.base:
            self._target = np.where(np.isfinite(position), position, 0.0)
        self._scene = self._scene.of(measured.obstacles)
        self._body = self._body.of(measured.body)
        lag = self._does_not_follow(position)
        if lag and self.latch.state != "ready":
            # frozen here once: to go on to a target that a blocked arm did not reach would be a leap when it comes free
            self._target = np.where(np.isfinite(position), position, self._target)
            self._filter.rest()
        self._cause = self._too_near(position) or (lag if self.latch.state == "run" else "")
        if self._cause:
            self.latch.trip(self._cause)
        return True

    def _wrong_measurement(self, measured: Measured) -> str:
        wrong = signals.wrong_types(measured, len(self._layout.grippers))
        if wrong:
            return f"wrong_measurement: {wrong}"
        size = len(self._layout.order)
        try:
            position = np.asarray(measured.position, np.float64)
        except (TypeError, ValueError):
            return f"wrong_measurement: position is a {type(measured.position).__name__}, no array of numbers"
        if position.shape != (size,):
            return f"wrong_measurement: position has shape {list(position.shape)}, expected [{size}]"
        needed = self._needed[bool(measured.obstacles), bool(measured.body)]
        if (measured.obstacles or measured.body) and not self._layout.base and not self._layout.tools:
            return (
                "wrong_measurement: obstacles were given, but this robot is commanded by joints, and where its tool is "
                "the layer does not know"
            )
        if np.isinf(position).any() or not np.isfinite(position[needed]).all():
            return "not_finite: the measured position is not"
        if not 0 <= measured.age_s <= self.limits.observation_age_s:
            return f"stale_observation: {measured.age_s:g} s old, at most {self.limits.observation_age_s:g} s"
        if not np.isfinite(measured.gripper_force_n):
            return "not_finite: the measured gripper force is not"
        return "" if measured.grippers is None else self._wrong_grippers(np.asarray(measured.grippers, np.float64))

    def _wrong_grippers(self, found: np.ndarray) -> str:
        """What is wrong with the measured commands of grippers that were told nothing yet, for they are sent on."""
        if np.isinf(found).any():
            return "not_finite: the measured grippers are not"
        low, high = self._gripper_bounds
        far = np.maximum(low - found, found - high) > GRIPPER_SLACK * (high - low)
        for i in np.flatnonzero(far & ~np.isfinite(self._grippers)):
            name = self.spec.action[self._layout.grippers[i]].name
            return (
                f"wrong_measurement: gripper {name!r} is at {found[i]:g}, outside its bounds {low[i]:g} ... {high[i]:g}"
            )
        return ""

    def _needed_positions(self, obstacles: bool, body: bool) -> np.ndarray:
        """bool[D]: which measured positions must be known where there are obstacles, or the robot's own body."""
        needed = np.isfinite(self._layout.low) | np.isfinite(self._layout.high)
        needed |= np.array([kind == "absolute" for kind in self._layout.kinds])
        if self._layout.base:
            needed[:] = needed.any() or obstacles
        for tool in self._layout.tools:
            needed[list(tool)] |= obstacles or body
        return needed

    def _too_near(self, position: np.ndarray) -> str:
        for place in self._places(position[None, None]):
            for scene, least in self._kept_from():
                clear = scene.clearance(place[0, 0], self._tool)
                if clear.min() < least - 1e-6:
                    name = scene.names[int(clear.argmin())]
                    return f"collision_risk: {clear.min():.3f} m from {name!r}, at least {least:g} m are kept"
        return ""

    def _does_not_follow(self, position: np.ndarray) -> str:
        for tool in self._layout.tools:
            away = self._target[tool[0] : tool[-1] + 1] - position[tool[0] : tool[-1] + 1]
            error = np.sqrt(away.dot(away))
            if error > self.limits.following_error_m:
                return f"following_error: the tool is {error:.3f} m from where it was sent; is the arm blocked?"
        for column, kind in enumerate(self._layout.kinds):
            if kind == "absolute" and not any(column in tool for tool in self._layout.tools):
                error = position[column] - self._target[column]
                if self._layout.angles[column]:
                    error = (error + np.pi) % (2 * np.pi) - np.pi
                if abs(error) > self.limits.following_error_rad:
                    name = self.spec.action[self._layout.order[column]].name
                    return f"following_error: {name} is {error:.3f} rad from where it was sent; is the arm blocked?"
        return ""

    def _read(self, action: Any) -> tuple[np.ndarray, np.ndarray] | str:
        """The action's numbers float[A] and the velocities float[D] that they ask for; or what is wrong with it."""
        size = len(self.spec.action)
        if not isinstance(action, np.ndarray | list | tuple):
            return f"wrong_shape: the action is a {type(action).__name__}, expected {size} numbers"
        try:
            numbers = np.array(action)
        except ValueError:  # ragged
            return f"wrong_shape: the action is no array, expected {size} numbers"
        if numbers.shape != (size,) or numbers.dtype.kind not in "fiu":
            return f"wrong_shape: the action is {numbers.dtype}{list(numbers.shape)}, expected {size} numbers"
        numbers = numbers.astype(np.float64)
        if not np.isfinite(numbers).all():
            return "not_finite: the action is not"
        if self._target is None:
            return numbers, np.zeros(len(self._layout.order))
        moving = numbers[self._order] * self._layout.scale
        change = np.where(self._absolute, moving - self._target, moving)
        turns = self._absolute & self._layout.angles
        if turns.any():
            change[turns] = (change[turns] + np.pi) % (2 * np.pi) - np.pi
        with np.errstate(over="ignore"):  # 1e308 m are infinitely far
            velocity = np.where(self._absolute | self._delta, change / self.period_s, moving)
        return numbers, velocity

    def _joints_together(self, velocity: np.ndarray) -> np.ndarray:
        """All joints slowed by the worst ratio, so that the arm keeps its path."""
        joints = [group for group in self._layout.groups if group.name.startswith("joint ")]
        if joints:
            columns = [group.columns[0] for group in joints]
            worst = max(abs(velocity[group.columns[0]]) / group.speed for group in joints)
            velocity[columns] /= max(worst, 1.0)
        return velocity

    def _gentle(self, velocity: np.ndarray) -> np.ndarray:
        """The request with what goes into a bound taken away, as far as the bound is near."""
        low, high, groups = self._layout.low, self._layout.high, self._layout.groups
        if not self._layout.base:
            return motion.slowed_near_bounds(velocity, self._target, low, high, groups)
        heading = self._target[2]
        to_world = np.array([[np.cos(heading), -np.sin(heading), 0], [np.sin(heading), np.cos(heading), 0], [0, 0, 1]])
        return motion.slowed_near_bounds(to_world @ velocity, self._target, low, high, groups) @ to_world

    def _grip(self, numbers: np.ndarray, measured: Measured) -> list[Event]:
        """Takes over the grippers' commands, within their bounds; none that closes further on too much force."""
        events = []
        for i, column in enumerate(self._layout.grippers):
            dimension, before = self.spec.action[column], numbers[column]
            after = float(min(max(before, dimension.low), dimension.high))
            last = self._grippers[i]
            if measured.gripper_force_n > self.limits.gripper_force_n and np.isfinite(last):
                opens = {"high": after > last, "low": after < last, "": False}[dimension.open_at]
                after = after if opens else last
            if after != before:
                forced = measured.gripper_force_n > self.limits.gripper_force_n
                reason = "gripper_force: it may only open" if forced else f"{dimension.name} is outside its bounds"
                events.append(Event(self._tick, "gripper", reason, (float(before),), (float(after),)))
            self._grippers[i] = after
        return events

    def _miss(self, reason: str) -> Decision:
        self._missing += self.latch.state == "run"  # who has reset a stop needs time to start the robot
        events = [Event(self._tick, "watchdog", reason)]
        if self._missing >= self.limits.missing_ticks:
            self.latch.trip(f"{reason}, {self._missing} ticks in a row")
        return self._stopped(events)

    def _stopped(self, events: list[Event]) -> Decision:
        """The next velocity of the plan that ends at rest."""
        if self.latch.state not in ("run", "ready") and self.limits.category == 0:
            self._filter.rest()
        return self._finish(self._filter.brake()[0], events)

    def _finish(self, velocity: np.ndarray, events: list[Event], asked: np.ndarray | None = None) -> Decision:
        """asked: float[A], the action where the layer leaves it as it is."""
        if self.latch.state == "stopping" and self.at_rest:
            self.latch.at_rest()
        if self._target is not None and not self._layout.base:
            self._target = self._target + velocity * self.period_s
        latched = self.latch.state in ("stopping", "hold")
        stop = None
        if self.latch.state != "run":
            reason = self.latch.reason if latched else f"waits for start, after: {self.latch.reason}"
            safe = self._action(np.zeros(len(self._layout.order)))
            stop = {"action": "STOP", "reason": reason, "safe_action": safe}
            events.append(Event(self._tick, "latch", reason))
        power = latched and (self.limits.category == 0 or (self.limits.category == 1 and self.latch.state == "hold"))
        action = self._action(velocity)
        if asked is not None:  # bit for bit, but for angles, which may have been given with turns too many
            columns = [c for c, angle in zip(self._layout.order, self._layout.angles) if not angle]
            action[columns] = asked[columns]
        return Decision(action, tuple(events), self.latch.state, stop, power)

    def _action(self, velocity: np.ndarray) -> np.ndarray:
        """float[A] of a velocity float[D] that has just been taken over into the target."""
        action = np.zeros(len(self.spec.action))
        target = np.zeros_like(velocity) if self._target is None else self._target
        value = np.where(self._delta, velocity * self.period_s, velocity)
        action[self._order] = np.where(self._absolute, target, value) / self._layout.scale
        action[list(self._layout.grippers)] = self._grippers
        return action

    def _event(self, stage: str, reason: str, before: np.ndarray, after: np.ndarray) -> Event:
        return Event(self._tick, stage, reason, tuple(before.tolist()), tuple(after.tolist()))

    def _places(self, path: np.ndarray) -> list[np.ndarray]:
        """float[M, N, D] -> where each tool is, or the base, float[M, N, 3]."""
        if self._layout.base:
            return [np.concatenate([path[..., :2], np.zeros_like(path[..., :1])], axis=-1)]
        return [path[..., tool[0] : tool[-1] + 1] for tool in self._layout.tools]

    def _outside(self, path: np.ndarray, plans: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """bool[M]: nearer to an obstacle than allowed, and nearer than the robot is now."""
        bad = np.zeros(len(path), bool)
        for place, here in zip(self._places(path), self._places(self._target[None, None])):
            whole = np.empty((len(place), place.shape[1] + 1, 3))
            whole[:, :1], whole[:, 1:] = here, place
            steps = whole[:, 1:] - whole[:, :-1]
            # between two ticks it may be half a step nearer
            halves = np.sqrt(np.einsum("mnd,mnd->mn", steps, steps))[..., None] / 2
            for scene, least in self._kept_from():
                clear = scene.clearance(whole, self._tool)
                bad |= (clear[:, 1:] - halves < np.minimum(least, clear[:, :1])).any(axis=(1, 2))
        return bad

    def _kept_from(self) -> list[tuple[geometry.Scene, float]]:
        """What the tool keeps away from, and how far, in m."""
        pairs = ((self._scene, self.limits.clearance_m), (self._body, self.limits.self_clearance_m))
        return [(scene, least) for scene, least in pairs if scene.names]

    def _base_path(self, velocities: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """A base's x, y and heading: velocities are along its own axes, which turn."""
        return mobile.base_path(velocities, positions, self.period_s)


def _what_limited(result: motion.Filtered, velocity: np.ndarray) -> tuple[str, str]:
    """Stage and reason of a change."""
    if result.bound[0]:
        return "workspace", "the request, and a stop after it, would leave the workspace or pass a joint's limit"
    if result.blocked[0]:
        return "collision", "the request, and a stop after it, would come too near to an obstacle"
    if not (result.within[0] == velocity).all():  # the motion's own limits
        return "speed", "speed, acceleration or jerk above its limit"
    return "speed", "no stop within the limits of acceleration and jerk would follow"
