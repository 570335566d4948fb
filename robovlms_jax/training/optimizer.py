"""Optimizers and learning-rate schedules: optax's, by configuration, with rates of their own for parts of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from robovlms_jax.nn.stack import STACKED
from robovlms_jax.training import consolidation
from robovlms_jax.training.config import OptimizerConfig

Params = Mapping[str, jax.Array]
"""Flat: path -> array. Layers of one tower are stacked, with "/layers/" in their path, or "/cross_layers/"."""


class AveragedState(NamedTuple):
    """State of an optimizer that keeps a moving average of parameters beside them. ema: as the trainable ones."""

    optimizer: Any
    ema: Any


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate. Warm-up multiplies by min(1, step / warmup_steps), as upstream's `constant` schedule
    does."""

    def scale(step):
        after = jnp.maximum(step - config.warmup_steps, 0)
        length = max(steps - config.warmup_steps, 1)
        if config.schedule == "cosine":
            return optax.cosine_decay_schedule(1.0, length, alpha=config.min_scale)(after)
        if config.schedule == "step":
            return config.step_factor ** (step // config.step_every)
        if config.schedule == "rsqrt":
            return jnp.sqrt(config.rsqrt_steps / (config.rsqrt_steps + after))
        if config.schedule == "warmup_stable_decay":
            decay = max(round(config.decay_share * length), 1)
            return optax.linear_schedule(1.0, config.min_scale, decay, transition_begin=length - decay)(after)
        return 1.0

    def schedule(step):
        warmup = optax.linear_schedule(0.0, 1.0, config.warmup_steps)(step) if config.warmup_steps else 1.0
        return config.learning_rate * warmup * scale(step)

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping (when asked), the optimizer with decoupled weight decay on every parameter, and the rates of
    parts (`rates`, `layer_decay`, `last_layers`), for flat parameters (`Params`).

    Raises ValueError where it is initialised with parameters that the settings do not fit.
    """
    tx = _OPTIMIZERS[config.name](config, learning_rate(config, steps))
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    if config.rates or config.layer_decay != 1 or config.last_layers:
        tx = _by_part(tx, config)
    if config.ewc:
        tx = consolidation.held(tx, config.ewc)
    return _averaged(tx, config.ema) if config.ema else tx


def rewrap(opt_state: Any, params: Any, *, before: OptimizerConfig, now: OptimizerConfig) -> Any:
    """The state of an optimizer of settings `now` made from that of one of `before`, which clips or averages where the
    other does not; the moments are the same. A new average begins with `params`."""

    def copy(x: Any) -> Any:  # a buffer of its own: the step takes over those of parameters and of their average
        return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.copy(x)

    inner, ema = (opt_state.optimizer, opt_state.ema) if before.ema else (opt_state, None)
    around = inner if now.ewc else None  # there before, too: it may not be switched
    inner = inner.optimizer if now.ewc else inner
    if bool(before.clip_norm) != bool(now.clip_norm):
        inner = (optax.EmptyState(), inner) if now.clip_norm else inner[1]
    inner = inner if around is None else around._replace(optimizer=inner)
    if not now.ema:
        return inner
    return AveragedState(inner, jax.tree.map(copy, params) if ema is None else ema)


def _adamw(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=config.epsilon, weight_decay=config.weight_decay)


def _lion(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)


def _adafactor(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    # Not optax.adafactor: there the weight decay is not multiplied by the learning rate.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _muon(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return contrib.muon(
        rate,
        beta=0.95,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        adam_weight_decay=config.weight_decay,
        # optax calls it again with what is not Muon's masked out.
        muon_weight_dimension_numbers=lambda params: {
            path: matrix_axes(path, getattr(x, "ndim", 0)) for path, x in params.items()
        },
        consistent_rms=0.2,  # updates of AdamW's size, so that its learning rates can be used again
    )


_OPTIMIZERS: dict[str, Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def matrix_axes(path: str, ndim: int) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter a matrix contracts and which it adds; None: it is no matrix of a layer (embeddings,
    convolutions, norms, biases, adapters), which Muon leaves to Adam (Jordan et al. 2024)."""
    first = int(STACKED.match(path) is not None)
    if not path.endswith("kernel") or ndim - first not in (2, 3):
        return None
    axes = tuple(range(first, ndim))
    # Heads and their width are two axes: contracted by an attention's output, added by all others.
    split = len(axes) - 1 if path.endswith("/o/kernel") else 1
    return contrib.MuonDimensionNumbers(axes[:split], axes[split:])


def _by_part(inner: optax.GradientTransformation, config: OptimizerConfig) -> optax.GradientTransformation:
    """`inner` with its updates multiplied by `part_rates`. What is multiplied by 0 has no part in the gradient's norm
    either."""

    def update(grads, state, params=None):
        rates = part_rates(params, config)
        updates, state = inner.update({path: _where(rates[path], x) for path, x in grads.items()}, state, params)
        return {path: _times(rates[path], x) for path, x in updates.items()}, state

    def init(params):
        part_rates(params, config)  # refuses what does not fit before anything is compiled
        return inner.init(params)

    return optax.GradientTransformation(init, update)


def _times(rate: jax.Array | float, x: jax.Array) -> jax.Array:
    return x * jnp.reshape(rate, (-1,) + (1,) * (x.ndim - 1)) if jnp.ndim(rate) else x * rate


def _where(rate: jax.Array | float, x: jax.Array) -> jax.Array:
    return _times((jnp.asarray(rate) > 0).astype(x.dtype), x)


def part_rates(params: Params, config: OptimizerConfig) -> dict[str, jax.Array | float]:
    """Path -> factor of the learning rate: a number, or float32[layers] for stacked layers.

    The factor is that of the first pattern of `rates`, times layer_decay ** (layers above it in its tower), what stands
    before the layers counting as one below the first (Clark et al. 2020, arXiv:2003.10555), and 0 for layers below a
    tower's last `last_layers`.

    Raises:
      ValueError: a pattern is found in no trainable parameter, `last_layers` names more than there are, or
        `layer_decay` meets no layers.
    """
    stacked = {path: match["tower"] for path in params if (match := STACKED.match(path))}
    layers: dict[str, int] = {}
    for path, tower in stacked.items():
        layers[tower] = max(layers.get(tower, 0), params[path].shape[0])
    for field, paths in (("rates", params), ("last_layers", stacked)):
        for pattern in getattr(config, field):
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"optimizer.{field} has {pattern!r}, which is found in no trainable parameter"
                    f"{' of stacked layers' if field == 'last_layers' else ''}; those are for example "
                    f"{sorted(paths)[:3]}."
                )
    for pattern, count in config.last_layers.items():
        depth = max(layers[tower] for path, tower in stacked.items() if re.search(pattern, path))
        if count > depth:
            raise ValueError(f"optimizer.last_layers has {{{pattern!r}: {count}}}, and there are {depth} layers.")
    if config.layer_decay != 1 and not layers:
        raise ValueError(
            f"optimizer.layer_decay={config.layer_decay}: no stacked layers are trained, but "
            f"{sorted(params)[:2]}; leave it at 1."
        )
    return {path: _part_rate(path, x.shape, layers, config) for path, x in params.items()}


