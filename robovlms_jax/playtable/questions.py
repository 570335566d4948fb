"""Pictures of PlayTable with questions whose answers the simulator knows: colours, places, drawer, door and lamps."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from robovlms_jax import atomic
from robovlms_jax.envs.calvin import task_chains
from robovlms_jax.playtable import env
from robovlms_jax.playtable.scene import BLOCKS, initial_obs, random_tables, stack_scenes

PICTURES = "pictures"
"""Folder of the pictures, beside the files of questions."""
_TOGETHER = 64  # pictures rendered at a time
_APART_M = 0.05  # blocks nearer than this, from side to side, are neither left nor right of each other

Turn = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to write.

    out: folder, made if it is not there. pictures, validation_pictures: how many of each. image_size: px. tables: names
    of tables that training pictures show, beside `random_tables` of random ones; validation shows validation_table.
    """

    out: str = "data/playtable_questions"
    pictures: int = 50
    validation_pictures: int = 16
    image_size: int = 64
    tables: tuple[str, ...] = ("A", "B", "C")
    random_tables: int = 29
    validation_table: str = "D"
    seed: int = 0

    def __post_init__(self):
        for field in ("pictures", "validation_pictures", "image_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")


def write(settings: Settings) -> dict[str, int]:
    """train.jsonl and validation.jsonl as LLaVA has them, and their pictures; the same settings write the same bytes.

    Returns: pictures and questions written, of both files together.
    """
    out = pathlib.Path(settings.out)
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    names = (*settings.tables, *random_tables(0, settings.random_tables))
    counts = {"pictures": 0, "questions": 0}
    for split, tables, number, seed in (
        ("train", names, settings.pictures, settings.seed),
        ("validation", (settings.validation_table,), settings.validation_pictures, settings.seed + 1),
    ):
        with atomic.replacing(out / f"{split}.jsonl") as file:
            for index, (picture, turns) in enumerate(_examples(tables, number, settings.image_size, seed)):
                name = f"{PICTURES}/{split}_{index:05d}.jpg"
                (out / name).write_bytes(picture)
                file.write(json.dumps(_entry(f"{split}_{index}", name, turns)).encode() + b"\n")
                counts["pictures"] += 1
                counts["questions"] += len(turns)
    return counts


def _entry(name: str, picture: str, turns: Sequence[Turn]) -> dict[str, Any]:
    said = []
    for number, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": ("" if number else "<image>\n") + question})
        said.append({"from": "gpt", "value": answer})
    return {"id": name, "image": picture, "conversations": said}


def _examples(tables: Sequence[str], count: int, size: int, seed: int) -> Iterator[tuple[bytes, list[Turn]]]:
    """Encoded pictures, and what may be asked about each."""
    rng = np.random.default_rng(seed)
    conditions = task_chains.initial_conditions()
    scenes = stack_scenes(tables)
    backdrops = env.backdrops(scenes, size)
    for first in range(0, count, _TOGETHER):
        which = (first + np.arange(min(_TOGETHER, count - first))) % len(tables)
        starts = [initial_obs(conditions[rng.integers(len(conditions))], tables[table]) for table in which]
        robot, scene = (np.stack(part) for part in zip(*starts, strict=True))
        robot[:, :3] += rng.uniform(-1.0, 1.0, (len(which), 3)) * np.array([0.15, 0.05, 0.03])
        rows = env.pick(scenes, which)
        states = env.reset_batch(rows, robot, scene)
        infos = jax.device_get(env.info_batch(rows, states))
        ranges = np.asarray(rows.joint_range)
        pictures = env.pictures(scenes, which, states, {"static": size}, backdrops)["static"]
        for row, picture in enumerate(pictures):
            state = {key: value[row] for key, value in infos.items()}
            yield _encoded(picture), questions(state, ranges[row])


def questions(info: Mapping[str, Any], joint_range: np.ndarray) -> list[Turn]:
    """What may be asked about a table in the state `info` (`tasks.SceneInfo`), with the right answers.

    Args:
      joint_range: float[4], m, how far door, drawer, button and lever go (`scene.Scene`).
    """
    slider, drawer = float(info["slider"]) > joint_range[0] / 2, float(info["drawer"]) > joint_range[1] / 2
    turns = [
        ("Is the drawer open or closed?", "open" if drawer else "closed"),
        ("Is the sliding door on the left or on the right?", "left" if slider else "right"),
        ("Is the lightbulb on or off?", "on" if int(info["lightbulb"]) else "off"),
        ("Is the green light on or off?", "on" if int(info["led"]) else "off"),
    ]
    places = np.asarray(info["block_position"])
    for color, place in zip(BLOCKS, places, strict=True):
        turns.append((f"Where is the {color} block?", "on the shelf" if place[1] > 0.04 else "on the table"))
    order = np.argsort(places[:, 0])
    if np.diff(places[order, 0]).min() > _APART_M:
        turns.append(("Which block is furthest to the left?", BLOCKS[order[0]]))
        turns.append(("Which block is furthest to the right?", BLOCKS[order[-1]]))
    return turns


def _encoded(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=92)
    return data.getvalue()
