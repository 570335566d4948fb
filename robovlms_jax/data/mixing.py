"""Several datasets as one: their episodes follow each other, their weights say how often each is drawn."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from robovlms_jax.control import robot as robots
from robovlms_jax.data import base, statistics

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Part:
    """One dataset of a mixture.

    weight: relative rate at which windows are drawn from it.
    statistics: by which its actions are brought to the mixture's units.
    """

    name: str
    dataset: base.Dataset
    weight: float
    statistics: statistics.Statistics


class MixtureDataset(base.Dataset):
    """Datasets of different robots behind one interface.

    Actions come in the units of a reference dataset: each part's numbers are shifted and scaled so that their 1 % and
    99 % quantiles fall on the reference's. Normalising by the reference's quantiles then gives what normalising each
    dataset by its own would, and a policy trained on it drives the reference's robot as it is. Binary grippers are
    alike everywhere and pass untouched.

    Cameras are those that any part has; where a part lacks one, its images are black and `has_images` is False.

    Args:
      reference: name of a part.
      image_sizes: camera -> (height, width) that all parts deliver.
    """

    def __init__(self, name: str, parts: Sequence[Part], reference: str):
        names = [part.name for part in parts]
        if reference not in names:
            raise ValueError(f"data.reference={reference!r} is no dataset of the mixture; it has {names}.")
        self.name, self._parts, self._reference = name, tuple(parts), reference
        own = parts[names.index(reference)]
        self.statistics, self.action_units = own.statistics, own.dataset.action_units
        self.image_sizes = self._common_sizes()
        cameras = tuple(robots.Camera(camera, *size) for camera, size in self.image_sizes.items())
        self.robot = dataclasses.replace(own.dataset.robot, cameras=cameras)
        self._require_alike()
        spans = [part.dataset.num_frame_ids for part in parts]
        self._first = np.concatenate([[0], np.cumsum(spans)])
        self.episodes = tuple(
            dataclasses.replace(episode, start=episode.start + first, end=episode.end + first)
            for part, first in zip(parts, self._first.tolist(), strict=False)
            for episode in part.dataset.episodes
        )
        self.groups = tuple(base.Group(part.name, len(part.dataset.episodes), part.weight) for part in parts)
        self.names_tasks = all(part.dataset.names_tasks for part in parts)
        self._stores: dict[tuple[str, str], bool] = {}
        self._affine = [_to_reference(part.statistics, own.statistics) for part in parts]
        self.may_lack_images = any(
            part.dataset.may_lack_images or set(part.dataset.cameras) != set(self.image_sizes) for part in parts
        )
        for camera in self.image_sizes:
            without = [part.name for part in parts if camera not in part.dataset.cameras]
            if without:
                logger.warning("no %s camera in %s: black images, masked", camera, ", ".join(without))

    def _require_alike(self) -> None:
        """Raise ValueError that lists the parts whose actions have other columns than the reference's."""
        wanted = (len(self.robot.action), self.robot.binary)
        wrong = [
            f"{part.name}: {list(part.dataset.robot.action_names)}"
            for part in self._parts
            if (len(part.dataset.robot.action), part.dataset.robot.binary) != wanted
        ]
        if wrong:
            raise ValueError(
                f"the mixture {self.name!r} speaks the actions of {self._reference}, {list(self.robot.action_names)}; "
                f"other columns have {'; '.join(wrong)}. Leave these datasets out, or describe them alike."
            )

    def _common_sizes(self) -> dict[str, tuple[int, int]]:
        sizes: dict[str, dict[tuple[int, int], list[str]]] = {}
        for part in self._parts:
            for camera, size in part.dataset.image_sizes.items():
                sizes.setdefault(camera, {}).setdefault(tuple(size), []).append(part.name)
        wrong = {camera: found for camera, found in sizes.items() if len(found) > 1}
        if wrong:
            raise ValueError(
                f"the mixture {self.name!r} has images of different sizes: {wrong}; set data.image_size (224 is what "
                "most backbones see) to scale them to one."
            )
        return {camera: next(iter(found)) for camera, found in sizes.items()}

    @property
    def parts(self) -> tuple[Part, ...]:
        """The datasets, in the order of `groups`."""
        return self._parts

    def gripper_opening(self, frame_ids: Sequence[int]) -> None:
        """None: the parts measure it in units of their own; ask each of `parts`."""

    @property
    def num_frame_ids(self) -> int:
        return int(self._first[-1])

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        for part, places, ids in self._split(frame_ids):
            there = [camera for camera in cameras if camera in part.dataset.cameras]
            for camera in set(cameras) - set(there):
                for place in places:
                    out[camera][place][:] = 0
            views = {camera: tuple(out[camera][place] for place in places) for camera in there}
            part.dataset.images(ids, there, views)
        return out

    def has_images(self, frame_ids: Sequence[int], camera: str) -> np.ndarray:
        has = np.zeros(len(frame_ids), bool)
        for part, places, ids in self._split(frame_ids):
            if camera in part.dataset.cameras:
                has[places] = part.dataset.has_images(ids, camera)
        return has

    def has_array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        has = np.zeros(len(frame_ids), bool)
        for part, places, _ in self._split(frame_ids):
            if (part.name, name) not in self._stores:
                self._stores[part.name, name] = _stores(part.dataset, name)
            has[places] = self._stores[part.name, name]
        return has

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        def read(part: Part, ids: np.ndarray) -> np.ndarray:
            values = np.array(part.dataset.array(name, ids))
            if name == "rel_actions":
                scale, shift = self._affine[self._parts.index(part)]
                values[:, self.robot.scaled] = values[:, self.robot.scaled] * scale + shift
            return values

        return self._gather(frame_ids, read)

    def proprio(self, frame_ids: Sequence[int]) -> np.ndarray:
        return self._gather(frame_ids, lambda part, ids: part.dataset.proprio(ids))

    def _gather(self, frame_ids: Sequence[int], read: Callable[[Part, np.ndarray], np.ndarray]) -> np.ndarray:
        """What `read` says of the frames of each part, in the order of `frame_ids`."""
        split = self._split(frame_ids)
        order = np.concatenate([places for _, places, _ in split])
        return np.concatenate([read(part, ids) for part, _, ids in split])[np.argsort(order)]

    def _split(self, frame_ids: Sequence[int]) -> list[tuple[Part, np.ndarray, np.ndarray]]:
        """(part, where in `frame_ids`, ids within the part) of every part that has some of them."""
        ids = np.asarray(frame_ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self._first[-1]):
            raise ValueError(f"{self.name} has frames 0 to {self._first[-1] - 1}; asked for {ids.tolist()[:8]}.")
        owner = np.searchsorted(self._first, ids, side="right") - 1
        split = ((i, np.flatnonzero(owner == i)) for i in np.unique(owner))
        return [(self._parts[i], places, ids[places] - self._first[i]) for i, places in split]

    def __reduce__(self):
        return MixtureDataset, (self.name, self._parts, self._reference)


