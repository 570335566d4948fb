"""What int8 weights change in a trained PlayTable policy: bytes, and actions on the same observations.

    python -m benchmarks.int8 --checkpoint runs/playtable_fixtures --image_size 96 64

Both policies see every picture of trials that the first one plays; JSON. Success before and after:
`experiments.evaluate`, once as it is and once with `--weights int8`.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np

from benchmarks import machine
from experiments import calvin_abcd
from robovlms_jax import cli
from robovlms_jax.evaluation import chains
from robovlms_jax.playtable.env import PlayTable
from robovlms_jax.runs import load


@dataclasses.dataclass(frozen=True)
class Args:
    """Which policy, and on how much."""

    checkpoint: str
    """Run directory or one of its checkpoints/<step> folders."""
    image_size: tuple[int, int] = (200, 84)
    """Pixels of static and wrist camera."""
    trials: int = 8
    """Single tasks, taking turns."""
    steps: int = 20
    """Control steps of each."""
    out: pathlib.Path | None = None
    """Write the JSON here, too."""


def measure(args: Args) -> dict:
    """Bytes, and the differences of actions: per step and chunk, millimetres and degrees of CALVIN's scales."""
    plain, stored = (load.load_policy(args.checkpoint, weights=weights) for weights in (None, "int8"))
    env = PlayTable(image_sizes=dict(zip(("static", "wrist"), args.image_size, strict=True)))
    chosen = chains.single_tasks(calvin_abcd.FIXTURE_TASKS, args.trials)
    pairs = []
    for trial in chains.chain_trials(chosen, scene="D"):
        env.reset(**trial.start)
        for policy in (plain, stored):
            policy.reset(trial.instructions[0])
        for _ in range(args.steps):
            seen = env.observe()
            actions = plain.act(seen).actions
            pairs.append((actions, stored.act(seen).actions))
            env.step(actions[0])
    before, after = (np.stack(x) for x in zip(*pairs))  # [N, C, 7]
    move = np.linalg.norm((after - before)[..., :3], axis=-1) * 20
    turn = np.degrees(np.linalg.norm((after - before)[..., 3:6], axis=-1) * 0.05)
    flat = [x[..., :6].reshape(len(x), -1) for x in (before, after)]
    norms = np.linalg.norm(flat[0], axis=1) * np.linalg.norm(flat[1], axis=1)
    size = [sum(x.nbytes for x in jax.tree.leaves(policy._batched.params)) for policy in (plain, stored)]
    return {
        "observations": len(before),
        "bytes": {"before": size[0], "int8": size[1]},
        "millimetres": {"mean": float(move.mean()), "p95": float(np.quantile(move, 0.95)), "max": float(move.max())},
        "degrees": {"mean": float(turn.mean()), "p95": float(np.quantile(turn, 0.95)), "max": float(turn.max())},
        "gripper_flips": float((before[..., 6] != after[..., 6]).mean()),
        "cosine": float(((flat[0] * flat[1]).sum(1) / norms).mean()),
        "machine": machine.describe(),
    }


if __name__ == "__main__":
    given = cli.read(Args, description=__doc__)
    machine.report(measure(given), given.out)