def _part_rate(
    path: str, shape: tuple[int, ...], layers: Mapping[str, int], config: OptimizerConfig
) -> jax.Array | float:
    rate = next((factor for pattern, factor in config.rates.items() if re.search(pattern, path)), 1.0)
    if match := STACKED.match(path):
        depth = layers[match["tower"]]
        # Layers that stand between every few of the tower's (cross_layers) are as deep as those beside them.
        above = jnp.arange(shape[0] - 1, -1, -1) * (depth // shape[0])
        trained = min((n for pattern, n in config.last_layers.items() if re.search(pattern, path)), default=depth)
        return rate * config.layer_decay**above * (above < trained)
    tower = next((tower for tower in layers if path.startswith(f"{tower}/")), None)
    if tower is None or re.match(r"(final_norm|post_norm|lm_head|head)\b", path[len(tower) + 1 :]):
        return rate
    return rate * config.layer_decay ** layers[tower]


def _averaged(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`inner`, and ema = decay * ema + (1 - decay) * parameters after each update, begun with those before it."""

    def init(params):
        return AveragedState(inner.init(params), jax.tree.map(jnp.copy, params))

    def update(grads, state, params=None):
        updates, optimizer = inner.update(grads, state.optimizer, params)
        new = optax.apply_updates(params, updates)
        return updates, AveragedState(optimizer, optax.incremental_update(new, state.ema, 1 - decay))

    return optax.GradientTransformation(init, update)
