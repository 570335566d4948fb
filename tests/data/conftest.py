"""A fabricated CALVIN folder, small and quick to write."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

Write = Callable[..., pathlib.Path]


def content_of(frame_id: int) -> dict[str, np.ndarray]:
    """What one frame file holds: smooth images, and numbers that tell frames apart."""
    rng = np.random.default_rng(frame_id)
    ramp = np.arange(40)[:, None, None] + 2 * np.arange(40)[None, :, None] + rng.integers(0, 100, 3)
    rel_actions = rng.uniform(-1, 1, 7)
    rel_actions[6] = 1 if frame_id % 3 else -1
    return {
        "rgb_static": ramp.astype(np.uint8),
        "rgb_gripper": (255 - ramp[:32, :32]).astype(np.uint8),
        "depth_static": np.zeros((40, 40), np.float32),
        "rel_actions": rel_actions,
        "actions": rng.normal(size=7),
        "robot_obs": rng.normal(size=15),
        "scene_obs": rng.normal(size=24),
    }


def annotations(spans: Sequence[tuple[int, int]], tasks: Sequence[str] | None = None) -> dict:
    """CALVIN's annotation dictionary; the sentence of an episode is its task in words."""
    tasks = tasks or ["open_drawer", "turn_on_led", "push_blue_block_left"]
    tasks = [tasks[number % len(tasks)] for number in range(len(spans))]
    return {
        "language": {
            "ann": [task.replace("_", " ") for task in tasks],
            "task": tasks,
            "emb": np.zeros((len(spans), 1, 4)),
        },
        "info": {"episodes": [], "indx": list(spans)},
    }


@pytest.fixture(scope="session")
def frame_content() -> Callable[[int], dict[str, np.ndarray]]:
    """frame id -> what `write_calvin` writes for it."""
    return content_of


@pytest.fixture
def write_calvin(tmp_path: pathlib.Path) -> Write:
    """write_calvin(spans, frames=, split=, tasks=, change=) -> root of a CALVIN folder with these annotated spans.

    frames: ids of all frames, by default those of the spans.
    change: frame id -> keys to replace; None deletes the key.
    """

    def write(
        spans: Sequence[tuple[int, int]],
        *,
        frames: Sequence[int] | None = None,
        split: str = "training",
        tasks: Sequence[str] | None = None,
        change: Mapping[int, Mapping[str, np.ndarray | None]] | None = None,
    ) -> pathlib.Path:
        root = tmp_path / "calvin"
        folder = root / split
        (folder / "lang_annotations").mkdir(parents=True)
        ids = sorted({frame for start, end in spans for frame in range(start, end + 1)}) if frames is None else frames
        for frame_id in ids:
            content = {**content_of(frame_id), **(change or {}).get(frame_id, {})}
            content = {key: value for key, value in content.items() if value is not None}
            np.savez(folder / f"episode_{frame_id:07d}.npz", **content)
        np.save(folder / "lang_annotations" / "auto_lang_ann.npy", annotations(spans, tasks))
        np.save(folder / "ep_start_end_ids.npy", np.array([[min(ids), max(ids)]]))
        return root

    return write
