"""What is searched: an experiment's preset, the fields that vary and what says which setting is better."""

from __future__ import annotations

import dataclasses
from typing import Literal

from robovlms_jax import schema
from robovlms_jax.parallel.config import RayConfig
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("search")
class SearchConfig:
    """A search: trials are ordinary runs, one directory each, with other settings."""

    experiment: str = "calvin_abcd"
    """Module of `experiments` whose presets are varied."""
    start: str = "playtable_fixtures"
    """Its preset that every trial begins with; another experiment needs one of its own. `sample` takes seconds."""
    fixed: tuple[str, ...] = ()
    """Fields set alike in every trial, "train.steps=500"; several words after = are several values of a tuple."""
    space: tuple[str, ...] = ()
    """Fields that vary: "optimizer.learning_rate=1e-4,2e-5" (these values), or with a sampler also
    "optimizer.learning_rate=1e-5:1e-3:log", "policy.window=1:8:int", "optimizer.weight_decay=0:0.1" (a range)."""
    out: str = "searches/default"
    """Directory of the search: trials, queue and report. Several processes, on any number of machines that share it,
    take trials from it when they are started with the same settings."""
    objective: str = "validation/loss"
    """Name in the trials' metrics.jsonl; its last value counts, also where a run keeps an earlier checkpoint
    (rollouts.select). "rollouts/score" is what a robot solves."""
    direction: Literal["minimize", "maximize"] = "minimize"
    seeds: int = 1
    """Runs per setting, with train.seed 0, 1, ...; with two or more, the report has intervals and says what is
    noise."""
    trials: int = 0
    """With a sampler: settings to try. Without one, all combinations are."""
    sampler: Literal["grid", "random", "tpe", "gp"] = "grid"
    """grid: all combinations. The others are Optuna's (`pip install -e '.[search]'`)."""
    storage: str = ""
    """Optuna's storage, such as sqlite:///study.db. Empty: the journal file `out`/optuna.log, which processes on
    several machines can share. `optuna-dashboard` opens either."""
    prune: bool = False
    """With a sampler: end trials early that are worse than others were at the same step (asynchronous successive
    halving, Li et al. 2018, arXiv:1810.05934), by every value of the objective in their metrics.jsonl."""
    ray: RayConfig = RayConfig()
    """Workers that take trials from `out`, which their machines share."""
    report: bool = False
    """Only write the report of what is there."""

    def __post_init__(self):
        require(self.seeds >= 1, f"search.seeds={self.seeds} must be at least 1.")
        grid = self.sampler == "grid"
        require(grid or self.trials >= 1, f"search.sampler={self.sampler!r} needs search.trials, how many to try.")
        require(not (grid and self.trials), f"search.trials={self.trials}: a grid tries all combinations; leave it 0.")
        require(not (grid and self.prune), "search.prune needs a sampler of Optuna: a grid has no order to prune by.")
        require(not (grid and self.storage), "search.storage is Optuna's; choose a sampler, or leave it out.")
        require(
            not (self.prune and self.seeds > 1),
            f"search.prune with search.seeds={self.seeds}: a run is compared while it goes on, so it must be the only "
            "one of its setting.",
        )
        require(
            not (self.prune and self.trials == 1),
            "search.prune has no effect with search.trials=1: a trial is ended early where others were better at the "
            "same step, and there is no other. Raise --trials, or leave --prune out.",
        )
