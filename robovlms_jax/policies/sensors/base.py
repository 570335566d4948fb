"""What all sensors of a policy share: registered configurations, what control takes from an observation, tokens.

A sensor is one file with two classes, a frozen config and a Flax module, joined by `register`. What it reads from
datasets is its data half, `data.sensors`; most sensors need none of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax import schema
from robovlms_jax.control.interface import Observation
from robovlms_jax.inputs.sensors import Reading
from robovlms_jax.nn.linear import Dense, Kernel
from robovlms_jax.schema import require

RESERVED = ("bos", "image", "text", "query")
"""Runs of a sequence that readouts and losses look up by name (`backbones.sequence`)."""


class Sensor:
    """A policy's side of a sensor in NumPy: what its readings are, and how control keeps them between steps.

    name: the sensor's, unique in a policy. kind: its registered name. dropout: share of training frames without
    its reading. can_miss: whether an observation may lack it. scope: name of its parameters' subtree.
    """

    name: str
    kind: str
    dropout: float
    can_miss: bool
    scope: str

    @property
    def reading(self) -> Reading:
        """What it reads."""
        raise NotImplementedError

    def observe(self, observation: Observation) -> np.ndarray | None:
        """float32[*shape], the reading in an observation; None where there is none. Raises ValueError."""
        value, expected = observation.sensors.get(self.name), list(self.reading.shape)
        if value is None:
            return None
        try:
            values, present, bad = self.reading.convert(np.asarray(value, np.float32)[None])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"observation.sensors[{self.name!r}] cannot be used, expected float{expected}: {error}"
            ) from error
        if bad.any():
            raise ValueError(f"observation.sensors[{self.name!r}] has values that are not finite.")
        return values[0] if present[0] else None

    def remember(self, values: np.ndarray, mask: np.ndarray, seen: np.ndarray | None, is_first: bool) -> None:
        """Let a step's reading into those that are kept: float32[past + 1, *shape] and bool[past + 1], newest last.

        As in training, frames before the first one have its reading.
        """
        values[:-1], mask[:-1] = values[1:], mask[1:]
        where = slice(None) if is_first else -1
        values[where], mask[where] = 0 if seen is None else seen, seen is not None


@dataclasses.dataclass(frozen=True)
class SensorConfig(schema.Tagged, Sensor, noun="sensor"):
    """One sensor of `policy.sensors`; its concrete type is the kind of sensor."""

    can_miss: ClassVar[bool] = True

    name: str = ""
    """How observations and datasets call it, and its parameters (sensors_NAME). Empty: its kind."""
    field: str = ""
    """The dataset's field that stores it (data/README.md). Empty: its name."""
    dropout: float = 0.1
    """Share of training frames that have no reading. A policy can only be expected to act well without the sensor if it
    was trained without it at times."""
    hidden_size: int = 64
    """Width of the encoder's inner layers."""

    def __post_init__(self):
        schema.check(type(self), {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "policy.sensors")
        if not self.name:
            object.__setattr__(self, "name", self.kind)
        require(
            self.name.isidentifier() and self.name not in ("proprio", "action_history"),
            f"policy.sensors: the name {self.name!r} must consist of letters, digits and underscores, and be neither "
            "'proprio' nor 'action_history', which have settings of their own.",
        )
        require(
            self.name not in RESERVED,
            f"policy.sensors: the name {self.name!r} is taken by other tokens of the sequence, {list(RESERVED)}; "
            "choose another, and set `field` where a dataset calls it so.",
        )
        require(0 <= self.dropout < 1, f"{self.path}.dropout={self.dropout} must lie in [0, 1).")
        self.require_positive("hidden_size")

    @property
    def path(self) -> str:
        """How messages call it."""
        return f"policy.sensors.{self.name}"

    @property
    def scope(self) -> str:
        return f"sensors_{self.name}"

    @property
    def kind(self) -> str:
        return self.kind_of(type(self))

    def require_positive(self, *fields: str) -> None:
        """Raises ValueError naming the first of the fields that is not above 0."""
        for field in fields:
            require(getattr(self, field) > 0, f"{self.path}.{field}={getattr(self, field)} must be positive.")

    def make_reading(self, shape: tuple[int, ...], **more: Any) -> Reading:
        """A `Reading` of this sensor's name, kind and field."""
        return Reading(self.name, self.kind, self.field or self.name, shape, **more)


def register(kind: str, config_type: type[SensorConfig]) -> Callable[[type], type]:
    """Class decorator: `@register("lidar", LidarConfig)` on the Flax module makes the sensor available to every
    policy."""
    return SensorConfig.register(kind, config_type)


def build(config: SensorConfig, width: int, kernel: Kernel, name: str | None = None) -> nn.Module:
    """The Flax module for a sensor's configuration. width: D of its tokens. kernel: how its matrices are stored."""
    return SensorConfig.built_by(config.kind)(config, width, kernel, name=name)


class Encoder(nn.Module):
    """Model half of a sensor. A subclass says in `encode` how readings become tokens, and nothing else.

    Frames without a reading, and in training those that dropout picks, have masked tokens of zeros: nothing attends to
    them, and they keep their places, so a sensor that falls silent changes no shape.
    """

    config: SensorConfig
    width: int
    kernel: Kernel = Kernel()

    def __call__(
        self, values: jax.Array, mask: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """float[B, past + G, *shape] and bool[B, past + G], True = there is a reading -> tokens float32[B, G, n, D] and
        their mask bool[B, G, n]."""
        past = self.config.reading.past
        present = mask[:, past:]
        if self.config.dropout and not deterministic:
            present &= jax.random.bernoulli(self.make_rng("dropout"), 1 - self.config.dropout, present.shape)
        tokens = self.encode(windows(values.astype(jnp.float32), past + 1))
        present = jnp.broadcast_to(present[..., None], tokens.shape[:3])
        return jnp.where(present[..., None], tokens, 0), present

    def encode(self, values: jax.Array) -> jax.Array:
        """Readings of every frame, oldest first, float32[B, G, past + 1, *shape] -> tokens float32[B, G, n, D]."""
        raise NotImplementedError

    def inner(self, x: jax.Array, name: str) -> jax.Array:
        """Dense + GELU: float[..., any] -> float[..., hidden_size]."""
        return jax.nn.gelu(Dense(self.config.hidden_size, (None, "hidden"), kernel=self.kernel, name=name)(x))

    def out(self, x: jax.Array) -> jax.Array:
        """The last layer: float[..., F] -> float[..., D]. Tokens start as large as words, which language models embed
        with a standard deviation near D^-0.5."""
        init = nn.initializers.normal((x.shape[-1] * self.width) ** -0.5)
        return Dense(self.width, ("hidden", "embed"), kernel_init=init, kernel=self.kernel, name="out")(x)

    def patches(self, x: jax.Array) -> jax.Array:
        """Tokens of n patches, which know where they are from: float[B, G, n, any] -> float32[B, G, n, D].

        Places are added before the nonlinearities: what is where has to be told by each token itself, for the layers
        after it see tokens by their content.
        """
        hidden = self.config.hidden_size
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("position", "hidden"))
        x = Dense(hidden, (None, "hidden"), kernel=self.kernel, name="patch")(x)
        x = jax.nn.gelu(x + self.param("places", init, (x.shape[2], hidden)))
        return self.out(self.inner(x, "mix"))


def windows(x: jax.Array, length: int) -> jax.Array:
    """[B, length - 1 + G, ...] -> [B, G, length, ...]."""
    return x[:, np.arange(x.shape[1] - length + 1)[:, None] + np.arange(length)]


def joined(x: jax.Array) -> jax.Array:
    """Rows of successive readings one after the other: [B, G, past + 1, n, ...] -> [B, G, (past + 1) * n, ...]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def strided(x: jax.Array, size: int, stride: int) -> jax.Array:
    """What a 1-D convolution, or a layer on patches, multiplies by one matrix: [B, G, T, F] -> [B, G, n, size * F]."""
    starts = np.arange(0, x.shape[2] - size + 1, stride)
    taken = x[:, :, starts[:, None] + np.arange(size)]
    return taken.reshape(*taken.shape[:3], -1)


def blank(sensors: tuple[Sensor, ...], batch: int, frames: int) -> dict[str, Mapping[str, np.ndarray]]:
    """Fields of `types.Inputs` with all readings zero and none missing."""
    values = {sensor.name: sensor.reading.zeros(batch, frames) for sensor in sensors}
    masks = {sensor.name: np.ones(values[sensor.name].shape[:2], bool) for sensor in sensors if sensor.can_miss}
    return {"sensors": values, "sensor_mask": masks}


def fields() -> tuple[str, ...]:
    """Names of the fields that any registered sensor's configuration has, with `kind`."""
    kinds = (SensorConfig.config_of(kind) for kind in SensorConfig.kinds())
    return tuple(sorted({"kind", *(field.name for config in kinds for field in dataclasses.fields(config))}))
