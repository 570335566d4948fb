"""What every action head shares: its registered configuration and the contract `VLA` and the training step rely on.

A head is one file with two classes: a frozen config dataclass and a Flax module, joined by `register`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from robovlms_jax import schema
from robovlms_jax.nn.linear import Kernel
from robovlms_jax.policies import losses

HISTORIES = ("one_step", "interleaved", "policy_head", "video")
"""Where observed steps meet: nowhere; in the language model, step after step; in the head; in one prompt."""
READOUTS = ("action_query", "pool", "token")
"""What a head is given: hidden states of learned tokens; pooled hidden states; logits of vocabulary tokens."""


@dataclasses.dataclass(frozen=True)
class HeadConfig(schema.Tagged, noun="head"):
    """Base of all head configurations; its concrete type chooses the head."""

    histories: ClassVar[tuple[str, ...]] = HISTORIES
    """Histories that the head makes sense with."""
    readouts: ClassVar[tuple[str, ...]] = ("action_query", "pool")
    """Readouts that the head makes sense with."""
    EARLIER: ClassVar[Mapping[str, Any]] = {}
    """Field -> what the head did in checkpoints from before there was the field, where that is not its default."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What its loss reports beside `loss`, of a robot with numbers and binary grippers."""
        return ()


@flax.struct.dataclass
class WindowCarry:
    """The most recent features. buffer: float32[B, W, Q, D], newest last; count: int32[B], how many are real, at most
    W."""

    buffer: jax.Array
    count: jax.Array

    @classmethod
    def create(cls, batch: int, window: int, num_queries: int, feature_dim: int) -> WindowCarry:
        """Before the first step."""
        buffer = jnp.zeros((batch, window, num_queries, feature_dim), jnp.float32)
        return cls(buffer, jnp.zeros((batch,), jnp.int32))

    @property
    def mask(self) -> jax.Array:
        """bool[B, W], True = real."""
        window = self.buffer.shape[1]
        return jnp.arange(window) >= window - self.count[:, None]

    def push(self, features: jax.Array) -> WindowCarry:
        """With one more step's float[B, Q, D]; the oldest goes."""
        buffer = jnp.concatenate([self.buffer[:, 1:], features.astype(jnp.float32)[:, None]], axis=1)
        return WindowCarry(buffer, jnp.minimum(self.count + 1, buffer.shape[1]))

    def renew(self, features: jax.Array, due: jax.Array) -> WindowCarry:
        """With the features of a window that was decoded again, float[B, W, Q, D] with the newest last, where bool[B].

        The step that follows pushes the newest; these are the ones before it.
        """
        features = features.astype(self.buffer.dtype)
        before = jnp.concatenate([features[:, :1], features[:, :-1]], axis=1)
        return self.replace(buffer=jnp.where(due[:, None, None, None], before, self.buffer))


@flax.struct.dataclass
class Plan:
    """What is left of the chunks before, for N new ones (real-time chunking).

    actions: float32[N, C, A], normalised; row i is what would be executed at the new chunk's step i. weights:
      float32[N, C], how much each step is to be kept, 0 where nothing is planned. delay: int32[N], how many steps are
      executed before the new chunk can be.
    """

    actions: jax.Array
    weights: jax.Array
    delay: jax.Array

    def given(self, chunk: int) -> jax.Array:
        """bool[N, C, 1], True = executed meanwhile."""
        return (jnp.arange(chunk) < self.delay[:, None])[..., None]


@flax.struct.dataclass
class Spread:
    """How uncertain predicted actions are; raw, of no meaning before calibration.

    scale: float32[..., C, A], of numbers a standard deviation in normalised units, of binary grippers the probability
      that the other decision is right. uncertainty: float32[..., C], one number per action, in no unit; what it is of
      is the head's choice, the mean of `scale` unless that says otherwise.
    """

    scale: jax.Array
    uncertainty: jax.Array

    @classmethod
    def of(cls, scale: jax.Array, binary: tuple[int, ...]) -> Spread:
        """With the mean over the numbers as uncertainty, over the grippers where an action is nothing else."""
        numbers = [column for column in range(scale.shape[-1]) if column not in binary] or list(binary)
        return cls(scale, scale[..., np.array(numbers)].mean(-1))


class Memoryless:
    """The carry of heads that remember nothing between steps."""

    def init_carry(self, batch: int) -> tuple:
        return ()

    def renew(self, carry: tuple, features: jax.Array, due: jax.Array) -> tuple:
        return carry


