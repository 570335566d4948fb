"""A dataset whose actions are given in another representation: the border of `actions.representations` towards data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from robovlms_jax.actions import representations
from robovlms_jax.data import base


class RepresentedDataset(base.Dataset):
    """`own`, with actions in the representation `name`; everything else is as it is there. Without statistics: those of
    `own` are of other numbers."""

    def __init__(self, own: base.Dataset, name: representations.Name):
        self.own, self._name = own, name
        self._representation = representations.make(name, own.robot)
        self.name, self.image_sizes, self.episodes = own.name, own.image_sizes, own.episodes
        self.robot = self._representation.robot
        self.action_units = tuple(self.robot.action[column].measure[0] for column in self.robot.scaled)
        self.may_lack_images, self.groups, self.names_tasks = own.may_lack_images, own.groups, own.names_tasks

    def images(
        self, frame_ids: Sequence[int], cameras: Sequence[str], out: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Mapping[str, Sequence[np.ndarray]]:
        return self.own.images(frame_ids, cameras, out)

    def has_images(self, frame_ids: Sequence[int], camera: str) -> np.ndarray:
        return self.own.has_images(frame_ids, camera)

    @property
    def shows_all(self) -> bool:
        return self.own.shows_all

    def shown(self, frame_ids: Sequence[int]) -> np.ndarray:
        return self.own.shown(frame_ids)

    def has_array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        return self.own.has_array(name, frame_ids)

    def array(self, name: str, frame_ids: Sequence[int]) -> np.ndarray:
        return self.actions(frame_ids) if name == "rel_actions" else self.own.array(name, frame_ids)

    def actions(self, frame_ids: Sequence[int]) -> np.ndarray:
        """As everywhere. Raises CorruptFrameError for a frame whose rotation is none (a quaternion of zeros)."""
        actions = self._representation.encode(self.own.actions(frame_ids), self.own.proprio(frame_ids))
        return base.require_finite(actions, frame_ids, f"actions that are {self._name}", self.name)

    def proprio(self, frame_ids: Sequence[int]) -> np.ndarray:
        return self.own.proprio(frame_ids)

    def gripper_opening(self, frame_ids: Sequence[int]) -> np.ndarray | None:
        return self.own.gripper_opening(frame_ids)

    def __reduce__(self):
        return RepresentedDataset, (self.own, self._name)


def represented(dataset: base.Dataset, name: representations.Name) -> base.Dataset:
    """The dataset, its actions in a representation. Raises ValueError where its robot has none such."""
    return dataset if name == "robot" else RepresentedDataset(dataset, name)


def own(dataset: base.Dataset) -> base.Dataset:
    """The dataset with the robot's own actions."""
    return dataset.own if isinstance(dataset, RepresentedDataset) else dataset
