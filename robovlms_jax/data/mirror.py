"""Mirrored training samples: pictures from right to left, and what that means for actions, state and words.

A mirrored picture shows another world, in which what was done to the left is done to the right. Reflecting the axis n
that points to the side turns the n component of positions and motions round, and of rotations, which are pseudovectors,
every component but that of n; Euler angles xyz (R = Rz Ry Rx) change sign one by one in the same way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from robovlms_jax.control.robot import CALVIN, Dimension, RobotSpec

_PAIRS = (
    *(("left", "right"), ("leftmost", "rightmost"), ("leftward", "rightward"), ("leftwards", "rightwards")),
    *(("leftside", "rightside"), ("lefthand", "righthand"), ("lefthanded", "righthanded")),
    ("clockwise", "counterclockwise"),
)
_OTHER = {word: other for pair in _PAIRS for word, other in (pair, pair[::-1])}
_OTHER |= {f"{turn}{gap}clockwise": "clockwise" for turn in ("anti", "counter") for gap in ("", "-", " ")}
_ANY = "|".join(sorted(_OTHER, key=len, reverse=True))
_WORD = re.compile(rf"(?<![A-Za-z])({_ANY})(?![A-Za-z])", re.IGNORECASE)  # in left_arm and left2, too
_KOREAN = {"왼": "오른", "오른": "왼", "좌": "우", "우": "좌", "시계": "반시계", "반시계": "시계"}
_PARTS = "쪽|편|손|팔|발|다리|어깨|그리퍼|집게|바퀴"
_SIDE = re.compile(  # with a space too many, as people type, where no other word is meant
    rf"(왼|오 ?른)(?= ?(?:{_PARTS}))|(좌|우)(?=측|회전)|(?<![가-힣])(좌|우)(?=상단|하단| 측| 회전)|(반?시계)(?= ?방향)"
)


@dataclasses.dataclass(frozen=True)
class Mirror:
    """share: of the samples that are mirrored. action: float32[A], state: float32[P]: what numbers are multiplied by,
    +1 or -1."""

    share: float
    action: np.ndarray
    state: np.ndarray

    def chosen(self, draws: np.ndarray) -> np.ndarray:
        """bool[B]: which samples are mirrored, by their random numbers uint32[B]; those of sentences' choice hardly
        matter, for these are the upper half of the bits."""
        return (draws.astype(np.uint32) >> 16) / 2**16 < self.share

    def statistics(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Statistics of actions (`actions.statistics.summarize`) of the samples with the mirrored ones among them;
        quantiles hold those of either, so that a motion is as large to both sides."""
        turned = self.action < 0
        mean, keep = np.asarray(values["mean"]), 1 - 2 * self.share
        out = {name: np.array(x, np.float64) for name, x in values.items()}
        out["mean"] = np.where(turned, keep * mean, mean)
        out["std"] = np.where(turned, np.sqrt(out["std"] ** 2 + (1 - keep**2) * mean**2), out["std"])
        for low, high in (("min", "max"), ("q01", "q99")):
            reach = np.maximum(-out[low], out[high])
            out[low], out[high] = np.where(turned, -reach, out[low]), np.where(turned, reach, out[high])
        return out


def of_robot(robot: RobotSpec, share: float, axis: str, *, state: Collection[int]) -> Mirror:
    """The mirror of a robot's samples.

    Args:
      axis: "x" or "y", the one of its actions' frame that points to the side in the pictures; "": y, of dimensions that
        are in the frame of the robot's base, which looks along x.
      state: which of the state's numbers are learned from; of the others nothing need be known.
    Raises:
      ValueError: says which camera or dimension has no known mirror image.
    """
    why = f"data.augment.mirror={share}: samples of robot {robot.name!r} cannot be mirrored, for"
    if (robot.name, robot.action) == (CALVIN.name, CALVIN.action):
        raise ValueError(
            f"{why} its static camera looks at 36 degrees to the axes of its actions, so that no axis points to the "
            "side in its pictures. Leave data.augment.mirror at 0."
        )
    sided = [name for name in robot.camera_names if re.search("left|right", name)]
    if sided:
        raise ValueError(f"{why} each of its cameras {sided} would show what another one sees.")
    actions = _signs(robot.action, range(len(robot.action)), axis, why)
    try:
        return Mirror(share, actions, _signs(robot.state, state, axis, why))
    except ValueError as error:
        raise ValueError(
            f"{error} That is its state, which policy.proprio.enabled=False and policy.auxiliary.ahead.loss_weight=0 "
            "leave out."
        ) from None


def _signs(dimensions: Sequence[Dimension], used: Collection[int], axis: str, why: str) -> np.ndarray:
    """float32[n], +1 or -1; +1 of numbers that are not used."""
    out = []
    for place, dimension in enumerate(dimensions):
        name, quantity, frame = dimension.name, dimension.quantity, dimension.frame
        if quantity == "gripper" or place not in used:
            out.append(1.0)
            continue
        if quantity not in ("position", "euler_xyz", "axis_angle", "base") or re.search("left|right", name):
            raise ValueError(f"{why} it is not known what becomes of {name!r} ({quantity}).")
        if frame == "tcp":
            raise ValueError(f"{why} {name!r} is in the tool's own axes, and how these lie is not said.")
        if not axis and frame != "base":
            raise ValueError(
                f"{why} {name!r} is in {f'frame {frame!r}' if frame else 'axes that nobody names'}: say with "
                "data.augment.mirror_axis which one points to the side in the pictures."
            )
        side = "xyz".index(axis or "y")
        if quantity == "base":
            turns, moves = re.search("yaw|theta|turn|angular", name), re.search(r"(^|_)v?[xy]$", name)
            if not (turns or moves):
                raise ValueError(f"{why} it is not known what becomes of {name!r} ({quantity}).")
            out.append(-1.0 if turns or name.endswith("xyz"[side]) else 1.0)
            continue
        component = sum(1 for other in dimensions[:place] if other.quantity == quantity) % 3
        out.append(-1.0 if (component == side) == (quantity == "position") else 1.0)
    return np.array(out, np.float32)


def words(sentence: str) -> str:
    """The sentence with left for right and right for left, in English and Korean, in the letters' case of the word."""

    def other(match: re.Match) -> str:
        word = match[0]
        found = _OTHER[word.lower()]
        return found.upper() if word.isupper() else found.capitalize() if word[0].isupper() else found

    return _SIDE.sub(lambda match: _KOREAN[match[0].replace(" ", "")], _WORD.sub(other, sentence))
