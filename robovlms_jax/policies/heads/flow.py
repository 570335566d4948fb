"""Flow matching: a chunk of actions is transported from noise (rectified flow, Liu et al. 2022, arXiv:2209.03003; as an
action head Black et al. 2024, arXiv:2410.24164). Also what RoboVLMs names a diffusion head.

A straight path leads from noise to the recorded chunk, x(t) = (1 - t) noise + t actions, and the network learns its
velocity, actions - noise, from x(t), t and the observed steps. Acting follows the learned velocity from t = 0 to 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax.nn.attention import Attention, attend
from robovlms_jax.nn.linear import Dense, Einsum, Kernel
from robovlms_jax.nn.mlp import MLP
from robovlms_jax.nn.norms import LayerNorm
from robovlms_jax.policies import losses
from robovlms_jax.policies.heads import base
from robovlms_jax.policies.heads.continuous import dense, require_positive, step_positions


@dataclasses.dataclass(frozen=True)
class FlowHeadConfig(base.HeadConfig):
    """A small transformer over the chunk's actions that looks at the window's features; grippers included."""

    hidden_size: int = 512
    num_layers: int = 4
    num_heads: int = 8
    num_steps: int = 10
    """Integration steps (Euler) from noise to actions. May be changed after training."""
    seed: int = 0
    """Of the noise that acting starts from: the same at every step, so that the policy is a function of what it sees
    and consecutive chunks follow the same one of several possible ways."""
    draws: int = 1
    """Noises and times that training draws for every chunk. What the chunk is predicted from is computed once for all
    of them, so further ones cost the head alone; the gradient that reaches the backbone has less noise."""
    time_power: float = 1.5
    """Training draws the times 1 - u^(1 / time_power), u uniform. Above 1 there are more of those near the noise, where
    actions have to be found in what is observed; near time 1 they can be read from the input. 1.5 is as in Black et al.
    2024."""
    data_std: float = 0.4
    """Standard deviation of normalised actions, about. With it the network predicts the part of the velocity that does
    not follow from its input, scaled to unit variance at all times, and all times count alike in the loss (Karras et
    al. 2022, arXiv:2206.00364, section 5, for straight paths). 0: it predicts the velocity, and has to learn to copy
    the noise before it learns anything of actions."""
    time_turns: tuple[float, float] = (0.1, 5.0)
    """Lowest and highest frequency of the sines that tell the network the time, in turns over the whole way. Sines of
    many turns look like noise to it: two neighbouring times have nothing in common."""
    max_delay: int = 0
    """Training draws a delay of 0 ... max_delay actions for every chunk; those first actions enter as recorded, with
    time 1, and the loss is on the others (arXiv:2512.05964). So the policy learns to go on from actions that are
    executed while it thinks. 0: every action is predicted."""
    guidance: Literal["vjp", "identity", "prefix"] = "vjp"
    """How a chunk goes on from what is left of the one before, where an observation brings that (real-time chunking).
    vjp: integration is drawn towards it, through the network's derivative (arXiv:2506.07339). identity: the derivative
    is taken for 1, which costs nothing. prefix: the actions executed meanwhile are given, as in training with
    max_delay."""
    guidance_limit: float = 5.0
    """Largest weight of the guidance (beta of arXiv:2506.07339)."""
    guidance_schedule: Literal["exp", "linear"] = "exp"
    """How its weight falls from the actions that are certain to those that need not be kept."""
    temperature: float = 1.0
    """Scale of the noise that acting starts from. 0 starts in the middle: the chunk that a policy holds for likely,
    where 1 is one sample of those it holds for possible. May be changed after training."""
    num_samples: int = 0
    """Further chunks drawn from other noise at each step, whose spread is the confidence; 0: none is reported."""

    EARLIER: ClassVar[Mapping[str, Any]] = {"time_turns": (1.0, 1000.0), "data_std": 0.0, "time_power": 1.0}

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss_arm", "loss_gripper")

    def __post_init__(self):
        require_positive(self, "hidden_size", "num_layers", "num_heads", "num_steps", "draws")
        if self.guidance not in ("vjp", "identity", "prefix") or self.guidance_schedule not in ("exp", "linear"):
            raise ValueError(
                f"policy.head.guidance={self.guidance!r} must be vjp, identity or prefix, and guidance_schedule="
                f"{self.guidance_schedule!r} exp or linear."
            )
        if self.max_delay < 0 or (self.guidance == "prefix" and not self.max_delay):
            raise ValueError(
                f"policy.head.max_delay={self.max_delay} must be 0 or more, and above 0 for guidance=prefix: the "
                "policy has to be trained with it."
            )
        if not self.time_power > 0:
            raise ValueError(f"policy.head.time_power={self.time_power} must be above 0; 1 draws all times alike.")
        if self.data_std < 0 or self.temperature < 0:
            raise ValueError(
                f"policy.head.data_std={self.data_std} and temperature={self.temperature} must not be negative."
            )
        if not 0 < self.time_turns[0] < self.time_turns[1]:
            raise ValueError(f"policy.head.time_turns={self.time_turns} must be two rising numbers above 0.")
        if not self.guidance_limit > 0:
            raise ValueError(f"policy.head.guidance_limit={self.guidance_limit} must be above 0.")
        if self.num_samples < 0 or self.num_samples == 1:
            raise ValueError(f"policy.head.num_samples={self.num_samples} must be 0, or 2 and more to have a spread.")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"policy.head.hidden_size={self.hidden_size} must be even and divide over num_heads={self.num_heads}."
            )


def guidance_weight(time: jax.Array, limit: float) -> jax.Array:
    """How strongly a velocity is corrected at float[] `time`: (1 - t) / (t r2), r2 = (1 - t)^2 / (t^2 + (1 - t)^2), at
    most `limit`."""
    rest = jnp.maximum(1 - time, 1e-6)
    weight = (time**2 + rest**2) / jnp.maximum(time * rest, 1e-6)
    return jnp.minimum(weight, limit)


def _scales(time: jax.Array, std: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of x(t) = (1 - t) noise + t actions, with actions of deviation `std`: the factor by which the velocity follows
    from x in the mean (least squares), the deviation of what is left of it then, and the deviation of x."""
    variance = jnp.square(1 - time) + jnp.square(time * std)
    return (time * std**2 - (1 - time)) / variance, std / jnp.sqrt(variance), jnp.sqrt(variance)


