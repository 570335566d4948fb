"""Convert datasets: CALVIN to RLDS (for TFDS and other projects), LeRobot to the packed layout (read much faster).

python -m experiments.convert_data --source calvin --root task_D_D --out rlds        # makes rlds/calvin_task_d_d/1.0.0
python -m experiments.convert_data --source lerobot --root my_robot --out packed/my_robot
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import tqdm

from experiments import spreading
from robovlms_jax import cli, cores, ending
from robovlms_jax.data import base, calvin, lerobot, libero_hdf5, packed, packing, rlds_writer
from robovlms_jax.data.features import Field
from robovlms_jax.parallel.config import RayConfig
from robovlms_jax.runs import logs

logger = logging.getLogger(__name__)

CALVIN_FIELDS = (
    Field("steps/is_first", "tensor", "bool"),
    Field("steps/is_last", "tensor", "bool"),
    Field("steps/is_terminal", "tensor", "bool"),
    Field("steps/reward", "tensor", "float32"),
    Field("steps/discount", "tensor", "float32"),
    # Metres, radians, gripper 1 open: what other RLDS datasets mean by an action. `rel_actions` are CALVIN's own.
    Field("steps/action", "tensor", "float32", (7,)),
    Field("steps/rel_actions", "tensor", "float32", (7,)),
    Field("steps/language_instruction", "text", "string"),
    Field("steps/observation/image", "image", "uint8", (None, None, 3)),
    Field("steps/observation/wrist_image", "image", "uint8", (None, None, 3)),
    Field("steps/observation/state", "tensor", "float32", (7,)),
    Field("steps/observation/robot_obs", "tensor", "float32", (15,)),
    Field("steps/observation/scene_obs", "tensor", "float32", (24,)),
    Field("steps/observation/frame_id", "tensor", "int64"),
    Field("episode_metadata/task", "text", "string", per_step=False),
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Convert a dataset to another layout."""

    source: Literal["calvin", "lerobot", "libero_hdf5"]
    """calvin, as published or packed, becomes an RLDS dataset; lerobot (v3) and libero_hdf5 become packed ones."""
    root: pathlib.Path
    """The dataset to read."""
    out: pathlib.Path
    """RLDS: the directory that gets <name>/1.0.0. Packed: what to pass as --data.root afterwards."""
    name: str = ""
    """RLDS: the dataset's name. Empty: calvin_ and the name of its directory."""
    file_format: Literal["tfrecord", "array_record"] = "tfrecord"
    """RLDS: how records are stored."""
    sensors: tuple[str, ...] = ()
    """Further numeric fields to carry over, for policy.sensors, such as depth_static or observation.effort. In RLDS
    they stand under observation/, and a dataset's description names them (data/README.md)."""
    quality: int = 95
    """Of JPEG, 4:4:4. Images that are encoded already are copied as they are."""
    ray: RayConfig = RayConfig()
    """Workers that share the shards, on machines that see the same files; `workers` then counts for nothing."""
    workers: int = cores.usable()
    """Packed: processes."""
    conventions: str = ""
    """LeRobot: JSON file that says what the numbers mean (data/README.md), or `libero`. Empty: the dataset's own
    meta/robovlms.json."""
    max_left_out_share: float = 0.1
    """LeRobot: share of the episodes that may be left out because parts of them are missing or disagree."""


def main(args: Args) -> None:
    """Convert. Raises ValueError, OSError, ImportError or RuntimeError with the way out."""
    if args.source in ("lerobot", "libero_hdf5"):
        for split in ("training", "validation"):
            if args.source == "lerobot":
                source: packing.FrameSource = lerobot.open_dataset(
                    args.root, split, conventions=args.conventions, max_left_out_share=args.max_left_out_share
                )
            else:
                source = libero_hdf5.LiberoDataset(args.root, split)
            stored = packing.WithSensors(source, args.sensors)
            pack_lerobot(stored, args.out / split, quality=args.quality, workers=args.workers)
        return
    name = args.name or "calvin_" + re.sub(r"[^a-z0-9]+", "_", args.root.resolve().name.lower())
    opened = calvin.open_splits(args.root, functools.partial(calvin.open_dataset, args.root))
    for dataset in opened.values():
        if not dataset.shows_all:
            raise ValueError(
                f"{dataset.name} has pictures of some frames alone (picture_every of its recorder), for which RLDS has "
                "no place; convert a recording with pictures of all."
            )
    splits = {
        {"training": "train", "validation": "val"}[split]: calvin_episodes(dataset, args.quality, args.sensors)
        for split, dataset in opened.items()
    }
    first = next(iter(opened.values()))
    fields = (*CALVIN_FIELDS, *(_sensor_field(first, sensor) for sensor in args.sensors))
    target = rlds_writer.write(args.out, name, fields, splits, file_format=args.file_format)
    logger.info("%s: %d episodes", target, sum(len(dataset.episodes) for dataset in opened.values()))


