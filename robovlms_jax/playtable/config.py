"""Demonstrations that scripted experts record on PlayTable."""

from __future__ import annotations

import dataclasses

from robovlms_jax import schema
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("demonstrations")
class DemonstrationConfig:
    """Scripted demonstrations on PlayTable, the embedded simulator."""

    episodes: int = 0
    """Training chains. For a training run: recorded to data.root before it, unless they are there; 0: none."""
    validation_episodes: int = 100
    """Validation chains."""
    tasks: tuple[str, ...] = ()
    """Task ids to demonstrate; empty: all 34."""
    scenes: tuple[str, ...] = ("A", "B", "C")
    """Tables of the training split; chains take turns."""
    random_scenes: int = 0
    """This many more training tables, their parts placed and coloured at random: with three tables alone, a policy
    learns places by heart instead of looking."""
    validation_scene: str = "D"
    """Table of the validation split."""
    chain_length: int = 5
    """Tasks per chain; a chain ends early when no task of the list is possible or the expert fails."""
    max_steps: int = 200
    """Control steps an expert may take for one task."""
    disturbance: float = 0.0
    """Share of the thirds of a second in which the hand is pushed off course, by up to 5 cm. The recorded action is the
    one that the expert wanted, so a policy sees how to come back (Laskey et al. 2017, arXiv:1703.09327)."""
    start_spread: float = 0.0
    """Metres by which the hand is moved from CALVIN's resting pose before a chain begins, at most: so far along x, a
    quarter as far along y and z. When all begin at one place, where the hand is soon tells where it is going, and a
    policy need not look."""
    picture_every: int = 1
    """Training chains are rendered where tasks begin and at every so many steps, no more: neighbouring frames look
    alike, so that the same time shows more demonstrations. A policy of policy.window 1 learns from what it sees there
    and from all actions that follow; larger windows need 1."""
    image_size: tuple[int, int] = (200, 84)
    """Pixels of static and wrist camera."""
    tables: int = 16
    """Tables simulated side by side; a GPU takes hundreds."""
    seed: int = 0

    def __post_init__(self):
        require(self.episodes >= 0, f"episodes={self.episodes} must not be negative.")
        for field in ("validation_episodes", "chain_length", "max_steps", "tables", "picture_every"):
            require(getattr(self, field) >= 1, f"{field}={getattr(self, field)} must be at least 1.")
        require(self.random_scenes >= 0, f"random_scenes={self.random_scenes} must not be negative.")
        require(0 <= self.disturbance <= 1, f"disturbance={self.disturbance} must lie in [0, 1].")
        require(min(self.image_size) >= 8, f"image_size={self.image_size} must be at least 8 pixels each.")
        require(0 <= self.start_spread <= 0.3, f"start_spread={self.start_spread} must lie in [0, 0.3] metres.")
