"""Tables to test on, and CALVIN's recordings to compare with."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest

from robovlms_jax.envs.calvin import initial_states, task_chains
from robovlms_jax.playtable.mechanics import physics, pushing
from robovlms_jax.playtable.scene import SCENES, make_scene, stack_scenes

SAMPLE = pathlib.Path(__file__).resolve().parents[2] / "data" / "calvin_sample"

reset, step = jax.jit(physics.reset), jax.jit(physics.step)
info, depths = jax.jit(physics.info), jax.jit(lambda scene, state: pushing.touching(scene, state).depth)
reset_all = jax.jit(jax.vmap(physics.reset, (None, 0, 0)))


JOINTS = {
    "base__slide": ("-0.125 0.09375 0.66908", 0.35),
    "base__drawer": ("0.225 0 0.4", 0.275),
    "base__button": ("-0.15 -0.15 0.575", 0.025),
    "base__switch": ("0.375 0.07616 0.6186", 0.11),
}


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
    """A calvin_env with scene D's files as they are, but for meshes."""
    root = tmp_path / "calvin_env"
    (root / "calvin_env" / "envs").mkdir(parents=True)
    (root / "calvin_env" / "envs" / "play_table_env.py").write_text("")
    (root / "conf" / "scene").mkdir(parents=True)
    blocks = {"red": "middle", "blue": "small", "pink": "big"}
    lines = ["data_path: ${data_path}", "global_scaling: 0.8", "surfaces:"]
    lines += ["  table: [[0.0, -0.15, 0.46], [0.35, -0.03, 0.46]]"]
    lines += ["  slider_left: [[-0.32, 0.05, 0.46], [-0.16, 0.12, 0.46]]"]
    lines += ["  slider_right: [[-0.05, 0.05, 0.46], [0.13, 0.12, 0.46]]"]
    lines += ["objects:", "  fixed_objects: {table: {file: table/urdf/table.urdf}}", "  movable_objects:"]
    lines += [f"    block_{color}: {{file: blocks/{color}.urdf}}" for color in blocks]
    (root / "conf" / "scene" / "calvin_scene_D.yaml").write_text("\n".join(lines))
    data = root / "data"
    (data / "table" / "urdf").mkdir(parents=True)
    (data / "blocks").mkdir()
    joints = "".join(
        f'<joint name="{name}"><origin xyz="{xyz}"/><limit lower="0" upper="{upper}"/></joint>'
        for name, (xyz, upper) in JOINTS.items()
    )
    mesh = '<link name="switch_link"><visual><geometry><mesh filename="../lever.obj"/></geometry></visual></link>'
    (data / "table" / "urdf" / "table.urdf").write_text(f"<robot>{mesh}{joints}</robot>")
    (data / "table" / "lever.obj").write_text("v -0.075 0 0\nvn 9 9 9\nv 0.075 0.1 0\nf 1 2\n")
    for color, size in blocks.items():
        length = {"small": 0.05, "middle": 0.07, "big": 0.1}[size]
        box = f'<box size="{length} 0.05 0.05"/>'
        text = f"<robot><link><collision><geometry>{box}</geometry></collision></link></robot>"
        (data / "blocks" / f"{color}.urdf").write_text(text)
    return root


@pytest.fixture(scope="session")
def scene():
    return make_scene("D")


@pytest.fixture(scope="session")
def stacked_scenes():
    """A, B, C and D with a leading axis."""
    return jax.device_get(stack_scenes(SCENES))


@pytest.fixture(scope="session")
def starts() -> tuple[np.ndarray, np.ndarray]:
    """robot_obs [N, 15] and scene_obs [N, 24] of all 192 initial conditions in D."""
    states = [initial_states.initial_state(condition) for condition in task_chains.initial_conditions()]
    return tuple(np.stack(column) for column in zip(*states))


class Recording(NamedTuple):
    """One annotated segment of CALVIN's simulator, T frames: robot_obs [T, 15], scene_obs [T, 24], rel_actions [T, 7],
    and the static camera's first picture as JPEG."""

    scene: str
    task: str
    robot_obs: np.ndarray
    scene_obs: np.ndarray
    rel_actions: np.ndarray
    static_jpeg: bytes


@pytest.fixture(scope="session")
def recordings() -> list[Recording]:
    """The bundled sample of CALVIN's own recordings."""
    return [recording for split in ("training", "validation") for recording in _read(SAMPLE / split)]


def _read(folder: pathlib.Path) -> Iterator[Recording]:
    scenes = np.load(folder / "scene_info.npy", allow_pickle=True).item()
    arrays = {path.stem: np.load(path) for path in (folder / "index").glob("*.npy")}
    pictures = (folder / "shard_00000.bin").read_bytes()
    for segment in json.loads((folder / "annotations.json").read_text()):
        first = segment["start"]
        rows = slice(first, segment["end"] + 1)
        offset, length = arrays["offset"][first, 0], arrays["length"][first, 0]
        yield Recording(
            next(name[-1] for name, (low, high) in scenes.items() if low <= first <= high),
            segment["task"],
            *(arrays[key][rows] for key in ("robot_obs", "scene_obs", "rel_actions")),
            pictures[offset : offset + length],
        )


@pytest.fixture(scope="module", autouse=True)
def optimised(request):
    """Where slow tests run, programs run for longer than they compile, elsewhere they do not. A setting that stayed
    made tests of other folders, in the same process, take up to nine times as long."""
    here = [item for item in request.session.items if item.path == request.path]
    before = jax.config.values["jax_disable_most_optimizations"]
    if any(item.get_closest_marker("slow") for item in here):
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def action(*, move=(0.0, 0.0, 0.0), turn=(0.0, 0.0, 0.0), gripper=-1.0) -> np.ndarray:
    return np.array([*move, *turn, gripper], np.float32)