def _sensor_field(dataset: base.Dataset, name: str) -> Field:
    """As records store a further field. Raises ValueError with the names that there are."""
    shape = dataset.array(name, [dataset.episodes[0].start]).shape[1:]
    return Field(f"steps/observation/{name}", "tensor", "float32", shape)


def calvin_episodes(
    dataset: base.Dataset, quality: int, sensors: Sequence[str] = ()
) -> Iterator[Mapping[str, rlds_writer.Values]]:
    """The annotated spans of a CALVIN split, one after the other, as episodes of `CALVIN_FIELDS`.

    A span's last frame, which CALVIN's annotation includes and training never learns from, is left out: every step that
    is written is learned from, as in other RLDS datasets.
    """
    for episode in tqdm.tqdm(dataset.episodes, desc=dataset.name, unit="episode"):
        ids = np.arange(episode.start, episode.end)
        actions, robot = dataset.actions(ids), dataset.robot_obs(ids)
        state = dataset.proprio(ids)
        last = ids == ids[-1] if len(ids) else np.zeros(0, bool)
        yield {
            "steps/is_first": ids == episode.start,
            "steps/is_last": last,
            "steps/is_terminal": last,
            "steps/reward": last.astype(np.float32),
            "steps/discount": np.ones(len(ids), np.float32),
            "steps/action": np.concatenate(
                [actions[:, :6] * np.array(dataset.action_units, np.float32), (actions[:, 6:] + 1) / 2], axis=1
            ),
            "steps/rel_actions": actions,
            "steps/language_instruction": [episode.instruction.encode()] * len(ids),
            "steps/observation/image": _encoded(dataset, ids, "static", quality),
            "steps/observation/wrist_image": _encoded(dataset, ids, "wrist", quality),
            "steps/observation/state": np.concatenate([state[:, :6], (state[:, 6:] + 1) / 2], axis=1),
            "steps/observation/robot_obs": robot,
            "steps/observation/scene_obs": dataset.scene_obs(ids),
            "steps/observation/frame_id": ids,
            "episode_metadata/task": [episode.task.encode()],
            **{f"steps/observation/{name}": dataset.array(name, ids) for name in sensors},
        }


def _encoded(dataset: base.Dataset, ids: np.ndarray, camera: str, quality: int) -> list[bytes]:
    """Images as JPEG or PNG; those of a packed dataset as they are stored. Empty where there is no such camera."""
    if camera not in dataset.cameras:
        return [b""] * len(ids)
    if isinstance(dataset, packed.PackedDataset):
        return dataset.encoded(ids, camera)
    images = dataset.images(ids, [camera])[camera]
    return [packing.encode_image("jpeg", quality, image, f"{camera} image of a frame") for image in images]


def pack_lerobot(
    source: packing.FrameSource, directory: pathlib.Path, *, quality: int = 95, workers: int = 1
) -> packed.PackedDataset:
    """Write a LeRobotDataset as a packed one; may be stopped and repeated. Raises as `packing.pack`."""
    ids = [np.arange(episode.start, episode.end + 1) for episode in source.episodes]
    return packing.pack(source, directory, frame_ids=np.concatenate(ids), quality=quality, workers=workers)


if __name__ == "__main__":
    logs.to_stderr()
    try:
        settings = cli.read(Args, description=__doc__)
        with spreading.over_files(settings.ray):
            main(settings)
    except KeyboardInterrupt:
        ending.stop("a packed copy keeps its finished shards, other formats begin anew; give the same command again.")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
