"""The one vision-language-action module: history x readout x head around a backbone (Li et al. 2024,
arXiv:2412.14058)."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from robovlms_jax.backbones import base as backbones
from robovlms_jax.backbones import sequence
from robovlms_jax.nn.linear import Kernel, Lora
from robovlms_jax.policies import auxiliary, decoding, readout
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads import base as heads
from robovlms_jax.policies.histories import registry
from robovlms_jax.policies.histories.base import History, frames, merge, where
from robovlms_jax.policies.sensors import base as sensors
from robovlms_jax.policies.sensors import robot_state
from robovlms_jax.types import Inputs, Tokens


@flax.struct.dataclass
class Carry:
    """Everything between two control steps of B episodes. head: the head's own; history: what the history keeps."""

    head: Any
    history: Any


class Outputs(NamedTuple):
    """One forward pass over the K windows of each of B segments.

    features: float[B * K, W, Q, D]; one step instead of W with `video`. With readout `token`, logits
      float32[B * K, W, C * A, V].
    hidden: float[..., steps, S, D], final hidden states of the steps that were decoded, and tokens, what they came
      from.
    prediction: the head's; leaves [B * K, W, C, ...].
    """

    features: jax.Array
    hidden: jax.Array
    tokens: Tokens
    prediction: Any


