"""Preferences without a reward function: which of two pieces of rollouts is better moves the policy itself (DPO,
Rafailov et al. 2023, arXiv:2305.18290; of pieces of rollouts: Hejna et al. 2023, arXiv:2310.13639).

What was drawn in rollouts is known, and what was seen is drawn again from their states. So every decision is decided
again by the policy as it was, once, and by the policy that learns, in every update.

Letters: N pairs, K decisions of a piece at most, E executed actions of a decision, D decisions of all rollouts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from robovlms_jax import json_files
from robovlms_jax.evaluation.rollout import Trial
from robovlms_jax.parallel import cpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.playtable import env
from robovlms_jax.playtable.mechanics import bodies
from robovlms_jax.policies.histories.base import where
from robovlms_jax.policies.vla import VLA, Carry
from robovlms_jax.rl import behaviours, estimates, learning, objective, preferences, rollouts
from robovlms_jax.rl import tables as playing
from robovlms_jax.rl.config import BehaviourConfig, UpdateConfig
from robovlms_jax.rl.segments import Rollouts
from robovlms_jax.schema import require
from robovlms_jax.training import step as steps
from robovlms_jax.training.stages import Stage
from robovlms_jax.training.state import TrainState


class Pieces(NamedTuple):
    """Answers about pieces of rollouts, NumPy. rollout, start, steps: int[N, 2], first and second: control steps from
    `start` on. first_better: float32[N], 1, 0, or 0.5 where both are as good."""

    rollout: np.ndarray
    start: np.ndarray
    steps: np.ndarray
    first_better: np.ndarray


class _Block(NamedTuple):
    """B rollouts to be decided again. rows: int32[B], which. counts: int32[B], decisions of each. states (before each
    decision), drawn: leaves [K, B, ...]; where a rollout is over its last decision is repeated."""

    rows: Any
    counts: Any
    states: bodies.State
    drawn: Any


class Known(NamedTuple):
    """Every decision as the policy that learning began with would decide again, NumPy leaves [D, ...]; log_prob:
    float32[D, E, A]."""

    view: objective.View
    drawn: Any
    log_prob: np.ndarray


@flax.struct.dataclass
class Compared:
    """N pairs of pieces to learn from: leaves [N, 2, K, ...] of view and drawn, mask bool[N, 2, K, E] (executed within
    the piece), reference float32[N, 2, K, E, A], first_better float32[N]."""

    view: objective.View
    drawn: Any
    mask: jax.Array
    reference: jax.Array
    first_better: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class DirectLoss:
    """Cross-entropy of answers, where a piece's worth is `beta` times how much more probable its actions have become
    than they were; a `training.step.Loss` of `Compared`. noise: share of answers that are taken for random."""

    learner: objective.Learner
    beta: float
    noise: float

    def count(self, batch: Compared) -> jax.Array:
        """float32[]: pairs."""
        return jnp.float32(len(batch.first_better))

    def __call__(
        self, params: Any, batch: Compared, key: jax.Array | None, count: Any
    ) -> tuple[jax.Array, objective.Metrics]:
        """Loss and metrics, sums of `of_pairs` over the whole batch's `count`."""
        metrics = {name: x.sum() / count for name, x in self.of_pairs(params, batch).items()}
        return metrics["loss"], metrics

    def of_pairs(self, params: Any, batch: Compared) -> objective.Metrics:
        """float32[N] each. loss. preferred: whether the policy's own preference gives the answer (half where that was a
        tie). margin: by how much. from_reference: divergence per executed action."""
        view, drawn = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), (batch.view, batch.drawn))
        now = self.learner.reconsider(params, view, drawn, batch.mask.shape[-1]).log_prob
        difference = jnp.where(batch.mask[..., None], now.reshape(batch.reference.shape) - batch.reference, 0.0)
        worth = self.beta * difference.sum((2, 3, 4))
        loss = preferences.preference_loss(worth[:, 0], worth[:, 1], batch.first_better, self.noise)
        margin = (worth[:, 0] - worth[:, 1]) * (2 * batch.first_better - 1)
        per_action = difference.sum(-1)
        moved = estimates.divergence(-per_action, jnp.zeros_like(per_action))
        moved = jnp.where(batch.mask, moved, 0.0).sum((1, 2, 3)) / jnp.maximum(batch.mask.sum((1, 2, 3)), 1)
        preferred = jnp.where(batch.first_better == 0.5, 0.5, margin > 0)
        return {"loss": loss, "preferred": preferred, "margin": margin, "from_reference": moved}


