"""The real CALVIN simulator as an `Env`, from a user's own checkout of calvin_env (Mees et al. 2022, arXiv:2112.03227).

Needs Python packages pybullet, hydra-core and scipy and nothing else: no torch, tacto, pyhash, OpenCV or old gym. What
calvin_env imports but does not need for rollouts is replaced by placeholders; the checkout is used as it is.
`docs/calvin.md` has the steps on a fresh machine.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal
from unittest import mock

import numpy as np

from robovlms_jax.control.interface import ACTION_DIM, Observation
from robovlms_jax.envs import looks, process
from robovlms_jax.envs.calvin import dressing, initial_states, tasks, version

Actions = Literal["relative", "absolute"]

ROBOT_OBS_DIM, SCENE_OBS_DIM = 15, 24
CAMERA_NAMES = {"static": "rgb_static", "wrist": "rgb_gripper"}

completed_in_each = functools.partial(tasks.completed_in_each, as_released=True)
"""The task conditions as CALVIN's released checker decides them, for numbers that stand beside published ones."""

# what the scene calls its bodies -> tasks.BODIES
_LINKS = {
    "base_link": "base",
    "drawer_link": "drawer",
    "plank_link": "shelf",
    "slide_link": "door",
    "button_link": "button",
    "switch_link": "switch",
    "led_link": "led",
    "light_link": "lightbulb",
}


def calvin_env(
    calvin_root: str,
    *,
    scene: str = "D",
    split: str = "",
    use_egl: bool = False,
    actions: Actions = "relative",
    python: str = sys.executable,
    timeout_s: float = 60.0,
    fresh_process: bool = False,
) -> process.ProcessEnv:
    """One CALVIN simulator in a process of its own, ready for `vector.EnvPool`; arguments as for `CalvinEnv`.

    Args:
      python: interpreter for the simulator, if this one has no pybullet (wheels exist for Python 3.10 and 3.11 only).
      timeout_s: a step, reset or rendering that takes longer counts as hung.
      fresh_process: start the process anew at every reset. PyBullet keeps something of what was simulated before: the
        same chain run twice in one process differs by up to 0.015 in a state value, in fresh processes by nothing.
    """
    kwargs = {"calvin_root": str(calvin_root), "scene": scene, "split": str(split), "use_egl": use_egl}
    env = process.ProcessEnv(
        "robovlms_jax.envs.calvin.adapter:CalvinEnv",
        kwargs | {"actions": actions},
        python=python,
        timeout_s=timeout_s,
        fresh_process=fresh_process,
    )
    version.warn(find_checkout(calvin_root), env.about)  # what the other process logs is not seen here
    return env


