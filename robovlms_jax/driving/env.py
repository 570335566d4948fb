"""The driving base as `Env` (one room) and `VectorEnv` (many), and with the deployment's safety layer in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from robovlms_jax.control import interface
from robovlms_jax.deploy import geometry
from robovlms_jax.deploy.limits import Limits
from robovlms_jax.deploy.safety import Measured, SafetyLayer
from robovlms_jax.driving import camera, scenarios, world

Drive = Literal["holonomic", "differential"]

TO_CUP_M = 0.05
"""By how much nearer to the cup's stand than to boxes the safety layer lets the base."""


class Drives:
    """Rooms driven side by side, a `vector.VectorEnv`.

    Infos: `succeeded`, `arrived`, `as_told`, `collided` (bool), `clearance_m`, `scenario`, `pose` float64[3] (room),
    and `partial`, what reports average.

    Args:
      size: number of rooms.
      drive: what the base can do (`world.step`).
      views: pictures beside "front", for people: "view" (the camera's, large) and "map".
      safety: None, or what happens on a collision risk (`Limits.on_collision_risk`): every command then goes through
        a `SafetyLayer` with the documents' limits (0.5 m/s, 0.1 m to boxes and walls, stop enabled), which is told
        where the boxes are. Its workspace is the room: the documents' box of 0.5 m is an arm's.
    """

    def __init__(
        self,
        size: int = 1,
        *,
        drive: Drive = "holonomic",
        views: Sequence[str] = (),
        safety: Literal["stop", "slow"] | None = None,
    ):
        if size < 1:
            raise ValueError(f"size={size}: expected at least one room.")
        unknown = sorted(set(views) - {"view", "map"})
        if unknown:
            raise ValueError(f"views has unknown {unknown}; there are 'view' and 'map'.")
        self.name = "driving" + ("" if drive == "holonomic" else f"-{drive}") + (f"-safe-{safety}" if safety else "")
        self.about: dict[str, str] = {}  # nothing beyond this repository
        self.robot, self.size = world.ROBOT, size
        self._drive, self._views, self._safety = drive, tuple(views), safety
        self.layouts = [scenarios.draw("1box_vert_left", 0)] * size
        """Of each room (N = 1)."""
        self._names = ["1box_vert_left"] * size
        self._states = [world.reset(layout) for layout in self.layouts]
        self._trails: list[list[np.ndarray]] = [[] for _ in range(size)]
        self._layers: list[SafetyLayer | None] = [None] * size
        self._changed = np.zeros((size, 2), int)
        """Ticks in which the layer changed a command for another reason than its dynamics, and ticks in all."""

    def reset(self, slots: Sequence[int], starts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Put rooms into the state that {"scenario": id, "seed": whole number} names."""
        for slot, start in zip(slots, starts, strict=True):
            self.layouts[slot] = layout = scenarios.draw(**start)
            self._names[slot] = start["scenario"]
            self._states[slot], self._trails[slot] = world.reset(layout), []
            self._layers[slot] = make_layer(self._safety) if self._safety else None
            self._changed[slot] = 0
        return self.infos(slots)

    def step(self, slots: Sequence[int], actions: np.ndarray) -> list[dict[str, Any]]:
        """One command float[3] in each of the slots, for 0.1 s: m/s, m/s, rad/s."""
        commands = np.stack([_checked(action) for action in actions])
        layout = scenarios.stack([self.layouts[slot] for slot in slots])
        state = world.State(*(np.concatenate(parts) for parts in zip(*(self._states[slot] for slot in slots))))
        if self._safety:
            commands = np.stack([self._filtered(slot, command) for slot, command in zip(slots, commands)])
        state = world.step(layout, state, commands, self._drive)
        for row, slot in enumerate(slots):
            self._trails[slot].append(self._states[slot].pose[0])
            self._states[slot] = world.State(*(part[row : row + 1] for part in state))
        return self.infos(slots)

    def observe(self, slots: Sequence[int]) -> list[interface.Observation]:
        """Render these slots; the state is odometry, float32[3]."""
        return [self._look(slot) for slot in slots]

    def infos(self, slots: Sequence[int]) -> list[dict[str, Any]]:
        return [self._info(slot) for slot in slots]

    def restart(self, slot: int) -> None:
        """Back to the start; a room cannot break."""
        self._states[slot] = world.reset(self.layouts[slot])

    def _info(self, slot: int) -> dict[str, Any]:
        layout, state = self.layouts[slot], self._states[slot]
        changed, ticks = self._changed[slot]
        found = {
            "succeeded": bool(world.succeeded(layout, state)[0]),
            "arrived": bool(world.arrived(layout, state)[0]),
            "as_told": bool(world.as_told(layout, state)[0]),
            "collided": bool(state.collided[0]),
        }
        layer = self._layers[slot]
        return {
            **found,
            "scenario": self._names[slot],
            "pose": state.pose[0],
            "clearance_m": float(state.clearance[0]),
            "partial": {
                "collided": float(found["collided"]),
                "arrived": float(found["arrived"]),
                "clearance_m": float(state.clearance[0]),
                **({"changed by safety": changed / max(ticks, 1)} if layer else {}),
                **({"stopped by safety": float(layer.latch.state != "run")} if layer else {}),
            },
        }

    def _look(self, slot: int) -> interface.Observation:
        layout, pose = self.layouts[slot], self._states[slot].pose[0]
        images = {}
        if "view" in self._views:
            images["view"] = camera.render(layout, pose, (180, 288), smooth=2)
        if "map" in self._views:
            images["map"] = camera.draw_map(layout, pose, np.array(self._trails[slot]).reshape(-1, 3), scale=2)
        images["front"] = camera.render(layout, pose)
        return interface.Observation(images, world.odometry(layout, self._states[slot])[0])

    def _filtered(self, slot: int, command: np.ndarray) -> np.ndarray:
        layer = self._layers[slot]
        decision = layer.check(command, Measured(self._states[slot].pose[0], obstacles_of(self.layouts[slot])))
        reasons = {event.stage for event in decision.events}
        self._changed[slot] += (bool(reasons & {"collision", "workspace", "latch"}), 1)
        return decision.action


class Driving:
    """One room, an `interface.Env`; arguments as of `Drives`."""

    def __init__(self, **settings: Any):
        self._drives = Drives(1, **settings)
        self.name, self.robot = self._drives.name, self._drives.robot

    def reset(self, scenario: str = "1box_vert_left", seed: int = 0) -> None:
        """Draw the scenario's room from `seed`. Raises ValueError for an unknown scenario."""
        self._drives.reset([0], [{"scenario": scenario, "seed": seed}])

    def step(self, action: np.ndarray) -> None:
        """A command float[3] for 0.1 s: linear_x, linear_y (m/s), angular_z (rad/s)."""
        self._drives.step([0], np.asarray(action)[None])

    def observe(self) -> interface.Observation:
        return self._drives.observe([0])[0]

    @property
    def layout(self) -> scenarios.Layout:
        """The room (N = 1)."""
        return self._drives.layouts[0]

    @property
    def info(self) -> Mapping[str, Any]:
        """See `Drives`."""
        return self._drives.infos([0])[0]


def completed_in_each(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """For `rollout.SuccessCriterion`: the scenario, where it is done."""
    return [{info["scenario"]} if info["succeeded"] else set() for info in now]


def make_layer(on_collision_risk: Literal["stop", "slow"] = "stop") -> SafetyLayer:
    """A safety layer for the base in its room. The least distance is the documents' 0.1 m, beyond the base's own
    radius."""
    (x0, x1), (y0, y1) = scenarios.ROOM
    clearance = scenarios.ROBOT_RADIUS + 0.02
    room = ((x0 + clearance, x1 - clearance), (y0 + clearance, y1 - clearance), (0.0, 0.3))
    limits = Limits(workspace_m=room, on_collision_risk=on_collision_risk)
    body = geometry.ball("base", (0.0, 0.0, 0.0), scenarios.ROBOT_RADIUS)
    return SafetyLayer(world.ROBOT, limits, tool=(body,))


def obstacles_of(layout: scenarios.Layout) -> tuple[geometry.Obstacle, ...]:
    """The boxes of one room and the cup's stand, for the safety layer. The stand is where the base is to go, so it is
    declared smaller than it is."""
    x, y = layout.cup[0]
    stand = geometry.ball("cup", (x, y, 0.0), scenarios.CUP_RADIUS - TO_CUP_M)
    boxes = tuple(
        geometry.Box(f"box {i + 1}", (box[0], box[1], 0.0), (box[2], box[3], box[4]))
        for i, box in enumerate(layout.boxes[0])
        if layout.present[0, i]
    )
    return (*boxes, stand)


def _checked(action: np.ndarray) -> np.ndarray:
    action = np.asarray(action, np.float64)
    if action.shape != (len(world.ROBOT.action),) or not np.isfinite(action).all():
        raise ValueError(f"action {action.tolist()} must be 3 finite numbers: linear_x, linear_y, angular_z.")
    return action