def _stores(dataset: base.Dataset, name: str) -> bool:
    """Whether it has a numeric field of that name; one unreadable frame is no reason to say no."""
    try:
        dataset.array(name, [dataset.episodes[0].start])
    except base.CorruptFrameError:
        return True
    except ValueError:
        return False
    return True


def _to_reference(own: statistics.Statistics, reference: statistics.Statistics) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) float32, one per scaled dimension, that take `own`'s quantiles to `reference`'s."""
    (low, high), (to_low, to_high) = (np.array(x.bounds()) for x in (own, reference))
    scale = (to_high - to_low) / (high - low)
    return scale.astype(np.float32), (to_low - low * scale).astype(np.float32)


def shares(groups: Sequence[base.Group], num_windows: Sequence[int]) -> str:
    """A table: the weight, the windows and the effective share of each dataset, for the log."""
    total = sum(group.weight for group in groups)
    lines = [f"{'dataset':<56} {'weight':>10} {'windows':>12} {'share':>8} {'per pass':>9}"]
    # "per pass": how often a window of this dataset is seen while as many windows are drawn as there are.
    every = sum(num_windows)
    for group, count in zip(groups, num_windows, strict=True):
        share = group.weight / total
        often = share * every / count if count else float("nan")
        lines.append(f"{group.name:<56} {group.weight:>10.4g} {count:>12,} {share:>8.2%} {often:>9.2f}")
    return "\n".join(lines)