class CalvinEnv:
    """CALVIN's table in this process; only one per process, since its robot code uses PyBullet's global client.

    Args:
      calvin_root: checkout of github.com/mees/calvin_env, or of github.com/mees/calvin with its submodule.
      scene: "A" to "D"; evaluation uses D. Ignored when `split` is given.
      split: folder of a published split (with `validation/.hydra/merged_config.yaml`, or that `validation` folder): its
        stored scene and camera numbers are used. Empty: those in calvin_root/conf.
      use_egl: render on the GPU through EGL. False: PyBullet's CPU renderer, which needs no display and no driver.
      actions: what `step` is given. "relative": CALVIN's `rel_actions`; "absolute": its `actions`, poses to go to.
    Raises:
      ImportError: a package is missing. FileNotFoundError: no checkout or no split there.

    `about` says what results depend on: calvin_env's commit, whether its button works, renderer, PyBullet's version.
    """

    def __init__(
        self,
        calvin_root: str,
        *,
        scene: str = "D",
        split: str = "",
        use_egl: bool = False,
        actions: Actions = "relative",
    ):
        if actions not in ("relative", "absolute"):
            raise ValueError(f"actions={actions!r} must be 'relative' or 'absolute'.")
        root = find_checkout(calvin_root)
        _require_packages()
        config, self.name = _config(root, scene, split)
        self._absolute = actions == "absolute"
        self._env = _build(root, config, use_egl)
        self.about = version.describe(root, self._env)
        self.about |= {"renderer": "EGL" if use_egl else "CPU", "actions": actions}
        version.warn(root, self.about)
        # step and reset of the simulator render all its cameras; without cameras they cost nothing, see `observe`
        self._cameras, self._env.cameras = self._env.cameras, []
        self._columns: dict[tuple[int, int], int] | None = None
        self._dressing: dressing.Dressing | None = None

    def reset(
        self,
        robot_obs: np.ndarray | None = None,
        scene_obs: np.ndarray | None = None,
        look: looks.Look | None = None,
    ) -> None:
        """Go to the given state (blocks in the scene's own order) or to the neutral one with random blocks.

        look: how the table looks until the next reset; None: as usual.
        """
        for name, value, size in (("robot_obs", robot_obs, ROBOT_OBS_DIM), ("scene_obs", scene_obs, SCENE_OBS_DIM)):
            if value is not None and np.shape(value) != (size,):
                raise ValueError(f"{name} has shape {np.shape(value)}, expected ({size},).")
        if look is not None or self._dressing is not None:
            self._dressing = self._dressing or dressing.Dressing(self._env, self._cameras)
            self._dressing.wear(look or looks.Look())
        self._env.reset(robot_obs=robot_obs, scene_obs=scene_obs)

    def step(self, action: np.ndarray) -> None:
        """1/30 s of an action float[7]; the array stays as it is.

        Relative: 1.0 = 0.02 m or 0.05 rad, world frame. Absolute: tool centre point to go to, xyz in m and Euler xyz in
        rad, world frame. The gripper is exactly -1 or 1.
        """
        action = np.array(action, np.float64)  # a copy: old versions of calvin_env scale what they are given in place
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"action {action.tolist()} must be {ACTION_DIM} finite numbers.")
        if action[6] not in (-1.0, 1.0):
            raise ValueError(f"action[6]={action[6]} must be exactly -1 (close) or 1 (open); binarise the gripper.")
        # three parts are how the simulator knows a pose from a relative action
        self._env.step(tuple(np.split(action, [3, 6])) if self._absolute else action)

    def observe(self) -> Observation:
        """Static uint8[200, 200, 3] and wrist uint8[84, 84, 3] images; proprio is robot_obs float[15]."""
        self._env.cameras = self._cameras
        try:
            obs = self._env.get_obs()
        finally:
            self._env.cameras = []
        images = {ours: np.asarray(obs["rgb_obs"][theirs], np.uint8) for ours, theirs in CAMERA_NAMES.items()}
        return Observation(images, np.asarray(obs["robot_obs"]))

    @property
    def info(self) -> tasks.SceneInfo:
        """The scene as the task conditions read it, plus `robot_obs` float[15] and `scene_obs` float[24]."""
        raw = self._env.get_info()
        if self._columns is None:
            self._columns = _contact_columns(raw)
        return scene_info(raw, self._columns) | self._env.get_state_obs()


def scene_info(raw: Mapping[str, Any], columns: Mapping[tuple[int, int], int]) -> dict[str, Any]:
    """CALVIN's nested info -> `tasks.SceneInfo`; `columns` maps the simulator's (body, link) to one of `contacts`."""
    scene, robot = raw["scene_info"], raw["robot_info"]
    blocks = [scene["movable_objects"][f"block_{color}"] for color in tasks.BLOCKS]
    contacts = np.zeros((4, len(tasks.BODIES)), bool)
    for row, body in enumerate([robot, *blocks]):
        for contact in body["contacts"]:  # PyBullet's contact point: [2] is the other body, [4] its link
            uid, link = contact[2], contact[4]
            contacts[row, columns.get((uid, link), columns.get((uid, -1), len(tasks.BODIES) - 1))] = True
    return {
        "slider": np.float64(scene["doors"]["base__slide"]["current_state"]),
        "drawer": np.float64(scene["doors"]["base__drawer"]["current_state"]),
        "lightbulb": np.int64(scene["lights"]["lightbulb"]["logical_state"]),
        "led": np.int64(scene["lights"]["led"]["logical_state"]),
        "block_position": np.array([block["current_pos"] for block in blocks]),
        "block_rotation": np.array([block["current_orn"] for block in blocks]),
        "block_velocity": np.array([[*block["current_lin_vel"], *block["current_ang_vel"]] for block in blocks]),
        "contacts": contacts,
    }


