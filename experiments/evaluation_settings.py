"""What `evaluate` is asked: its settings, what the official protocol fixes, and what a checkpoint's own run says."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from robovlms_jax import cli, schema
from robovlms_jax.control.asynchronous import AsyncConfig
from robovlms_jax.control.execution import Execution
from robovlms_jax.envs.calvin import tasks as calvin_tasks
from robovlms_jax.parallel.config import RayConfig
from robovlms_jax.runs import load, played

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to roll out, where, and how often."""

    checkpoint: str
    """Run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME."""
    env: Literal["playtable", "calvin", "simpler"] = "playtable"
    """playtable: the embedded simulator (its numbers are not CALVIN's). calvin: a checkout of the real one."""
    out: str = ""
    """Where results go. Empty: rollouts/ of the run, or of a checkpoint that was copied alone; there a folder for every
    checkpoint (its step and a fingerprint of its content) and in it one for every setup."""
    protocol: Literal["custom", "official"] = "custom"
    """official: CALVIN's benchmark as published: all 1000 chains, its own validation sentences, the first action of
    every chunk, 360 steps per task (calvin). custom: what the other fields say."""
    chains: int = 100
    """How many of the 1000 official chains (the first ones), or of a SimplerEnv task's layouts; 0: all."""
    tasks: tuple[str, ...] = ()
    """Single tasks instead of chains: as many trials as `chains` says, taking turns, from random initial states they
    are possible in (playtable, calvin)."""
    max_steps: int = 360
    """Control steps per task of a chain."""
    execution: Execution = Execution()
    asynchronous: AsyncConfig = AsyncConfig()
    """With a latency: when the policy is asked and how its late answers follow each other, in place of `execution`."""
    latency_ms: float = -1.0
    """How late every answer of the policy comes, on the simulator's clock; below 0: there is no such clock, simulator
    and policy wait for each other, and `asynchronous` is not read."""
    scene: Literal["A", "B", "C", "D"] = "D"
    """Table to evaluate on (playtable, and calvin without a split)."""
    train_scenes: tuple[str, ...] = ()
    """Scenes the policy was trained on, to tell seen from unseen in the report."""
    held_out: bool = False
    """Ask in wordings that training data never use. Without it, calvin asks the benchmark's own validation sentences
    where calvin_root has them (a checkout of mees/calvin), and everything else is asked in wordings of training."""
    processes: int = 2
    """Environments side by side: one simulator process each (calvin, simpler), or tables in one jitted call
    (playtable)."""
    films: int = 2
    """Rollouts to film, failures first, of the first trials (25 for each film)."""
    on_device: bool = False
    """Policy, tables and checker in one program (playtable): the same results, without films. Worth its compilation
    where many trials are played, most of all on an accelerator. Tables are split over devices, of CPUs over cores."""
    ray: RayConfig = RayConfig()
    """Workers that share the trials, each with a policy and `processes` simulators of its own."""
    rrd: str = ""
    """A file such as rollouts.rrd: what is filmed, for the Rerun viewer (`pip install -e '.[rerun]'`)."""
    weights: load.Weights | None = None
    """How the backbone's parameters are kept, such as int8; None: in the type that it computes in."""
    image_size: tuple[int, int] = (200, 84)
    """Pixels of playtable's static and wrist camera; what the training data had."""
    calvin_root: str = ""
    """Checkout of mees/calvin or mees/calvin_env (docs/calvin.md)."""
    calvin_split: str = ""
    """Folder of a published split, whose stored cameras are then used."""
    egl: bool = False
    """Render CALVIN on the GPU."""
    fresh_process: bool = False
    """Start CALVIN's process anew for every chain, so that a chain run again repeats itself to the last bit."""
    simulator_python: str = sys.executable
    """Interpreter for the simulator's processes, if this one lacks its packages."""
    simpler_task: str = "widowx_spoon_on_towel"
    """Task of SimplerEnv."""
    simpler_statistics: str = ""
    """JSON with the training data's action quantiles q01 and q99, as OpenVLA and RoboVLMs publish them, for policies
    that act in units of these. Empty: the policy acts in metres and radians, as those that were trained here do."""

    def __post_init__(self):
        for field in ("chains", "films"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        if self.rrd and not self.films:
            raise ValueError("rrd holds what is filmed; set films above 0.")
        if self.processes < 1:
            raise ValueError(f"processes={self.processes} must be at least 1.")
        if self.latency_ms >= 0 and self.execution != Execution():
            raise ValueError("execution and latency_ms exclude each other: with a latency, `asynchronous` says it all.")
        if self.latency_ms < 0 and self.asynchronous != AsyncConfig():
            raise ValueError("asynchronous is read with latency_ms of 0 or more alone; set it.")
        if self.on_device and (self.films or self.latency_ms >= 0):
            raise ValueError("on_device films nothing and knows no latency: pass --films 0 and no latency_ms.")
        unknown = sorted(set(self.tasks) - set(calvin_tasks.TASKS))
        if unknown:
            hint = schema.nearest(unknown[0], calvin_tasks.TASKS)
            raise ValueError(f"tasks has unknown {unknown}{hint} Known: {', '.join(calvin_tasks.TASKS)}.")
        if self.env == "calvin" and not self.calvin_root:
            raise ValueError("env calvin needs calvin_root, a checkout of mees/calvin_env (see docs/calvin.md).")
        for field in dataclasses.fields(self):
            owner = ONLY_FOR.get(field.name, self.env)
            if self.env != owner and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} is for env {owner}; {self.env} has no use for it.")
        if self.protocol == "official":
            _require_official(self)


