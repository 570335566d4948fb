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