def _contact_columns(raw: Mapping[str, Any]) -> dict[tuple[int, int], int]:
    """(body, link) -> column. Unlisted links count as their body's base; unlisted bodies as the ground."""
    scene = raw["scene_info"]
    columns = {(raw["robot_info"]["uid"], -1): tasks.BODIES.index("robot")}
    for color in tasks.BLOCKS:
        columns[scene["movable_objects"][f"block_{color}"]["uid"], -1] = tasks.BODIES.index(f"{color}_block")
    table = scene["fixed_objects"]["table"]
    for link, index in table["links"].items():
        if link not in _LINKS:
            raise ValueError(f"the scene's table has an unknown link {link!r}; known links: {', '.join(_LINKS)}.")
        columns[table["uid"], index] = tasks.BODIES.index(_LINKS[link])
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Finding and loading the checkout


def find_checkout(calvin_root: str) -> pathlib.Path:
    """The calvin_env checkout at or directly under `calvin_root`."""
    if not str(calvin_root):
        raise ValueError("calvin_root is empty; give the folder of a calvin_env checkout (docs/calvin.md).")
    root = pathlib.Path(calvin_root).expanduser().resolve()
    marker = pathlib.Path("calvin_env", "envs", "play_table_env.py")
    for candidate in (root, root / "calvin_env"):
        if (candidate / marker).is_file():
            if not (candidate / "data").is_dir() or not (candidate / "conf").is_dir():
                raise FileNotFoundError(
                    f"{candidate} lacks `data` or `conf`: use a full checkout, not an installed package."
                )
            return candidate
    hint = (
        " Its submodule is empty: run `git submodule update --init calvin_env`."
        if (root / "calvin_models").is_dir()
        else ""
    )
    raise FileNotFoundError(f"no calvin_env checkout at {root}: {marker} is missing.{hint} See docs/calvin.md.")


def has_validation_instructions(calvin_root: str) -> bool:
    """Whether `validation_instructions` has something to read: github.com/mees/calvin, or calvin_env alone?"""
    return (_annotations(calvin_root) / _VALIDATION).is_file()


def validation_instructions(calvin_root: str) -> dict[str, str]:
    """The benchmark's fixed sentence per task, from a checkout of github.com/mees/calvin.

    Raises:
      FileNotFoundError: a checkout without them. ValueError: a file that is not tasks with sentences.
    """
    return {task: found[0] for task, found in _sentences(_annotations(calvin_root) / _VALIDATION).items()}


def training_instructions(calvin_root: str) -> dict[str, tuple[str, ...]]:
    """The sentences per task that annotate CALVIN's training data, from the same checkout; errors as there."""
    return _sentences(_annotations(calvin_root) / "new_playtable.yaml")


_VALIDATION = "new_playtable_validation.yaml"


def _annotations(calvin_root: str) -> pathlib.Path:
    return pathlib.Path(calvin_root).expanduser() / "calvin_models" / "conf" / "annotations"


def _sentences(path: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Task -> its sentences, at least one."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: CALVIN's sentences come with github.com/mees/calvin, not with calvin_env. "
            "Point calvin_root there, or use this project's own phrasings."
        )
    _require_packages("yaml")
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}. Restore it from github.com/mees/calvin.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected `task: [sentence]` for every task.")
    missing = sorted(set(tasks.TASKS) - set(content))
    if missing:
        raise ValueError(
            f"{path} lacks a sentence for {len(missing)} of the {len(tasks.TASKS)} tasks, e.g. {missing[0]}."
        )
    sentences = {}
    for task in tasks.TASKS:
        found = content[task] if isinstance(content[task], list) else [content[task]]
        if not found or not all(isinstance(text, str) and text.strip() for text in found):
            raise ValueError(f"{path}: {task} has {content[task]!r}, expected a list of sentences.")
        sentences[task] = tuple(text.strip() for text in found)
    return sentences


