"""How much each parameter of a finished run matters for what it learned: the diagonal of the Fisher information."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.policies import objective
from robovlms_jax.runs import load, resuming, steps
from robovlms_jax.runs import setup as setups
from robovlms_jax.training import checkpoints, consolidation, trainable


def measure(run: pathlib.Path, samples: int, *, earlier: pathlib.Path | None = None, decay: float = 0.9) -> None:
    """Write `consolidation.FILE` into a run's directory.

    It is the mean over training segments of the squared gradient of each one's own loss, with the actions that were
    recorded (the empirical Fisher): a batch's mean gradient, squared, would be smaller by up to the batch's size.

    Args:
      samples: segments, drawn without repetition; all where there are fewer.
      earlier: run whose file counts `decay` times beside the new one; None: nothing was learned before.
    Raises:
      ValueError: the run's last stage trained on no robot's data.
    """
    point = resuming.open_point(run)
    setup = setups.prepare(point.config, point)
    stage = setup.stages[-1]
    losses = steps.make_loss(setup.config, setup.model, stage).losses
    if objective.ROBOT not in losses:
        raise ValueError(
            f"the last stage of {run} trained on {', '.join(sorted(losses))} alone; what matters for the robot is "
            f"measured on a stage with {objective.ROBOT} among train.sources."
        )
    loss = losses[objective.ROBOT]
    _, params, _ = load.open_model(checkpoints.locate(run), dtype=setup.config.backbone.dtype)
    learned, frozen = trainable.split(flatten_dict(params, sep="/"), stage.trainable)
    count = min(samples, len(setup.train))
    chosen = np.sort(np.random.default_rng(0).permutation(len(setup.train))[:count])
    total: dict[str, Any] = {path: jnp.zeros(x.shape, jnp.float32) for path, x in learned.items()}
    add = jax.jit(lambda total, batch: _add(loss, learned, frozen, total, batch))
    for rows in np.array_split(chosen, -(-count // 16)):
        padded = np.resize(rows, 16)  # of one shape; what repeats is weighed by 0
        batch = setup.train.evaluation_batch(padded)
        total = add(total, (batch, jnp.arange(16) < len(rows)))
    found = {path: np.asarray(x) / count for path, x in total.items()}
    before = consolidation.read(earlier) if earlier is not None else {}
    consolidation.write(run, consolidation.added(before, found, decay))


def _add(loss: objective.SourceLoss, learned: dict, frozen: dict, total: dict, batch: Any) -> dict[str, jax.Array]:
    """`total` and the squared gradients of a batch's rows, one after the other: memory for one gradient more."""

    def one(total: dict, row: Any) -> tuple[dict, None]:
        sample, counts = row
        single = jax.tree.map(lambda x: x[None], sample)
        grads = jax.grad(lambda p: loss(unflatten_dict({**frozen, **p}, sep="/"), single)[0])(learned)
        return jax.tree.map(lambda t, g: t + counts * jnp.square(g.astype(jnp.float32)), total, grads), None

    return jax.lax.scan(one, total, batch)[0]
