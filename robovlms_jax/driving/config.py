"""What is recorded in the driving simulator, and how a policy is driven there afterwards."""

from __future__ import annotations

import dataclasses

from robovlms_jax import schema
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("recording")
class RecordingConfig:
    """Drives of the expert. Scenarios take turns."""

    episodes: int = 480
    """Of the training split, recorded to data.root before the run unless they are there. 0: nothing is recorded."""
    validation_episodes: int = 40
    """Of the validation split, in rooms of their own."""
    wordings: int = 24
    """Sentences of each episode; a training sample has one of them (data.vary_language)."""
    disturbance: float = 0.3
    """Share of the 0.4 s spans in which the base is pushed off course, by up to 0.35 m/s and 0.9 rad/s. The recorded
    action is what the expert wanted, so a policy sees how to come back (Laskey et al. 2017, arXiv:1703.09327)."""
    max_steps: int = 150
    """Control steps an expert may take."""
    seed: int = 0

    def __post_init__(self):
        require(self.episodes >= 0, f"recording.episodes={self.episodes} must not be negative.")
        for field in ("validation_episodes", "wordings", "max_steps"):
            require(getattr(self, field) >= 1, f"recording.{field}={getattr(self, field)} must be at least 1.")
        require(0 <= self.disturbance <= 1, f"recording.disturbance={self.disturbance} must lie in [0, 1].")


@dataclasses.dataclass(frozen=True)
@schema.checked("drives")
class DrivesConfig:
    """Closed loop after training: every scenario in new rooms, asked in words of training and in held-out ones, bare
    and through the deployment's safety layer."""

    trials: int = 240
    """Of each table; scenarios take turns. 0: no drives."""
    max_steps: int = 150
    """Control steps of 0.1 s."""
    horizon: int = 3
    """Actions of each predicted chunk that are executed."""
    rooms: int = 80
    """Side by side."""
    films: int = 8
    """Drives filmed for the report."""

    def __post_init__(self):
        for field in ("trials", "films"):
            require(getattr(self, field) >= 0, f"drives.{field}={getattr(self, field)} must not be negative.")
        for field in ("max_steps", "horizon", "rooms"):
            require(getattr(self, field) >= 1, f"drives.{field}={getattr(self, field)} must be at least 1.")