# ---------------------------------------------------------------------------------------------------------------------
# Building the simulator

_PACKAGES = {
    "pybullet": "pybullet",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "scipy": "scipy",
    "yaml": "pyyaml",
}


def _require_packages(*modules: str) -> None:
    missing = [_PACKAGES[name] for name in modules or _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"CALVIN needs packages {sys.executable} (Python {sys.version.split()[0]}) lacks: {', '.join(missing)}. "
            "Install them there with pip, or name an interpreter that has them (`python=...`): pybullet has wheels for "
            "Python 3.10 and 3.11 only. See docs/calvin.md."
        )


def _config(root: pathlib.Path, scene: str, split: str) -> tuple[Any, str]:
    """The simulator's configuration (a split's stored one, or composed from the checkout's conf/) and its name."""
    from omegaconf import OmegaConf

    if split:
        names = [pathlib.Path(split, part, ".hydra", "merged_config.yaml") for part in ("", "validation")]
        path = next((name for name in names if name.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"no stored configuration in split {split}: looked for {' and '.join(map(str, names))}."
            )
        config = OmegaConf.load(path)
        folder = path.resolve().parents[1]
        title = f"CALVIN ({folder.parent.name if folder.name == 'validation' else folder.name})"
    else:
        if scene not in initial_states.SCENES:
            raise ValueError(f"unknown scene {scene!r}; known scenes: {', '.join(initial_states.SCENES)}.")

        def piece(name: str) -> Any:
            return OmegaConf.load(root / "conf" / f"{name}.yaml")

        robot = OmegaConf.merge(piece("robot/panda"), piece("robot/panda_longer_finger"))
        del robot["defaults"]
        config = OmegaConf.create(
            {
                "env": piece("env/play_table_env"),
                "scene": piece(f"scene/calvin_scene_{scene}"),
                "robot": robot,
                "cameras": {name: piece(f"cameras/cameras/{name}") for name in ("static", "gripper")},
                "use_vr": False,
            }
        )
        title = f"CALVIN (scene {scene})"
    for camera in set(config.cameras) - {"static", "gripper"}:  # the tactile camera needs OpenGL and tacto
        del config.cameras[camera]
    # stored configurations name the folders of the machine that recorded the split
    config.data_path = config.scene.data_path = str(root / "data")
    return config, title


def _build(root: pathlib.Path, config: Any, use_egl: bool) -> Any:
    _install_placeholders()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = importlib.import_module("calvin_env.envs.play_table_env")
    loaded = pathlib.Path(module.__file__).resolve()
    if root not in loaded.parents:
        raise ImportError(
            f"calvin_env was imported from {loaded.parent}, not from {root}: another copy came first. Remove it from "
            "this environment (`pip uninstall calvin_env`) or point calvin_root at it."
        )
    import hydra

    return hydra.utils.instantiate(config.env, use_egl=use_egl, show_gui=False, use_vr=False, use_scene_info=True)


def _install_placeholders() -> None:
    """Stand-ins for what calvin_env imports and rollouts never use: video windows, git hashes, quaternions."""

    class Env:
        """gym.Env: a base class without behaviour here."""

    gym = types.ModuleType("gym")
    gym.Env = gym.Wrapper = Env
    gym.utils = types.ModuleType("gym.utils")
    gym.utils.seeding = types.ModuleType("gym.utils.seeding")
    gym.utils.seeding.np_random = lambda seed=None: (np.random.default_rng(seed), seed)
    for module in (gym, gym.utils, gym.utils.seeding):
        sys.modules[module.__name__] = module
    stand_ins = ["cv2", "git", "quaternion"]
    if importlib.util.find_spec("rich") is None:  # imported by calvin_env before July 2022
        stand_ins += ["rich", "rich.traceback"]
    for name in stand_ins:
        sys.modules[name] = mock.MagicMock(name=name)