class DirectPreferences:
    """Updates of one policy from answers about rollouts, in place of `learning.Reinforcement`.

    Args:
      params: the policy's, nested; they are copied.
      stage: trainable patterns and optimizer, as for `learning.Reinforcement`.
      mesh: pairs are split over it, and what of `params` lies on it stays split as it lies, as for
        `learning.Reinforcement`.
    Raises:
      ValueError: what the policy or the patterns do not allow; says so.
    """

    def __init__(
        self,
        model: VLA,
        params: Mapping[str, Any],
        behaviour: BehaviourConfig,
        update: UpdateConfig,
        stage: Stage,
        mesh: Mesh,
        seed: int,
    ):
        rollouts.require_playable(model.config)
        self.model, self.mesh, self.seed, self.update = model, mesh, seed, update
        self.learner = objective.Learner(model, behaviours.make(model.config, behaviour), ())
        self.state, self.reference = learning.begin(self.learner, params, stage, mesh, seed)
        self.head_only = learning.is_head_alone(model, self.state)
        self.loss = DirectLoss(self.learner, update.beta, update.label_noise)
        self._update = steps.make_train_step(self.loss, stage.tx, stage.learning_rate, self.state, mesh)
        self._answer = jax.jit(self._answered)
        self._place, self.shards = meshes.batched(mesh), mesh.shape["data"] * mesh.shape["fsdp"]

    def iterate(self, compared: Comparisons, number: int) -> tuple[Comparisons, dict[str, float]]:
        """Learn from all pairs that teach, `epochs` times; `self.state` moves on. number: of the iteration, on which
        their order depends.

        Returns the pairs; means over the updates, and, where pairs are held out, what `answers` says after them of
        those that teach (names end in _taught) and of those that do not (_held_out). Raises as
        `learning.Reinforcement.iterate` does.
        """
        rng = np.random.default_rng([self.seed, 2, number])
        sums: dict[str, float] = {}
        made, parts = 0, self.update.minibatches
        for _ in range(self.update.epochs):
            rows = rng.permutation(compared.teaching)
            for chosen in np.split(rows[: len(rows) - len(rows) % (parts * self.shards)], parts):
                batch = jax.device_put(compared.take(chosen), self._place)
                self.state, metrics = self._update(self.state, batch)
                made += 1
                found = {name: float(x) for name, x in metrics.items()}
                learning.require_finite(found, number, made)
                sums = {name: sums.get(name, 0.0) + x for name, x in found.items()}
        numbers = {name: x / made for name, x in sums.items()}
        if len(compared.held_out):
            most = len(compared.teaching) // parts
            for part, rows in (("taught", compared.teaching), ("held_out", compared.held_out)):
                found = self.answers(compared, rows, most)
                numbers |= {f"{name}_{part}": x for name, x in found.items()} | {f"pairs_{part}": len(rows)}
        # All control steps were made before the first iteration.
        return compared, numbers | {"updates": made, "env_steps": 0 if number else compared.env_steps}

    def answers(self, compared: Comparisons, rows: np.ndarray, most: int) -> dict[str, float]:
        """How the policy, as it is, answers the pairs int[n] `rows`, of which nothing is learned: means of loss,
        preferred and margin (`DirectLoss.of_pairs`). most: pairs at a time."""
        size = max(most - most % self.shards, self.shards)
        parts = []
        for begin in range(0, len(rows), size):
            chosen = rows[np.minimum(np.arange(begin, begin + size), len(rows) - 1)]  # the last one fills up
            found = jax.device_get(self._answer(self.state, jax.device_put(compared.take(chosen), self._place)))
            parts.append({name: x[: len(rows) - begin] for name, x in found.items()})
        return {
            name: float(np.concatenate([x[name] for x in parts]).mean()) for name in ("loss", "preferred", "margin")
        }

    def _answered(self, state: TrainState, batch: Compared) -> objective.Metrics:
        with meshes.constrained(self.mesh):
            return self.loss.of_pairs(state.params, batch)

    def policy(self) -> dict[str, Any]:
        """The policy's own parameters, nested."""
        return learning.policy_of(self.state)

    def known(self, found: Rollouts, encode: playing.EncodeText, how: playing.Play, tables: int) -> Known:
        """All decisions of rollouts, decided again by the policy that learning began with, so many tables side by side.

        Raises ValueError for rollouts whose draws were not kept, are of another head or chunk, or have no probability.
        """
        kept = draws(found, self.learner)
        world, place = _world(found, encode, how), jax.devices()[0]
        params = unflatten_dict({**self.state.frozen, **self.reference}, sep="/")
        params = jax.device_put(params, place)
        how = dataclasses.replace(how, platform=place.platform)
        run = jax.jit(
            functools.partial(_replayed, self.learner, how, self.head_only),
            compiler_options=cpu.options(env.STEP_KIND, place.platform),
        )
        counts = found.decisions(how.actions)
        parts = [
            jax.tree.map(lambda x, take=take: x[take], jax.device_get(run(params, world, block)))
            for block, take in _blocks(found, kept, counts, how.actions, tables)
        ]
        view, log_prob = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        _require_probable(log_prob)
        return Known(view, kept, log_prob)


