"""Any Gymnasium environment with Box actions, and Dict or Box observations, as an `Env`.

What its numbers and pictures are is said by a `RobotSpec` and a `Layout`, and held against the environment's own spaces
when it is made. gymnasium is imported then, and not before.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax import extras
from robovlms_jax.control.interface import Observation
from robovlms_jax.control.robot import RobotSpec

RENDER = "render"
WHOLE = "."
"""As a key: the observation itself, where it is a Box."""
_FREE = -1
"""Number of the camera that is at no place of the model (MuJoCo)."""
_VIEW = {"distance": 1, "azimuth": 1, "elevation": 1, "lookat": 3}
"""What says where it stands -> how many numbers."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things are found in an environment.

    id: as registered. imports: modules that register it. options: JSON object of keyword arguments for
    `gymnasium.make`, such as '{"width": 96}'.
    cameras: camera -> key of the observation (uint8[height, width, 3]); "." is the observation itself, "render" what
    `render` draws, "render:NAME" the same through a camera of a MuJoCo environment's model, and
    "render:distance=0.75,azimuth=115,elevation=-20,lookat=1.3 0.75 0.5" from anywhere around a point of its world.
    state: keys whose numbers, one after the other, are the robot's state; "." is the observation itself.
    instruction: what the policy is asked, unless `info` has a sentence under `instruction_key`.
    success: key of `info` that says whether the task is done now, or "terminated".
    """

    id: str
    cameras: Mapping[str, str]
    state: tuple[str, ...] = ()
    instruction: str = ""
    instruction_key: str = ""
    success: str = "is_success"
    imports: tuple[str, ...] = ()
    options: str = "{}"

    @property
    def name(self) -> str:
        """For command lines."""
        return self.id

    @staticmethod
    def from_json(content: Any, where: str = "layout") -> Layout:
        """From a JSON object of these fields; options may be an object. Raises ValueError naming `where` and field."""
        fields = {field.name: field for field in dataclasses.fields(Layout)}
        if not isinstance(content, Mapping) or not {"id", "cameras"} <= set(content):
            raise ValueError(f"{where} describes no Gymnasium environment: expected an object with 'id' and 'cameras'.")
        unknown = sorted(set(content) - set(fields))
        if unknown:
            raise ValueError(f"{where} has unknown fields {unknown}; known: {', '.join(fields)}.")
        values = dict(content)
        if isinstance(values.get("options"), Mapping):
            values["options"] = json.dumps(values["options"])
        for name in ("state", "imports"):
            if name in values:
                if not isinstance(values[name], list) or not all(isinstance(x, str) for x in values[name]):
                    raise ValueError(f"{where}: {name}={values[name]!r}; expected a list of names.")
                values[name] = tuple(values[name])
        cameras = values["cameras"]
        if not isinstance(cameras, Mapping) or not all(isinstance(x, str) for x in cameras.values()):
            raise ValueError(f"{where}: cameras={cameras!r}; expected camera -> key of the observation, or 'render'.")
        for name in ("id", "instruction", "instruction_key", "success", "options"):
            if not isinstance(values.get(name, ""), str):
                raise ValueError(f"{where}: {name}={values[name]!r} is a {type(values[name]).__name__}; expected text.")
        return Layout(**values)

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        plain = dataclasses.asdict(self) | {"cameras": dict(self.cameras), "options": json.loads(self.options)}
        return plain | {"state": list(self.state), "imports": list(self.imports)}


class GymEnv:
    """One environment.

    An episode that the environment itself ends (terminated or truncated) stands still: further actions change nothing,
    and `info` says how it ended.

    Args:
      layout: which environment, and where things are in it.
      robot: what its numbers are: one dimension for each number of the actions, with the same bounds, and of the state;
        its cameras are those of the layout.
    Raises:
      ImportError: gymnasium, or a module of `layout.imports`, is missing. ValueError: the environment has other spaces,
      keys or cameras than the description; names it.
    """

    def __init__(self, layout: Layout, robot: RobotSpec):
        self._layout, self.robot, self.name = layout, robot, f"Gymnasium ({layout.id})"
        self._env = _make(layout)
        self._box = self._env.action_space
        _check_actions(layout, robot, self._box)
        self.about = _about(self._env)
        self._seen: Any = None
        self._info: dict[str, Any] = {}
        self.reset(seed=0)
        _check_observation(layout, robot, self.observe())

    def reset(
        self,
        robot_obs: np.ndarray | None = None,
        scene_obs: np.ndarray | None = None,
        *,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin the episode of a seed; the same one every time. options: for the environment's own `reset`.

        Raises ValueError: a state is given, which is CALVIN's way to begin.
        """
        if robot_obs is not None or scene_obs is not None:
            raise ValueError(f"{self.name} starts from seeds: reset(seed=...), not from a given state.")
        self._seen, info = self._env.reset(seed=seed, options=None if options is None else dict(options))
        self._keep(info, reward=0.0, terminated=False, truncated=False)

    def step(self, action: np.ndarray) -> None:
        """One action float[A] in the robot's units, clipped to the environment's bounds."""
        action = np.asarray(action, np.float64)
        if action.shape != self._box.shape or not np.isfinite(action).all():
            raise ValueError(f"action {action.tolist()} must be {self._box.shape[0]} finite numbers.")
        if self._info["terminated"] or self._info["truncated"]:
            return
        clipped = np.clip(action, self._box.low, self._box.high).astype(self._box.dtype)
        self._seen, reward, terminated, truncated, info = self._env.step(clipped)
        self._keep(info, reward=float(reward), terminated=bool(terminated), truncated=bool(truncated))

    def observe(self) -> Observation:
        """Pictures of all cameras; proprio: the state float32[P], or None where the robot has none."""
        images = {camera: self._picture(camera, source) for camera, source in self._layout.cameras.items()}
        parts = [np.ravel(self._part(key)).astype(np.float32) for key in self._layout.state]
        return Observation(images, np.concatenate(parts) if parts else None)

    @property
    def info(self) -> Mapping[str, Any]:
        """task, success (now), reward, terminated, truncated, and instruction where the environment says one."""
        return self._info

    @property
    def raw(self) -> Any:
        """The environment's own observation, for experts."""
        return self._seen

    def close(self) -> None:
        self._env.close()

    def _keep(self, info: Mapping[str, Any], **said: Any) -> None:
        key = self._layout.success
        value = said["terminated"] if key == "terminated" else info.get(key, False)
        self._info = {"task": self._layout.id, "success": bool(np.all(value)), **said}
        if self._layout.instruction_key:
            if self._layout.instruction_key not in info:
                raise ValueError(
                    f"{self.name}: info has no {self._layout.instruction_key!r}, which instruction_key names; it has "
                    f"{sorted(info)}."
                )
            self._info["instruction"] = str(info[self._layout.instruction_key])

    def _part(self, key: str) -> np.ndarray:
        if key == WHOLE:
            return np.asarray(self._seen)
        if not isinstance(self._seen, Mapping) or key not in self._seen:
            has = sorted(self._seen) if isinstance(self._seen, Mapping) else f"one Box, whose key is {WHOLE!r}"
            raise ValueError(f"{self.name}: the observation has no {key!r}; it has {has}.")
        return np.asarray(self._seen[key])

    def _picture(self, camera: str, source: str) -> np.ndarray:
        if source == RENDER or source.startswith(f"{RENDER}:"):
            return self._rendered(camera, source.partition(":")[2])
        return self._part(source)

    def _rendered(self, camera: str, name: str) -> np.ndarray:
        if not name:
            return np.asarray(self._env.render())
        renderer = getattr(self._env.unwrapped, "mujoco_renderer", None)
        if renderer is None:
            raise ValueError(
                f"{self.name}: camera {camera!r} is {RENDER}:{name}, which MuJoCo environments alone have."
            )
        if "=" in name:
            return self._from(renderer, _viewpoint(name, f"{self.name}: camera {camera!r}"))
        model = self._env.unwrapped.model
        known = [model.camera(number).name for number in range(model.ncam)]
        if name not in known:
            raise ValueError(f"{self.name}: camera {camera!r} is {RENDER}:{name}; the model's cameras are {known}.")
        return self._through(renderer, known.index(name))

    def _through(self, renderer: Any, camera_id: int) -> np.ndarray:
        usual = renderer.camera_id
        try:
            renderer.camera_id = camera_id
            return np.asarray(self._env.render())
        finally:
            renderer.camera_id = usual

    def _from(self, renderer: Any, view: Mapping[str, np.ndarray]) -> np.ndarray:
        if renderer.viewer is None:
            self._env.render()  # makes the viewer, with the camera that is moved
        camera = renderer.viewer.cam
        usual = {name: np.copy(getattr(camera, name)) for name in view}
        try:
            _place(camera, view)
            return self._through(renderer, _FREE)
        finally:
            _place(camera, usual)


