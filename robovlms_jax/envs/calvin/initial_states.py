"""The simulator states in which CALVIN's chains start, in each of its four scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from robovlms_jax.envs.calvin import task_chains
from robovlms_jax.envs.calvin.tasks import BLOCKS

INITIAL_ROBOT_OBS = np.array(
    [
        *(0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585),  # tool centre point: xyz, Euler xyz
        0.07999963,  # gripper opening
        *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928),  # arm joints
        1.0,  # last gripper command
    ]
)
"""float64[15], the robot at the start of every chain."""


@dataclasses.dataclass(frozen=True)
class SceneLayout:
    """Where the parts that initial states name are in one of the four scenes."""

    block_order: tuple[str, str, str]
    """Colours of the blocks in scene_obs[6:12], [12:18], [18:24]."""
    slider_left_m: float = 0.28
    """Joint value of the sliding door at its left end."""
    shelf_x_m: tuple[float, float] = (-0.240851662, 0.070341633)
    """x of a block in the left and the right half of the shelf."""
    table_spots_m: tuple[tuple[float, float, float], ...] = (
        (0.0500000896, -0.120000177, 0.459990009),
        (0.229995412, -0.11999514, 0.45999001),
    )
    """xyz of the two places for blocks on the table."""
    table_x_m: tuple[float, float] = (0.0, 0.35)
    """Where blocks lie on the table in training data, range of x; that of y is `TABLE_Y_M` in every scene."""

    def __post_init__(self):
        if sorted(self.block_order) != sorted(BLOCKS):
            raise ValueError(f"block_order={self.block_order} must name each of {BLOCKS} once.")


# D is published. The evaluation has no official initial states in A, B and C: blocks stand where D's do relative to the
# shelf, and on the table where nothing else stands (B has button and lever on the other sides: its spots are mirrored).
SCENES: Mapping[str, SceneLayout] = {
    "A": SceneLayout(("pink", "blue", "red"), table_x_m=(-0.10, 0.35)),
    "B": SceneLayout(
        ("red", "blue", "pink"),
        slider_left_m=0.30,
        shelf_x_m=(-0.05, 0.26),
        table_spots_m=((-0.05, -0.12, 0.45999), (-0.23, -0.12, 0.45999)),
        table_x_m=(-0.28, 0.16),
    ),
    "C": SceneLayout(("blue", "red", "pink"), slider_left_m=0.24, shelf_x_m=(-0.08, 0.23)),
    "D": SceneLayout(("red", "blue", "pink")),
}

TABLE_Y_M = (-0.15, -0.03)
"""Where blocks lie on the table in training data, range of y: as calvin_env's `surfaces`, and x in C and D, too. In
A and B calvin_env lets blocks lie further out, too, where PlayTable has its button."""
_APART_M = 0.1  # between the middles of two blocks, the longest of which measures 0.08
_SHELF_SHIFT_M = 0.04
_SHELF_YZ_M = (0.0924044687, 0.460990009)
_DRAWER_OPEN_M = 0.22
_SWITCH_ON_M = 0.088


def initial_state(condition: task_chains.Condition, scene: str = "D") -> tuple[np.ndarray, np.ndarray]:
    """The simulator state a chain starts in.

    Args:
      condition: symbolic scene with the keys of `task_chains.initial_conditions()`.
      scene: "A" to "D"; D gives the published evaluation's states, to the last digit.
    Returns:
      robot_obs float64[15] and scene_obs float64[24], in the layout of `Env.reset`.
    """
    if scene not in SCENES:
        raise ValueError(f"unknown scene {scene!r}; known scenes: {', '.join(SCENES)}.")
    task_chains.check_condition(condition)
    layout = SCENES[scene]
    generator = np.random.RandomState(condition_seed(condition))
    spots = [np.array(spot) for spot in layout.table_spots_m]
    generator.shuffle(spots)
    red_first = condition["red_block"] == "table"
    table = {"red": spots[0], "blue": spots[1] if red_first else spots[0], "pink": spots[1]}

    scene_obs = np.zeros(24)
    scene_obs[0] = layout.slider_left_m if condition["slider"] == "left" else 0.0
    scene_obs[1] = _DRAWER_OPEN_M if condition["drawer"] == "open" else 0.0
    scene_obs[3] = _SWITCH_ON_M if condition["lightbulb"] else 0.0
    scene_obs[4:6] = condition["lightbulb"], condition["led"]
    for color in BLOCKS:  # the order in which yaws are drawn, in every scene
        # the published bounds: pi/2 added after drawing differs in the last bit of 46 of the 1000 chains' states
        yaw = generator.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
        place = condition[f"{color}_block"]
        position = table[color] if place == "table" else (layout.shelf_x_m[place == "slider_right"], *_SHELF_YZ_M)
        start = 6 + 6 * layout.block_order.index(color)
        scene_obs[start : start + 6] = *position, 0.0, 0.0, yaw
    return INITIAL_ROBOT_OBS.copy(), scene_obs


def resampled(condition: task_chains.Condition, scene: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`initial_state` with every block anew where training data have blocks: on the table anywhere in its range and
    turned any way, in the shelf up to 4 cm to either side. The published states have two spots on the table.
    """
    robot_obs, scene_obs = initial_state(condition, scene)
    layout, placed = SCENES[scene], []
    for color in BLOCKS:
        start = 6 + 6 * layout.block_order.index(color)
        if condition[f"{color}_block"] != "table":
            scene_obs[start] += rng.uniform(-_SHELF_SHIFT_M, _SHELF_SHIFT_M)
            scene_obs[start + 5] = rng.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
            continue
        while True:
            spot = np.array([rng.uniform(*layout.table_x_m), rng.uniform(*TABLE_Y_M)])
            if all(np.linalg.norm(spot - other) > _APART_M for other in placed):
                break
        placed.append(spot)
        scene_obs[start : start + 2] = spot
        scene_obs[start + 5] = rng.uniform(-np.pi, np.pi)
    return robot_obs, scene_obs


def condition_seed(condition: task_chains.Condition) -> int:
    """Seed of an initial condition: FNV-1 (32 bit, offset basis 0) over UTF-16-LE of how Python prints its values.

    That is what the C++ hash of the published protocol computes when it is handed a Python string.
    """
    seed = 0
    for byte in f"dict_values({[condition[key] for key in task_chains.VALUES]!r})".encode("utf-16-le"):
        seed = (seed * 16777619 & 0xFFFFFFFF) ^ byte
    return seed