class ActionHead(Protocol):
    """Features of observed steps in, action chunks out. `N` is any number of windows (batch times windows per segment).

    Attributes `window`, `chunk`, `action_dim`, `binary` and `config` are set by `build`. No memory inside: carries are
    arguments and results. In training there is a "dropout" key (`has_rng`), for whatever a head needs chance for.
    """

    def __call__(self, features: jax.Array, step_mask: jax.Array) -> Any:
        """float[N, W, Q, D], bool[N, W] -> prediction whose leaves begin with [N, W, C]."""

    def loss(
        self, prediction: Any, actions: jax.Array, mask: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Loss and metrics, each a sum over True entries of `mask` divided by `count`.

        actions: float[N, W, C, A], -1 or 1 in the columns `binary`, others normalised to [-1, 1]. mask: bool[N, W, C].
        count: float[], True entries of the whole batch `mask` is a part of, so that micro-batches add up to the batch.
        """

    def actions(self, prediction: Any) -> jax.Array:
        """float[..., C, A]: exactly -1 or 1 in the columns `binary`, others in [-1, 1]. A head that can go on from
        actions that are executed meanwhile takes a `Plan` beside it, and says so by an attribute `takes_plan`."""

    def spread(self, prediction: Any) -> Spread | None:
        """How uncertain the actions are; None where the head's configuration does not ask for it."""

    def init_carry(self, batch: int) -> Any:
        """The carry before the first step of an episode."""

    def step(self, features: jax.Array, carry: Any) -> tuple[Any, Any]:
        """float[batch, Q, D] of the newest step -> (prediction with leaves [batch, C, ...], new carry).

        Equals the last step of `__call__` over the most recent min(t, W) features, at constant cost per call.
        """

    def renew(self, carry: Any, features: jax.Array, due: jax.Array) -> Any:
        """The carry as if steps had had the features float[batch, W, Q, D] of a window that was decoded again, newest
        last, where bool[batch] `due`; called before `step`. Heads without memory return it as it is (`Memoryless`)."""


def by_kind(
    name: str, values: jax.Array, binary: tuple[int, ...], mask: jax.Array, count: jax.Array
) -> dict[str, jax.Array]:
    """Masked means of float[..., A] over the numbers, as `name`_arm, and over the binary grippers, as `name`_gripper;
    only those there are."""
    columns = np.arange(values.shape[-1])
    parts = {"arm": columns[~np.isin(columns, binary)], "gripper": columns[np.isin(columns, binary)]}
    return {
        f"{name}_{part}": losses.masked_mean(values[..., chosen], mask, count)
        for part, chosen in parts.items()
        if len(chosen)
    }


def decide(values: jax.Array, binary: tuple[int, ...]) -> jax.Array:
    """float[..., A] with +1 where a column of `binary` is above 0 and -1 elsewhere in it; other columns untouched."""
    is_binary = np.isin(np.arange(values.shape[-1]), binary)
    return jnp.where(is_binary, jnp.where(values > 0, 1.0, -1.0), values)


def register(kind: str, config_type: type[HeadConfig]) -> Callable[[type], type]:
    """Class decorator: `@register("lstm", LSTMHeadConfig)` on the Flax module makes the head available to every
    experiment."""
    return HeadConfig.register(kind, config_type)


def kinds() -> list[str]:
    """Names of all registered heads."""
    return HeadConfig.kinds()


def kind_of(config_type: type[HeadConfig]) -> str:
    """Registered name of a config class."""
    return HeadConfig.kind_of(config_type)


def config_of(kind: str) -> type[HeadConfig]:
    """Config class of a registered head."""
    return HeadConfig.config_of(kind)


class Product(NamedTuple):
    """One policy structure; `head` is a registered name."""

    history: str
    readout: str
    head: str


def products() -> tuple[Product, ...]:
    """Every history x readout x head that means something, of all registered heads."""
    return tuple(
        Product(history, readout, kind)
        for history in HISTORIES
        for readout in READOUTS
        for kind in kinds()
        if history in config_of(kind).histories and readout in config_of(kind).readouts
    )


def build(
    config: HeadConfig, *, kernel: Kernel | None = None, name: str | None = None, **sizes: int | tuple[int, ...]
) -> Any:
    """The Flax module for a head configuration; `kernel` says how its matrices are stored, None: as floats alone.

    Args:
      sizes: window, chunk, action_dim (A), binary (columns that are decisions, `RobotSpec.binary`), feature_dim (D of
        the features, V for tokens) and num_queries (their Q): the attributes that every head has.
    Raises ValueError where the head's matrices cannot be stored so.
    """
    kind = kind_of(type(config))
    module = HeadConfig.built_by(kind)
    stored = {} if kernel in (None, Kernel()) else {"kernel": kernel}
    if stored and "kernel" not in {field.name for field in dataclasses.fields(module)}:
        raise ValueError(
            f"the {kind!r} head ({module.__name__}) has no field `kernel`, so {kernel} does not reach its matrices, if "
            "it has any; leave policy.lora_rank at 0."
        )
    return module(config=config, **sizes, **stored, name=name)