ONLY_FOR = {
    **dict.fromkeys(("calvin_split", "egl", "fresh_process"), "calvin"),
    **dict.fromkeys(("image_size", "on_device"), "playtable"),
    "simpler_statistics": "simpler",
}
"""Field -> the one env that reads it."""

OFFICIAL = {"chains": 0, "execution": Execution("first")}
OFFICIAL_LABEL = "official (1000 chains, the benchmark's sentences, first action of every chunk, 360 steps per task)"


def _require_official(config: EvaluateConfig) -> None:
    """Nothing that was asked for contradicts the protocol, which sets chains and execution itself."""
    defaults = {field.name: field.default for field in dataclasses.fields(EvaluateConfig)}
    allowed = {
        "env": ("calvin",),
        "tasks": ((),),
        "held_out": (False,),
        "scene": ("D",),
        "max_steps": (defaults["max_steps"],),
        "chains": (defaults["chains"], 0, 1000),
        "latency_ms": (defaults["latency_ms"],),
        "execution": (defaults["execution"], OFFICIAL["execution"]),
    }
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise _contradicts(name, getattr(config, name))


def require_official_flags(config: EvaluateConfig, arguments: Sequence[str]) -> None:
    """`_require_official` for what was typed although it is a field's default, as `--chains 100` is."""
    typed = {"chains": config.chains in (0, 1000), "execution.mode": config.execution.mode == "first"}
    for name, fits in typed.items():
        if not fits and cli.names_flag(arguments, name):
            raise _contradicts(name, config.chains if name == "chains" else config.execution.mode)


def _contradicts(name: str, value: Any) -> ValueError:
    return ValueError(
        f"protocol official does not go with {name}={value!r}: it is all 1000 chains on scene D of env calvin, with "
        f"execution.mode first and 360 steps per task. Leave {name} out, or choose protocol custom."
    )


def of_checkpoint(arguments: Sequence[str]) -> EvaluateConfig | type[EvaluateConfig]:
    """The settings that a command line starts from: what the run of the checkpoint that it names says of its own
    rollouts, in playtable and calvin; the defaults for another robot (simpler) and for the official protocol, which
    says it all itself.

    Raises FileNotFoundError, ValueError: there is no such checkpoint, or it cannot be read.
    """
    checkpoint = cli.value_of(arguments, "checkpoint")
    if checkpoint is None or {"--help", "-h"} & set(arguments):
        return EvaluateConfig
    start = EvaluateConfig(checkpoint)
    env = cli.value_of(arguments, "env") or start.env
    if env not in ("playtable", "calvin") or cli.value_of(arguments, "protocol") == "official":
        return EvaluateConfig
    run = load.load_config(checkpoint)
    known = played.of(run)
    own = known.asking(env)
    if cli.value_of(arguments, "latency_ms") is not None:
        del own["execution"]  # `asynchronous` says it
        played.say_no_retry(known)
    if env == "calvin":  # its tables are no PlayTable's, and its simulators are processes
        return dataclasses.replace(start, **own)
    if run.rollouts.trials:
        own["processes"] = min(run.rollouts.tables, run.rollouts.trials)
    if run.demonstrations.episodes:
        own["train_scenes"] = run.demonstrations.scenes
    return dataclasses.replace(start, **own)


def say_taken(config: EvaluateConfig, start: EvaluateConfig | type[EvaluateConfig]) -> None:
    """One line in the log on what the checkpoint decided."""
    if isinstance(start, type):
        return
    defaults = EvaluateConfig(config.checkpoint)
    taken = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if getattr(defaults, field.name) != value == getattr(start, field.name):
            words = value.label if isinstance(value, Execution) else " ".join(map(str, np.atleast_1d(value)))
            taken.append(f"{field.name} {words}")
    if taken:
        log.info("as in the checkpoint's run: %s", ", ".join(taken))