class VLA(nn.Module):
    """Observed steps in, predicted action chunks out. Parameters live under `backbone/`, `readout/` and `head/`, and
    under `proprio/`, `action_history/`, `sensors_NAME/` and `auxiliary/` where the configuration switches these on.

    Images enter preprocessed: float[B, G, size, size, 3] per camera (see `policies.objective.prepare`).
    """

    config: PolicyConfig
    vlm: backbones.VLMConfig

    def setup(self):
        config = self.config
        if self.vlm.beside and config.readout == "pool" and config.pool == "vision":
            raise ValueError(
                f"policy.pool='vision' reads the pictures' own hidden states; those of a {self.vlm.model_type} stand "
                "beside the sequence and have none. Set policy.pool to text or all."
            )
        if self.vlm.encodes and config.readout == "pool" and config.pool == "text":
            raise ValueError(
                f"policy.pool='text' reads the prompt's own hidden states; a {self.vlm.model_type} reads the prompt in "
                "its encoder, and its decoder has none. Set policy.pool=all, or policy.readout=action_query."
            )
        if self.vlm.states == "encoder" and (config.readout == "token" or config.history == "video"):
            raise ValueError(
                f"backbone.states='encoder' with policy.readout={config.readout!r}, policy.history={config.history!r}: "
                "words are said by the decoder, and the pictures of a video are put into its prompt. Set "
                "backbone.states=decoder."
            )
        if self.vlm.encoder is not None and config.auxiliary.caption_weight:
            raise ValueError(
                "policy.auxiliary.caption_weight asks for each word of the prompt from those before it; the encoder "
                f"of a {self.vlm.model_type} sees all of them at once. Set it to 0."
            )
        if (self.vlm.beside or self.vlm.encodes) and config.auxiliary.scene.loss_weight:
            raise ValueError(
                "policy.auxiliary.scene reads the pictures' own hidden states; the sequence of a "
                f"{self.vlm.model_type} has none. Set its loss_weight to 0, or use policy.auxiliary.ahead."
            )
        if self.vlm.connector_tokenizer and config.auxiliary.caption_weight:
            raise ValueError(
                "policy.auxiliary.caption_weight asks for each word of the prompt from those before it; the connector "
                f"of a {self.vlm.model_type} reads all of them, and the image's tokens come first. Set it to 0."
            )
        width = self.vlm.width
        self.backbone = backbones.build(self.vlm)
        self.readout = readout.LearnedQueries(self.num_queries, self.vlm.width) if self.num_queries else None
        kernel = Kernel(lora=Lora(config.lora_rank, config.lora_alpha, config.lora_kind, config.lora_dropout))
        sensor = {sensor.name: sensor for sensor in config.all_sensors}
        self.proprio = self.action_history = None
        if "proprio" in sensor:
            self.proprio = robot_state.ProprioToken(sensor["proprio"], width, kernel)
        if "action_history" in sensor:
            self.action_history = robot_state.ActionHistory(sensor["action_history"], width, kernel)
        self.sensors = {
            sensor.name: sensors.build(sensor, width, kernel, name=sensor.scope) for sensor in config.sensors
        }
        self.auxiliary = auxiliary.Auxiliary(config.auxiliary, config.cameras, self.vlm.image.size, len(config.moving))
        self.head = heads.build(
            config.head,
            window=config.head_window,
            chunk=config.chunk,
            action_dim=len(config.shared.names) or config.action_dim,
            binary=config.shared.binary if config.shared.names else config.predicted.binary,
            feature_dim=self.vlm.text.vocab_size if config.readout == "token" else self.vlm.width,
            num_queries=self.num_tokens if config.readout == "token" else config.num_queries,
            kernel=kernel,
            name="head",
        )

    @property
    def history(self) -> History:
        """Where the steps of a window meet."""
        return registry.make(self.config)

    @property
    def num_tokens(self) -> int:
        """Action tokens of one step where actions are words."""
        return self.config.chunk * self.config.action_dim

    @property
    def num_queries(self) -> int:
        """Learned tokens of one frame."""
        if self.config.readout == "token":
            return 0 if self.config.is_autoregressive else self.num_tokens
        return self.config.num_queries if self.config.readout == "action_query" else 0

    @property
    def read(self) -> readout.Read:
        """How a step's features are read from its hidden states."""
        config = self.config
        return readout.make(
            config.readout, num_bins=config.num_queries, source=config.pool, parallel=not config.is_autoregressive
        )

    def embed(
        self, inputs: Inputs, actions: jax.Array | None = None, *, deterministic: bool = True, control: bool = False
    ) -> Tokens:
        """Tokens of every frame by itself, leaves [B * G, S, ...].

        Args:
          actions: float[B, G, C, A], normalised; the "query" run of an autoregressive policy holds their tokens. None
            leaves placeholders there.
          control: prompts stand alone, so how upstream's training batches pad them does not matter.
        """
        config = self.config
        images, text_ids, text_mask = frames(inputs)
        there = inputs.image_mask
        if there is not None:
            there = jnp.stack([jnp.asarray(there[camera]).reshape(-1) for camera in config.cameras], axis=1)
        return self.backbone.embed(
            {camera: images[camera] for camera in config.cameras},
            text_ids,
            text_mask,
            [*self._sensor_runs(inputs, deterministic), *self._query_runs(actions, len(text_ids))],
            image_mask=there,
            count_padding=config.compat_count_padding and not control,
            queries_last=config.compat_queries_last and not control,
            deterministic=deterministic,
        )

    def _query_runs(self, actions: jax.Array | None, batch: int) -> list[sequence.Run]:
        """What every frame's "query" run holds: learned queries, or the action tokens of its chunk."""
        if self.config.is_autoregressive:
            shape = (self.num_tokens, self.vlm.width)
            words = jnp.zeros(shape) if actions is None else self.backbone.embed_ids(self.head.ids(merge(actions, 0)))
            return [sequence.query(words, batch, attend="private")]
        return [] if self.readout is None else [sequence.query(self.readout(), batch)]

    def _sensor_runs(self, inputs: Inputs, deterministic: bool) -> list[sequence.Run]:
        """Each frame's tokens between the prompt and the queries."""
        encoders = {"proprio": self.proprio, "action_history": self.action_history, **self.sensors}
        runs = []
        for name in (sensor.name for sensor in self.config.all_sensors):
            values, mask = inputs.sensors[name], inputs.sensor_mask.get(name)
            if name == "action_history":
                values = self.config.normalizer.normalize(values)
            embeds, present = encoders[name](values, mask, deterministic=deterministic)
            runs.append(sequence.Run(merge(embeds, 0), merge(present, 0), name, "sensor"))
        return runs

    def _decode(self, inputs: Inputs, deterministic: bool, actions: jax.Array | None) -> tuple[jax.Array, Tokens]:
        """Final hidden states of the steps that `history.to_steps` finds, float[..., steps, S, D], and their tokens."""
        if self.config.is_autoregressive and actions is None and not self.is_initializing():
            raise ValueError("an autoregressive policy is trained on the tokens before each one: pass `actions`.")
        batch = len(inputs.step_mask)
        tokens = self.embed(inputs, actions, deterministic=deterministic)
        sequences = self.history.to_sequences(tokens, inputs.step_mask)
        hidden, _ = self.backbone.decode(sequences, deterministic=deterministic)
        return self.history.to_steps((hidden, sequences), batch)

    def __call__(self, inputs: Inputs, deterministic: bool = True, actions: jax.Array | None = None) -> Any:
        """Predictions for all windows of each segment; leaves float[B * K, W, C, ...] (one step with `video`).

        Arguments as for `train_outputs`.
        """
        outputs = self.train_outputs(inputs, deterministic, actions)
        if self.is_initializing():
            self.auxiliary(outputs.features[:, -1], outputs.hidden[:, -1, outputs.tokens.slot("image")])
            if self.config.auxiliary.speaks:
                self.backbone.logits(outputs.hidden)
        return outputs.prediction

    def train_outputs(self, inputs: Inputs, deterministic: bool = True, actions: jax.Array | None = None) -> Outputs:
        """Everything that losses are made of, computed once.

        Each frame's images are encoded once and shared by the windows it is in.

        Args:
          actions: float[B, G, C, A], the normalised chunk of every frame; only autoregressive policies look at it.
        """
        hidden, tokens = self._decode(inputs, deterministic, actions)
        features = self.history.windows(self._read(hidden, tokens))
        return Outputs(features, hidden, tokens, self._predict(features, inputs))

    def _predict(self, features: jax.Array, inputs: Inputs) -> Any:
        mask = self.history.steps(inputs.step_mask)
        chex.assert_equal_shape_prefix([features, mask], 2)
        return self._own(self.head(features, mask))

    def _own(self, prediction: Any) -> Any:
        """Of a head that robots share, what is this one's."""
        shared = self.config.shared
        return shared.cut(prediction, self.config.predicted) if shared.names else prediction

    def step(self, inputs: Inputs, carry: Carry, active: jax.Array | None = None) -> tuple[jax.Array, Carry]:
        """One control step. Inputs with G = 1 -> (actions float[B, C, A] in [-1, 1], new carry).

        Args:
          active: bool[B]; where False the carry stays as it is (the actions there mean nothing). None: all.
        """
        actions, _, carry = self.control(inputs, carry, active)
        return actions, carry

    def control(
        self, inputs: Inputs, carry: Carry, active: jax.Array | None = None, plan: heads.Plan | None = None
    ) -> tuple[jax.Array, heads.Spread | None, Carry]:
        """`step` with how uncertain the actions are (None: the head does not say).

        plan: what is left of the chunks before, for heads that go on from it (`takes_plan`); None: nothing.
        """
        if active is None:
            active = jnp.ones(len(inputs.step_mask), bool)
        features, context = self.perceive(inputs, carry, active)
        prediction, head = self.predict(features, context.head)
        actions = self.outputs.actions(prediction) if plan is None else self.outputs.actions(prediction, plan)
        return actions, self.spread(prediction), Carry(where(active, head, carry.head), context.history)

    def perceive(self, inputs: Inputs, carry: Carry, active: jax.Array) -> tuple[jax.Array, Carry]:
        """The half of a control step before the head: features float[B, Q, D] of the newest frame (of tokens decoded
        one after the other, logits [B, C * A, V]), and what the head and the next step go on from. Arguments as for
        `step`."""
        tokens, history = self.embed(inputs, control=True), self.history
        context = history.append(self.backbone, self.read, tokens, carry.history, active)
        state = context.state
        if self.config.is_autoregressive:
            features, cache = decoding.generate(self.backbone, self.head.choose, context, self.num_tokens)
            state = history.reclaim(state, cache)
        else:
            features = self.read(context.hidden, context.tokens)
        head = carry.head if context.renewed is None else self.head.renew(carry.head, *context.renewed)
        return features, Carry(head, state)

    def predict(self, features: jax.Array, carry: Any) -> tuple[Any, Any]:
        """The half after it: features as `perceive` gives them and the head's carry -> the head's prediction, leaves
        [B, C, ...], and its new carry."""
        if self.config.readout == "token" and not self.config.is_autoregressive:
            features = self.backbone.logits(features)
        prediction, carry = self.head.step(features, carry)
        return self._own(prediction), carry

    def spread(self, prediction: Any) -> heads.Spread | None:
        """How uncertain a prediction of the head is; None where the head does not say."""
        return self.outputs.spread(prediction) if hasattr(self.head, "spread") else None

    @property
    def outputs(self) -> Any:
        """The head as far as this robot is concerned: makes losses and actions of what `__call__` predicts."""
        config = self.config
        if not config.shared.names:
            return self.head
        return self.head.clone(parent=None, action_dim=config.action_dim, binary=config.predicted.binary)

    def init_carry(self, batch: int, params: Any = None, text_length: int = 0) -> Carry:
        """The carry before the first step of an episode.

        Args:
          params, text_length: of the policy and its prompts; histories that keep tokens need them to know how many.
        """
        state: Any = ()
        if self.config.history in ("interleaved", "video"):
            if params is None or text_length < 1:
                raise ValueError(
                    f"a {self.config.history} policy keeps tokens: pass init_carry its params and text_length."
                )
            frame = jax.eval_shape(lambda params: self._frame_tokens(params, batch, text_length), params)
            state = self.history.init_state(self.bind({"params": params}).backbone, frame)
        return Carry(self.init_head_carry(batch), state)

    def init_head_carry(self, batch: int) -> Any:
        """The head's part of it; needs no parameters."""
        # Unbound again, so that no setup asks for parameters.
        return self.bind({}).head.clone(parent=None).init_carry(batch)

    def reset_slot(self, carry: Carry, slot: jax.Array, head: Any) -> Carry:
        """Forget everything about episode `slot`, int32[], or about several at once, int32[n], of which numbers beyond
        the last episode are nobody's; `head`: a head's carry before its first step, for one episode."""
        fresh = jax.tree.map(lambda x, first: x.at[slot].set(first[0]), carry.head, head)
        return Carry(fresh, self.history.reset(carry.history, slot))

    def fit_carry(self, carry: Carry, fresh: Carry) -> Carry:
        """The same carry for longer or shorter prompts; `fresh`: one made for them."""
        return Carry(carry.head, self.history.fit(carry.history, fresh.history))

    def _frame_tokens(self, params: Any, batch: int, text_length: int) -> Tokens:
        """Token shapes of one frame, from an all-zero input."""
        size = self.vlm.image.size
        inputs = Inputs(
            images={camera: jnp.zeros((batch, 1, size, size, 3)) for camera in self.config.cameras},
            text_ids=jnp.zeros((batch, *self.vlm.text_shape(text_length)), jnp.int32),
            text_mask=jnp.ones((batch, *self.vlm.text_shape(text_length)), bool),
            step_mask=jnp.ones((batch, 1), bool),
            **sensors.blank(self.config.all_sensors, batch, 1),
        )
        return self.apply({"params": params}, inputs, method="embed")

    def _read(self, hidden: jax.Array, tokens: Tokens) -> jax.Array:
        """Final hidden states float[..., S, D] -> features float[..., Q, D]."""
        features = self.read(hidden, tokens)
        return self.backbone.logits(features) if self.config.readout == "token" else features
