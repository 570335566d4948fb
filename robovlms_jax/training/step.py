"""The jitted training and evaluation steps: one program for any mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, PartitionSpec

from robovlms_jax.nn import attended
from robovlms_jax.parallel import cpu, gpu, tpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


class Loss(Protocol):
    """What is minimised: `policies.objective.LossBySource`, or anything of this form on any batch."""

    def count(self, batch: Any) -> Any:
        """float32[] or a tree of them: entries of the batch that count; its micro-batches' sums are divided by it."""
        ...

    def __call__(self, params: Any, batch: Any, key: jax.Array | None, count: Any) -> tuple[jax.Array, Metrics]:
        """Loss float32[] and metrics, `loss` among them, of a micro-batch: sums over the whole batch's `count`."""
        ...


def gradients(
    loss_fn: Loss,
    trainable: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    batch: Any,
    key: jax.Array,
    count: Any,
) -> tuple[dict[str, jax.Array], Metrics]:
    """Gradient of the loss by `trainable` (both flat, as in `TrainState`), and metrics."""

    def loss(trainable):
        return loss_fn(unflatten_dict({**frozen, **trainable}, sep="/"), batch, key, count)

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
    return grads, metrics


def accumulated(
    part: Callable[[Any, Any, jax.Array], Any],
    params: Any,
    batch: Any,
    key: jax.Array,
    mesh: Mesh,
    accumulation: int,
) -> Any:
    """Sum of what `part(params, micro, key)` makes of the batch's micro-batches, one after the other, each with a key
    of its own.

    On a mesh of whole copies (axis `data` only) the devices' sums are added once, after the last micro-batch: left to
    itself the compiler adds the gradients of every micro-batch, which is `accumulation` times the traffic. Where
    parameters are split, each micro-batch's gradient must be scattered for it to fit, and XLA's partitioner fails on
    a program that is half manual.
    """
    if accumulation == 1:
        return part(params, batch, key)
    if mesh.shape["data"] != mesh.size or mesh.size == 1:
        return _scanned(functools.partial(part, params), batch, key, accumulation)

    def of_device(params: Any, batch: Any, key: jax.Array) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        with nn.logical_axis_rules(()):  # constraints speak of all devices' batch
            return jax.lax.psum(_scanned(functools.partial(part, params), batch, key, accumulation), "data")

    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,  # checked, gradients by replicated parameters would be summed in every micro-batch
    )(params, batch, key)


def _scanned(part: Callable[[Any, jax.Array], Any], batch: Any, key: jax.Array, accumulation: int) -> Any:
    # Micro-batch i takes every accumulation-th element: each device keeps working on its own part of the batch.
    micros = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, accumulation)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, jax.tree.map(lambda x: x[0], micros), key)
    )

    def add(total, xs):
        return jax.tree.map(jnp.add, total, part(*xs)), None

    return jax.lax.scan(add, zeros, (micros, keys))[0]


def make_train_step(
    loss_fn: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    skip_nonfinite: bool = False,
    tuned: bool = True,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Compile-once update: (state, batch) -> (state, metrics). The state's buffers are donated.

    A batch whose loss or gradient is not finite changes neither parameters nor optimizer state; metric "nonfinite" is 1
    for it.

    Args:
      loss_fn: what is minimised; it says of what form batches are.
      schedule: update -> learning rate, for the metric of that name.
      state: where its arrays lie fixes where the new ones will.
      accumulation: micro-batches per update; divides the batch. The gradient is that of the whole batch's mean.
      skip_nonfinite: go on with the batch after it, which is one step further. Otherwise the state stays as it is,
        `step` included, whatever comes after (`halted`), so that it can be saved once the host has noticed.
      tuned: compile with `compiler_options`.
    """

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        count = loss_fn.count(batch)

        def part(params: tuple[Any, ...], micro: Any, key: jax.Array):
            trainable, frozen, count = params
            return gradients(loss_fn, trainable, frozen, micro, key, count)

        grads, metrics = accumulated(part, (state.trainable, state.frozen, count), batch, key, mesh, accumulation)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step - state.skipped - state.begun),
        }
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        new = (optax.apply_updates(state.trainable, updates), opt_state)
        return _advance(state, new, finite, skip_nonfinite), metrics | {"nonfinite": 1.0 - finite}

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        with meshes.constrained(mesh), attended.on_cudnn(gpu.has_cudnn(mesh)):
            return update(state, batch)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        train_step,
        in_shardings=(shardings, meshes.batched(mesh)),
        out_shardings=(shardings, meshes.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(state, mesh) if tuned else None,
    )


def compiler_options(state: Any, mesh: Mesh) -> dict[str, Any] | None:
    """Those of a training step that were found better than the compiler's own on devices like the mesh's."""
    if meshes.platform(mesh) == "tpu":
        return tpu.trained(mesh.devices.flat[0])
    return cpu.options("small_kernels", meshes.platform(mesh)) if _is_small(state) else None


_SMALL = 3e7
"""Numbers in a state; AdamW's has three per trained parameter. XLA's library of kernels makes a CPU's step of the twin
(1 million parameters) a quarter slower where it gets more than products, and that of a model of 44 million a fifth
slower where it does not (docs/log.md, 2026-11-22 and 2026-11-26)."""


def _is_small(state: Any) -> bool:
    """Whether a CPU's step spends its time in many small arrays."""
    return sum(x.size for x in jax.tree.leaves(state)) < _SMALL


def _advance(state: TrainState, new: tuple[Any, Any], finite: jax.Array, skip_nonfinite: bool) -> TrainState:
    """The state after a step that would make `new` of trainable parameters and optimizer; a batch that is not finite
    changes neither."""
    good = finite & ~state.halted
    trainable, opt_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), new, (state.trainable, state.opt_state)
    )
    return state.replace(
        step=state.step + (1 if skip_nonfinite else good.astype(jnp.int32)),
        skipped=state.skipped + (~finite if skip_nonfinite else 0),
        halted=state.halted if skip_nonfinite else ~good,
        trainable=trainable,
        opt_state=opt_state,
    )


def make_eval_step(predict: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[TrainState, Any], Any]:
    """Compile-once `predict(params, batch)`, such as `RobotLoss.predict`; results are whole on every host."""

    def eval_step(state: TrainState, batch: Any):
        with meshes.constrained(mesh), attended.on_cudnn(gpu.has_cudnn(mesh)):
            return predict(state.served, batch)

    return jax.jit(eval_step, out_shardings=meshes.replicated(mesh))