def draws(found: Rollouts, learner: objective.Learner) -> Any:
    """`Behaviour.drawn` of all decisions. Raises ValueError for those that this learner cannot read."""
    decided = found.decided
    require(
        decided is not None,
        "these rollouts keep no draws: a version made them that did not; record them again (another --out).",
    )
    names, config = [field.name for field in dataclasses.fields(learner.behaviour.drawn)], learner.model.config
    shapes = {name: np.shape(x) for name, x in decided.drawn.items()}
    actions = [shape[1:] for shape in shapes.values() if len(shape) == 3]
    expected = (config.chunk, config.action_dim)
    require(
        sorted(shapes) == sorted(names) and all(shape == expected for shape in actions),
        f"these rollouts were drawn by another kind of head or chunk: {shapes}; expected {sorted(names)} of chunks "
        f"{expected}. Record rollouts of this policy.",
    )
    if decided.units:
        differing = json_files.differences(json.loads(decided.units), json.loads(behaviours.units(config)))
        require(
            not differing,
            f"the numbers that were drawn in these rollouts mean something else than this policy's ({differing}). "
            "Record rollouts of this policy.",
        )
    return learner.behaviour.drawn(**decided.drawn)


def _require_probable(log_prob: np.ndarray) -> None:
    """Raise ValueError where draws of float32[D, E, A] have no probability: no update would have a loss."""
    bad = ~np.isfinite(log_prob).all((1, 2))
    require(
        not bad.any(),
        f"what was drawn in {bad.sum()} of {len(bad)} decisions of these rollouts has no finite probability by the "
        "policy that learning begins with: its parameters or the draws are not finite, or of another vocabulary. "
        "Record rollouts of this policy.",
    )


def _world(found: Rollouts, encode: playing.EncodeText, how: playing.Play) -> playing.World:
    """Each rollout as a trial."""
    trials = [
        Trial(number, {}, (task,), (words,), {"scene": scene})
        for number, (task, words, scene) in enumerate(zip(found.tasks, found.instructions, found.scenes, strict=True))
    ]
    first = jax.tree.map(lambda x: x[found.offsets[:-1]], found.states)
    return playing.make_world(trials, encode, dict(how.image_sizes)["static"], first)