def _viewpoint(text: str, where: str) -> dict[str, np.ndarray]:
    """'distance=0.75,lookat=1 2 3' as numbers. Raises ValueError, which begins with `where`."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[name] = np.array(value.split(), float)
        except ValueError:
            found[name] = np.zeros(0)
        if found[name].size != _VIEW.get(name):
            raise ValueError(
                f"{where} is {RENDER}:{text}, where {part!r} is none of distance=M, azimuth=DEGREES, "
                "elevation=DEGREES, lookat=X Y Z (metres), separated by commas."
            )
    return found


def _place(camera: Any, view: Mapping[str, np.ndarray]) -> None:
    """Move MuJoCo's free camera."""
    for name, value in view.items():
        if _VIEW[name] == 1:
            setattr(camera, name, float(value.item()))
        else:
            getattr(camera, name)[:] = value


def completed_in_each(starts: Sequence[Mapping[str, Any]], nows: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """The environment's own verdict, in the form rollouts ask for it."""
    return [{now["task"]} if now["success"] else set() for now in nows]


def _make(layout: Layout) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(
            f"Gymnasium is not installed for {sys.executable}: {extras.install('gym')}, and the package "
            f"that has {layout.id}."
        ) from error
    try:
        options = json.loads(layout.options)
    except json.JSONDecodeError as error:
        raise ValueError(f"options of {layout.id} are not JSON ({error}): {layout.options!r}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"options of {layout.id} must be a JSON object, found {layout.options!r}.")
    for name in layout.imports:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"{layout.id} needs the module {name}, which cannot be imported: {error}.") from error
        gymnasium.register_envs(module)
    if any(source.partition(":")[0] == RENDER for source in layout.cameras.values()):
        options = {"render_mode": "rgb_array", **options}
    try:
        return gymnasium.make(layout.id, **options)
    except gymnasium.error.Error as error:
        raise ValueError(f"Gymnasium cannot make {layout.id!r}: {error}. Name the module that registers it.") from error


def _about(env: Any) -> dict[str, Any]:
    """Versions that results depend on."""
    import gymnasium

    found = {"gymnasium": gymnasium.__version__}
    package = type(env.unwrapped).__module__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    if package != "gymnasium" and version is not None:
        found[package] = str(version)
    return found


def _check_actions(layout: Layout, robot: RobotSpec, box: Any) -> None:
    if type(box).__name__ != "Box" or len(box.shape) != 1:
        raise ValueError(f"{layout.id} has actions {box}; GymEnv drives environments with Box(n) actions alone.")
    names = [dimension.name for dimension in robot.action]
    if len(names) != box.shape[0]:
        raise ValueError(
            f"{layout.id} has {box.shape[0]} action numbers, robot {robot.name!r} has {len(names)}: {names}."
        )
    for dimension, low, high in zip(robot.action, box.low, box.high, strict=True):
        if not np.allclose((dimension.low, dimension.high), (low, high), rtol=1e-5):
            raise ValueError(
                f"action {dimension.name!r} of robot {robot.name!r} lies in [{dimension.low:g}, {dimension.high:g}], "
                f"that of {layout.id} in [{low:g}, {high:g}]. Describe the robot as the environment has it."
            )


def _check_observation(layout: Layout, robot: RobotSpec, seen: Observation) -> None:
    if sorted(layout.cameras) != sorted(robot.camera_names):
        raise ValueError(
            f"the layout of {layout.id} has cameras {sorted(layout.cameras)}, robot {robot.name!r} has "
            f"{sorted(robot.camera_names)}."
        )
    for camera in robot.cameras:
        image = seen.images[camera.name]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"camera {camera.name!r} of {layout.id} gives {image.dtype}{list(image.shape)}, expected uint8 "
                "pictures [height, width, 3]."
            )
        for what, wanted, found in zip(("height", "width"), (camera.height, camera.width), image.shape):
            if wanted not in (0, found):
                raise ValueError(f"camera {camera.name!r} of {layout.id} has {what} {found}, the robot's has {wanted}.")
    count = 0 if seen.proprio is None else len(seen.proprio)
    if count != len(robot.state):
        raise ValueError(
            f"the state of {layout.id} (keys {list(layout.state)}) has {count} numbers, robot {robot.name!r} has "
            f"{len(robot.state)}."
        )