@flax.struct.dataclass
class Condition:
    """What the network needs to know of N windows' steps, computed once for all integration steps.

    key, value: float32[L, N, heads, T, H], of the T = W * Q features. mask: bool[N, S, T], which of them each of the
    S steps that predict may attend to.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array


@flax.struct.dataclass
class FlowPrediction:
    """Conditions of steps; actions come out of them when asked for. shape: the steps' leading axes, (N, W) or (B,)."""

    condition: Condition
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)


class Layer(nn.Module):
    """Attention within the chunk, attention to the condition, feed-forward; pre-norm."""

    num_heads: int
    width: int
    kernel: Kernel

    def setup(self):
        shape, axes = (self.width, self.num_heads, self.width // self.num_heads), ("embed", "heads", "head_dim")

        def project(name):
            return Einsum("BSD,DNH->BSNH", shape, axes, use_bias=True, kernel=self.kernel, name=name)

        self.q, self.k, self.v = (project(name) for name in "qkv")
        shape, axes = shape[1:] + shape[:1], axes[1:] + axes[:1]
        self.o = Einsum("BSNH,NHD->BSD", shape, axes, use_bias=True, kernel=self.kernel)
        self.attn = Attention(self.num_heads, self.width // self.num_heads, kernel=self.kernel)
        self.mlp = MLP(4 * self.width, "gelu", kernel=self.kernel)
        self.attn_norm, self.cross_norm, self.mlp_norm = (LayerNorm(1e-5) for _ in range(3))

    def condition(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32[N, T, width] -> keys and values float32[N, heads, T, H]."""
        return jnp.swapaxes(self.k(context), 1, 2), jnp.swapaxes(self.v(context), 1, 2)

    def __call__(self, x: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        """float32[N * S, C, width], keys and values float32[N, heads, T, H], mask bool[N, S, T] -> as the first."""
        x = x + self.attn(self.attn_norm(x))[0]
        q = self.q(self.cross_norm(x))
        steps = q.reshape(len(mask), -1, *q.shape[2:]) * q.shape[-1] ** -0.5  # a step's chunk, the next one's
        y = attend(steps, [(key, value)], jnp.repeat(mask, x.shape[1], axis=1))
        x = x + self.o(y.reshape(q.shape))
        return x + self.mlp(self.mlp_norm(x))


@base.register("flow", FlowHeadConfig)
class FlowHead(nn.Module):
    """See `base.ActionHead` for the contract. Computes in float32 whatever the backbone's type."""

    config: FlowHeadConfig
    window: int
    chunk: int
    action_dim: int
    binary: tuple[int, ...]
    feature_dim: int
    num_queries: int
    kernel: Kernel = Kernel()

    takes_plan = True

    def setup(self):
        config = self.config
        if config.max_delay >= self.chunk:
            raise ValueError(
                f"policy.head.max_delay={config.max_delay} must be below policy.chunk={self.chunk}: something has to "
                "be left to predict."
            )
        # As large as what they are added to, which is noise at the input: with the 0.02 of language models it took all
        # of a short training before actions of a chunk differed from each other.
        normal = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("position", "embed"))
        self.context = dense(config.hidden_size, self.kernel)
        self.context_norm = LayerNorm(1e-5)
        self.step_table = self.param("steps", normal, (self.window, config.hidden_size))
        self.slot_table = self.param("slots", normal, (self.num_queries, config.hidden_size))
        self.chunk_table = self.param("chunk", normal, (self.chunk, config.hidden_size))
        self.action_in = dense(config.hidden_size, self.kernel)
        self.time_in = dense(config.hidden_size, self.kernel)
        layer = functools.partial(Layer, config.num_heads, config.hidden_size, self.kernel)
        self.layers = [layer(name=f"layer_{i}") for i in range(config.num_layers)]
        self.final_norm = LayerNorm(1e-5)
        zero = nn.initializers.zeros_init()  # the first loss is that of actions that are always 0
        self.out = Dense(self.action_dim, ("embed", None), kernel_init=zero, kernel=self.kernel)

    def __call__(self, features: jax.Array, step_mask: jax.Array) -> FlowPrediction:
        batch, steps = step_mask.shape
        prediction = FlowPrediction(self._condition(features, step_mask), (batch, steps))
        if self.is_initializing():  # nothing else in here touches the network's parameters
            self.velocity(prediction.condition, self.noise(batch * steps), jnp.zeros(batch * steps))
        return prediction

    def loss(self, prediction: FlowPrediction, actions: jax.Array, mask: jax.Array, count: jax.Array):
        """Squared error of the velocity at `draws` random times and noises per chunk; one fixed draw where there is no
        "dropout" key, so that evaluations compare."""
        config, trains = self.config, self.has_rng("dropout")
        key = self.make_rng("dropout") if trains else jax.random.key(config.seed)
        draws = config.draws if trains else 1
        time_key, noise_key = jax.random.split(key)
        # A masked action may hold anything, and the network sees the whole chunk.
        target = jnp.where(mask[..., None], actions, 0.0).reshape(-1, *actions.shape[-2:])
        # A draw is to the network what another step of the window is.
        target = jnp.repeat(target, draws, axis=0)
        condition = prediction.condition.replace(mask=jnp.repeat(prediction.condition.mask, draws, axis=1))
        time = jax.random.uniform(time_key, target.shape[:1])
        if config.time_power != 1:
            time = 1 - time ** (1 / config.time_power)
        weights = jnp.ones(())
        if config.max_delay and trains:
            delays = jax.random.randint(jax.random.fold_in(key, 2), time.shape, 0, config.max_delay + 1)
            given = jnp.arange(self.chunk) < delays[:, None]
            time = jnp.where(given, 1.0, time[:, None])
            # A chunk counts as much as without a delay: the mean over the actions that are predicted.
            weights = jnp.where(given, 0.0, self.chunk / (self.chunk - delays[:, None]))[..., None]
        noise = jax.random.normal(noise_key, target.shape)
        position = time.reshape(len(target), -1, 1)
        velocity = self.velocity(condition, (1 - position) * noise + position * target, time)
        if config.data_std:
            weights = weights * jnp.square(_scales(position, config.data_std)[2] / config.data_std)
        errors = weights * losses.squared_error(velocity, target - noise)
        errors = errors.reshape(-1, draws, *errors.shape[1:]).mean(1).reshape(actions.shape)
        loss = losses.masked_mean(errors, mask, count)
        return loss, {"loss": loss, **base.by_kind("loss", errors, self.binary, mask, count)}

    def actions(self, prediction: FlowPrediction, plan: base.Plan | None = None) -> jax.Array:
        """Integrate from noise; numbers are clipped to [-1, 1], binary grippers decided.

        plan: what is left of the chunk before, [N * S, ...] leaves; None: nothing.
        """
        size = int(np.prod(prediction.shape))
        x = self._integrate(prediction.condition, self.noise(size), plan)
        x = x.reshape(*prediction.shape, self.chunk, self.action_dim)
        return base.decide(jnp.clip(x, -1, 1), self.binary)

    def spread(self, prediction: FlowPrediction) -> base.Spread | None:
        """Of `num_samples` chunks from other noise: the standard deviation of numbers; of grippers, the share that
        decides otherwise than most."""
        count = self.config.num_samples
        if not count:
            return None
        # A sample is to the network what another step of the window is.
        mask = jnp.repeat(prediction.condition.mask, count, axis=1)
        shape = (*prediction.shape, count, self.chunk, self.action_dim)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(self.config.seed), 1), shape[-3:])
        noise = jnp.broadcast_to(noise, shape).reshape(-1, *shape[-2:])
        x = self._integrate(prediction.condition.replace(mask=mask), noise, None).reshape(shape)
        is_open = (x > 0).mean(-3)
        scale = jnp.where(
            np.isin(np.arange(self.action_dim), self.binary),
            jnp.minimum(is_open, 1 - is_open),
            jnp.clip(x, -1, 1).std(-3),
        )
        return base.Spread.of(scale, self.binary)

    def _integrate(self, condition: Condition, noise: jax.Array, plan: base.Plan | None) -> jax.Array:
        """Follow the velocity from `noise` float32[N * S, C, A] at time 0 to time 1."""
        step = 1.0 / self.config.num_steps

        def euler(head: FlowHead, x: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
            return x + step * head._guided(condition, x, time, plan), None

        times = jnp.arange(self.config.num_steps) * step
        x, _ = nn.scan(euler, variable_broadcast="params", split_rngs={"params": False})(self, noise, times)
        if plan is not None and self.config.guidance == "prefix":
            x = jnp.where(plan.given(self.chunk), plan.actions, x)
        return x

    def _guided(self, condition: Condition, x: jax.Array, time: jax.Array, plan: base.Plan | None) -> jax.Array:
        """The velocity at float32[] `time`, drawn towards the plan (arXiv:2506.07339, equations 2 to 4)."""
        times = jnp.full(len(x), time)
        if plan is None:
            return self.velocity(condition, x, times)
        if self.config.guidance == "prefix":
            given = plan.given(self.chunk)
            velocity = self.velocity(
                condition, jnp.where(given, plan.actions, x), jnp.where(given[..., 0], 1.0, times[:, None])
            )
            return jnp.where(given, 0.0, velocity)

        def arrival(head: FlowHead, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            velocity = head.velocity(condition, x, times)
            return x + (1 - time) * velocity, velocity

        if self.config.guidance == "vjp":
            end, pull, velocity = nn.vjp(arrival, self, x, has_aux=True, vjp_variables=False)
            correction = pull(plan.weights[..., None] * (plan.actions - end))[-1]
        else:
            end, velocity = arrival(self, x)
            correction = plan.weights[..., None] * (plan.actions - end)
        return velocity + guidance_weight(time, self.config.guidance_limit) * correction

    def init_carry(self, batch: int) -> base.WindowCarry:
        return base.WindowCarry.create(batch, self.window, self.num_queries, self.feature_dim)

    def renew(self, carry: base.WindowCarry, features: jax.Array, due: jax.Array) -> base.WindowCarry:
        return carry.renew(features, due)

    def step(self, features: jax.Array, carry: base.WindowCarry) -> tuple[FlowPrediction, base.WindowCarry]:
        carry = carry.push(features)
        condition = self._condition(carry.buffer, carry.mask)
        return FlowPrediction(condition.replace(mask=condition.mask[:, -1:]), (len(features),)), carry

    def noise(self, size: int) -> jax.Array:
        """What acting starts from: the same float32[C, A] for every one of `size` chunks."""
        noise = self.config.temperature * jax.random.normal(
            jax.random.key(self.config.seed), (self.chunk, self.action_dim)
        )
        return jnp.broadcast_to(noise, (size, *noise.shape))

    def _condition(self, features: jax.Array, step_mask: jax.Array) -> Condition:
        """float[N, W, Q, D], bool[N, W] -> condition of all W steps; each sees itself and real earlier ones."""
        batch, steps, queries, _ = features.shape
        x = self.context(features.astype(jnp.float32))
        x = x + self.slot_table + self.step_table[step_positions(step_mask)][:, :, None]
        x = self.context_norm(x).reshape(batch, steps * queries, -1)
        keys, values = zip(*(layer.condition(x) for layer in self.layers), strict=True)
        number = jnp.arange(steps)
        seen = (number[:, None] >= jnp.repeat(number, queries)) & jnp.repeat(step_mask, queries, axis=1)[:, None]
        return Condition(jnp.stack(keys), jnp.stack(values), seen)

    def velocity(self, condition: Condition, x: jax.Array, time: jax.Array) -> jax.Array:
        """Chunks on their way float32[N * S, C, A], times in [0, 1], float32[N * S] or, where actions have their own,
        [N * S, C] -> float32[N * S, C, A]."""
        std = self.config.data_std
        if not std:
            return self._network(condition, x, time)
        known, rest, size = _scales(time.reshape(len(x), -1, 1), std)
        return known * x + rest * self._network(condition, x / size, time)

    def _network(self, condition: Condition, x: jax.Array, time: jax.Array) -> jax.Array:
        """As `velocity`: its part that does not follow from `x` where there is a `data_std`, else all of it."""
        half = self.config.hidden_size // 2
        time = time.reshape(len(x), -1)
        low, high = np.log10(self.config.time_turns)
        angle = 2 * np.pi * time[..., None] * jnp.logspace(low, high, half, dtype=jnp.float32)
        waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        x = self.action_in(x) + self.chunk_table + self.time_in(waves)
        for index, layer in enumerate(self.layers):
            x = layer(x, condition.key[index], condition.value[index], condition.mask)
        return self.out(self.final_norm(x))