def _blocks(
    found: Rollouts, kept: Any, counts: np.ndarray, every: int, tables: int
) -> Iterator[tuple[_Block, tuple[np.ndarray, np.ndarray]]]:
    """So many rollouts at a time, and which of the results [K, B] there are: decisions and tables, rollout after
    rollout."""
    most, begins = counts.max(), np.cumsum(counts) - counts
    for first in range(0, len(counts), tables):
        rows = np.minimum(np.arange(first, first + tables), len(counts) - 1)
        number = np.minimum(np.arange(most)[:, None], counts[rows] - 1)  # [K, B]
        states = jax.tree.map(lambda x, n=number, r=rows: x[found.offsets[r] + every * n], found.states)
        drawn = jax.tree.map(lambda x, n=number, r=rows: x[begins[r] + n], kept)
        wanted = np.where(np.arange(first, first + tables) < len(counts), counts[rows], 0)
        table, decision = np.nonzero(np.arange(most) < wanted[:, None])
        yield _Block(rows, wanted, states, drawn), (decision, table)


def _replayed(
    learner: objective.Learner,
    how: playing.Play,
    head_only: bool,
    params: Any,
    world: playing.World,
    block: _Block,
) -> tuple[objective.View, jax.Array]:
    """What was known before each decision, and the log-probabilities of what was drawn, leaves [K, B, ...]."""
    model = learner.model

    def decide(carry: Carry, given: tuple[bodies.State, Any, jax.Array]) -> tuple[Carry, tuple]:
        states, drawn, number = given
        active = number < block.counts
        images, robot_obs, text = playing.look_at(world, how, block.rows, jnp.zeros_like(block.rows), states)
        seen = rollouts.see(model.config, images, robot_obs, text)
        features, context = learner.perceive(params, seen, carry, active)
        log_prob, _ = learner.log_prob(params, features, context.head, drawn)
        head = learner.head(params, features, context.head, jax.random.key(0))[2]  # as it was, whatever was drawn
        view = objective.View(None, features, context.head) if head_only else objective.View(seen, None, carry)
        after = Carry(where(active, head, carry.head), context.history)
        return after, (view, log_prob[:, : how.actions])

    begin = model.init_carry(len(block.rows), params, world.text_ids.shape[2])
    numbers = jnp.arange(len(block.states.led))
    return jax.lax.scan(decide, begin, (block.states, block.drawn, numbers))[1]


class Comparisons:
    """Answers with what the decisions they are about looked like; on the host, from where updates take their part.

    Args:
      counts: int[R], decisions of each rollout. every: control steps between two.
      env_steps: control steps of all rollouts.
      held_out: bool[N], pairs that measure and do not teach; None: all teach.
    Attributes:
      teaching, held_out: int[...], the pairs that teach, and those that measure alone.
    """

    def __init__(
        self,
        pieces: Pieces,
        known: Known,
        counts: np.ndarray,
        every: int,
        env_steps: int,
        held_out: np.ndarray | None = None,
    ):
        self.pieces, self.env_steps, self._known, self._every = pieces, env_steps, known, every
        self._begins, self._counts = np.cumsum(counts) - counts, counts
        held = np.zeros(len(pieces.first_better), bool) if held_out is None else held_out
        self.teaching, self.held_out = np.flatnonzero(~held), np.flatnonzero(held)
        last = (pieces.start + pieces.steps - 1) // every
        self._most = int((last - pieces.start // every).max()) + 1

    def __len__(self) -> int:
        return len(self.pieces.first_better)

    def take(self, rows: np.ndarray) -> Compared:
        """The pairs int[n] `rows`, NumPy leaves [n, 2, K, ...]."""
        rollout, start, steps = (x[rows][..., None] for x in self.pieces[:3])  # [n, 2, 1]
        number = start // self._every + np.arange(self._most)
        at = number[..., None] * self._every + np.arange(self._every)  # control step of each action, [n, 2, K, E]
        mask = (at >= start[..., None]) & (at < (start + steps)[..., None])
        place = self._begins[rollout] + np.minimum(number, self._counts[rollout] - 1)
        view, drawn, reference = jax.tree.map(lambda x: x[place], tuple(self._known))
        return Compared(view, drawn, mask, reference, self.pieces.first_better[rows].astype(np.float32))
