"""Evaluation with and without a simulator."""

from __future__ import annotations

import dataclasses
from typing import Literal

from robovlms_jax import schema
from robovlms_jax.control.execution import Execution
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("evaluation")
class EvaluationConfig:
    """Evaluation on the validation split, without a simulator."""

    batches: int = 50
    """Batches per evaluation; 0: the whole split."""
    episodes: int = 3
    """Episodes whose predicted and recorded actions are drawn in the report."""

    def __post_init__(self):
        for field in ("batches", "episodes"):
            require(getattr(self, field) >= 0, f"evaluation.{field}={getattr(self, field)} must not be negative.")


@dataclasses.dataclass(frozen=True)
@schema.checked("rollouts")
class RolloutConfig:
    """Closed loop on PlayTable during and after training. Its numbers are not CALVIN's."""

    trials: int = 0
    """Rollouts per evaluation: the first of the 1000 official chains, or single tasks; 0: no rollouts."""
    tasks: tuple[str, ...] = ()
    """Instead of chains: trials of these single tasks, taking turns."""
    scene: Literal["A", "B", "C", "D"] = "D"
    max_steps: int = 360
    """Control steps per task."""
    execution: Execution = Execution()
    image_size: tuple[int, int] = (200, 84)
    """Pixels of static and wrist camera; what the training data had."""
    tables: int = 16
    """Tables side by side."""
    films: int = 2
    """Rollouts filmed for the report, failures first."""
    rrd: bool = False
    """Write what is filmed to rollouts.rrd, too, for the Rerun viewer (`pip install -e '.[rerun]'`)."""
    every: int = 0
    """Steps between rollouts during training; 0: only at the end."""
    select: Literal["last", "best"] = "last"
    """Which checkpoint a run directory stands for when it is opened: the last, or the one with the best rollouts so
    far, which is then kept in best/ (the two strategies of arXiv:2412.14058)."""

    def __post_init__(self):
        for field in ("trials", "films", "every"):
            require(getattr(self, field) >= 0, f"rollouts.{field}={getattr(self, field)} must not be negative.")
        for field in ("max_steps", "tables"):
            require(getattr(self, field) >= 1, f"rollouts.{field}={getattr(self, field)} must be at least 1.")
        require(not self.rrd or self.films > 0, "rollouts.rrd holds what is filmed; set rollouts.films above 0.")
        require(
            self.select == "last" or self.trials > 0,
            "rollouts.select=best needs rollouts to choose by; set rollouts.trials (and rollouts.every).",
        )
