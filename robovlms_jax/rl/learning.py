"""One iteration of reinforcement learning: try things out on many tables, judge what came of it, update.

An iteration depends on parameters, its number and a seed alone: all tables begin anew. So a run that was stopped goes
on as if it had not been.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robovlms_jax.parallel import cpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.playtable import env
from robovlms_jax.policies.histories.base import where
from robovlms_jax.policies.vla import VLA, Carry
from robovlms_jax.rl import behaviours, estimates, objective, progress, rollouts
from robovlms_jax.rl import tables as playing
from robovlms_jax.rl.config import BehaviourConfig, UpdateConfig
from robovlms_jax.rl.preferences import RewardModel
from robovlms_jax.schema import require
from robovlms_jax.training import step as steps
from robovlms_jax.training.guards import DivergedError
from robovlms_jax.training.stages import Stage
from robovlms_jax.training.state import TrainState, create
from robovlms_jax.types import Inputs

_AXES = ("data", "fsdp")
"""Of the mesh, over which tables are split."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """tables: side by side. decisions: of every table in one iteration. play: how tables are played; one trial follows
    the other, with a last look at those that were cut off, but for grpo each table plays one. held: tasks that are
    played and not trained (`update.hold_weight`), positions in `tables.NAMES`."""

    behaviour: BehaviourConfig
    update: UpdateConfig
    tables: int
    decisions: int
    image_sizes: tuple[tuple[str, int], ...]
    actions: int
    max_steps: int
    held: tuple[int, ...] = ()

    def __post_init__(self):
        require(
            self.update.method != "grpo" or self.decisions * self.actions >= self.max_steps,
            f"decisions={self.decisions} of {self.actions} control steps end before trials may, after "
            f"max_steps={self.max_steps}, and groups (update.method=grpo) are compared by how their trials end; "
            f"pass --decisions {-(-self.max_steps // self.actions)}.",
        )

    @property
    def play(self) -> playing.Play:
        valued = self.update.method != "grpo"
        return playing.Play(self.image_sizes, self.actions, self.max_steps, again=valued, look_at_end=valued)


class _Kept(NamedTuple):
    """Of one decision of B tables: what was known before it, what was drawn, how probable, and the value, [B, ...]."""

    view: objective.View
    drawn: Any
    log_prob: jax.Array
    value: jax.Array


def begin(
    learner: objective.Learner, params: Mapping[str, Any], stage: Stage, mesh: Mesh, seed: int
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state before the first update, of copies of a policy's parameters (nested) and of what lies under `rl/`; and
    what is trained as it is then, path -> array. Parameters that lie on the mesh stay split as they are, with their
    optimizer state; all else is whole on every device."""
    extra = learner.extra_params(jax.random.fold_in(jax.random.key(seed), 1))
    # Placed as the updates leave them: otherwise the second iteration would compile everything again.
    places = jax.tree.map(lambda x: _place(x, mesh), {**params, objective.SCOPE: extra})
    placed = jax.device_put(jax.tree.map(jnp.copy, {**params, objective.SCOPE: extra}), places)
    state = create(placed, stage.trainable, stage.tx, seed, mesh)
    return state, {path: jnp.copy(x) for path, x in state.trainable.items()}


def _place(x: jax.Array, mesh: Mesh) -> NamedSharding:
    """Where a parameter goes: if it lies on the mesh, where it lies."""
    lies = getattr(x, "sharding", None)
    return lies if isinstance(lies, NamedSharding) and lies.mesh == mesh else meshes.replicated(mesh)


def is_head_alone(model: VLA, state: TrainState) -> bool:
    """Whether nothing learns but the head and what lies under `rl/`, so that features need not be computed again.
    Raises ValueError for a policy that cannot be asked again."""
    alone = all(path.startswith(("head/", f"{objective.SCOPE}/")) for path in state.trainable)
    require(
        alone or model.config.history in ("one_step", "policy_head"),
        f"policy.history={model.config.history!r} keeps tokens between steps, which are not stored for updates of "
        "the backbone; train the head alone (trainable '^head/'), or use history one_step or policy_head.",
    )
    return alone


def policy_of(state: TrainState) -> dict[str, Any]:
    """The policy's own parameters, nested."""
    return {name: x for name, x in state.served.items() if name != objective.SCOPE}


def require_finite(metrics: Mapping[str, float], iteration: int, update: int) -> None:
    """Raise DivergedError where an update would have made something of numbers that are none."""
    if metrics["nonfinite"]:
        bad = ", ".join(sorted(name for name, x in metrics.items() if not np.isfinite(x)))
        raise DivergedError(
            f"iteration {iteration + 1}, update {update}: {bad} not finite. From its last saved point the run would "
            "come here again; begin another (--out) with a lower optimizer.learning_rate, a larger behaviour.floor or, "
            "with a learned reward, a lower update.reward_scale."
        )


class Reinforcement:
    """Rollouts and updates of one policy, compiled once.

    Args:
      params: the policy's, nested; they are copied. Those that lie on the mesh (`parallel.mesh.placed`) stay split as
        they are between updates, with their optimizer state; while tables play, each device has them whole: loops of
        tables end when they like, and no device could wait in them for another's part.
      stage: trainable patterns and optimizer; patterns see the policy's paths and those under `rl/`.
      mesh: tables and updates are split over it; each device has its own share of the trials, but those along
        `tensor` have the same.
      reward: learned, of frames of `settings.actions` control steps (`progress.frame`); None: 1 where a decision does
        the task.
    Raises:
      ValueError: what the policy, the patterns or the settings do not allow; says so.
    """

    def __init__(
        self,
        model: VLA,
        params: Mapping[str, Any],
        settings: Settings,
        stage: Stage,
        mesh: Mesh,
        seed: int,
        reward: RewardModel | None = None,
    ):
        rollouts.require_playable(model.config)
        total, parts = settings.tables * settings.decisions, settings.update.minibatches
        self.shards = mesh.shape["data"] * mesh.shape["fsdp"]
        require(
            settings.tables % self.shards == 0 and total % (parts * self.shards) == 0,
            f"tables={settings.tables} x decisions={settings.decisions} do not divide into "
            f"update.minibatches={parts} and over {self.shards} device(s); change one of them.",
        )
        self.model, self.settings, self.mesh, self.seed, self.reward = model, settings, mesh, seed, reward
        behaviour = behaviours.make(model.config, settings.behaviour)
        self.learner = objective.Learner(model, behaviour, settings.update.value_widths)
        self.state, self.reference = begin(self.learner, params, stage, mesh, seed)
        self.head_only = is_head_alone(model, self.state)
        self.loss = objective.DecisionLoss(self.learner, objective.tasks_of(settings.update))
        self._update = steps.make_train_step(self.loss, stage.tx, stage.learning_rate, self.state, mesh)
        platform = meshes.platform(mesh)
        self._play = dataclasses.replace(settings.play, platform=platform, keep_states=reward is not None)
        options = cpu.options(env.STEP_KIND, platform)
        self._collect = jax.jit(self._collected, compiler_options=options)
        self._part = jax.jit(
            lambda decisions, rows: jax.tree.map(lambda x: x[rows], decisions), out_shardings=meshes.batched(mesh)
        )

    def iterate(self, world: playing.World, number: int) -> tuple[objective.Decisions, dict[str, float]]:
        """Try things out in a world and learn from it; `self.state` moves on. number: of the iteration.

        Returns the decisions, and numbers about them and the updates. Raises DivergedError for numbers that are not
        finite; the state is as before that update.
        """
        collect_key, order_key = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), number + 2))
        decisions, numbers = self._collect(self.state.params, self.reference, world, collect_key)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(order_key)).tolist())
        update, sums, made = self.settings.update, {}, 0
        for _ in range(update.epochs):
            for rows in np.split(rng.permutation(len(decisions.mask)), update.minibatches):
                self.state, metrics = self._update(self.state, self._part(decisions, rows))
                made += 1
                found = {name: float(x) for name, x in metrics.items()}
                require_finite(found, number, made)
                sums = {name: sums.get(name, 0.0) + x for name, x in found.items()}
                if update.divergence_stop and found["moved"] > update.divergence_stop:
                    break
            else:
                continue
            break
        values = {name: float(x) for name, x in numbers.items()} | {name: x / made for name, x in sums.items()}
        return decisions, values | {"updates": made}

    def policy(self) -> dict[str, Any]:
        """The policy's own parameters, nested."""
        return policy_of(self.state)

    # -----------------------------------------------------------------------------------------------------------------
    # One jitted program

    def _collected(
        self, params: Any, reference: Mapping[str, jax.Array], world: playing.World, key: jax.Array
    ) -> tuple[objective.Decisions, dict[str, jax.Array]]:
        settings, count = self.settings, self.settings.decisions
        outcome, kept = self._tried(params, world, key)
        used, kept_used = jax.tree.map(lambda x: x[:count], (outcome, kept))
        task = world.tasks[jnp.maximum(used.trial, 0), used.position]
        held = jnp.isin(task, jnp.array(settings.held, jnp.int32))
        rewards = jnp.where(held, 0.0, self._rewards(world, used, task))
        advantage, target = self._judged(world, used, rewards, kept.value)
        mask = objective.mask_of(used.steps, settings.actions)

        def flat(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

        view, drawn, held = flat((kept_used.view, kept_used.drawn, held))
        frozen = flatten_dict(params, sep="/")
        before = unflatten_dict({**frozen, **reference}, sep="/")
        with meshes.constrained(self.mesh):
            known = self.learner.reconsider(before, view, drawn, settings.actions).log_prob
        decisions = objective.Decisions(
            view, drawn, *flat((mask, kept_used.log_prob)), known, *flat((kept_used.value, advantage, target)), held
        )
        if settings.update.method != "grpo":
            counts = decisions.counts
            paid = counts * ~held
            decisions = decisions.replace(advantage=estimates.standardised(decisions.advantage, paid) * paid)
        else:  # where all trials of a group ended alike there is nothing to learn
            decisions = decisions.replace(mask=decisions.mask & (held | (decisions.advantage != 0))[:, None])
            counts = decisions.counts
        paid_for = ~held.reshape(used.over.shape)
        ended = (used.over & paid_for).sum()
        difference, levels = objective.by_level(decisions.log_prob - known, decisions.mask, self.settings.update.level)
        divergence = objective.mean_of(estimates.divergence(difference, jnp.zeros_like(difference)), levels)
        numbers = {
            "success": (used.success & paid_for).sum() / jnp.maximum(ended, 1),
            "trials": ended,
            "env_steps": outcome.steps.sum(),
            "reward": rewards.sum() / jnp.maximum(((used.steps > 0) & paid_for).sum(), 1),
            "from_reference": (divergence * counts).sum() / jnp.maximum(counts.sum(), 1),
        }
        if settings.update.method != "grpo":  # groups have no use for values
            numbers["explained"] = estimates.explained_variance(decisions.value, decisions.target, counts)
        return decisions, numbers

    def _tried(self, params: Any, world: playing.World, key: jax.Array) -> tuple[playing.Outcome, _Kept]:
        """One decision more of every table than is learned from, for what the last ones led to; leaves [T + 1, B, ...].
        Of several devices each plays its own tables with its own part of the trials, with a key of its own. Along
        `tensor` all play the same, as one device alone would; what the first of them did is what happened, since
        accelerators need not do the same twice to the last bit."""
        count, tables = self.settings.decisions + 1, self.settings.tables // self.shards

        def of_device(params: Any, world: playing.World, key: jax.Array) -> tuple[playing.Outcome, _Kept]:
            game = rollouts.begin(self.model, params, world, tables, key)
            return rollouts.play(self.model, self._act, self._play, count, params, world, game)[1]

        def share(params: Any, world: playing.World, key: jax.Array) -> tuple[playing.Outcome, _Kept]:
            own = jax.lax.axis_index(_AXES)
            outcome, kept = of_device(params, world, key if self.shards == 1 else jax.random.fold_in(key, own))
            trial = jnp.where(outcome.trial >= 0, outcome.trial + own * world.trials, -1)  # as all of them are counted
            return jax.tree.map(lambda x: x[None], (outcome.replace(trial=trial), kept))

        if self.mesh.size == 1:
            return of_device(params, world, key)
        inputs = (PartitionSpec(), rollouts.by_field(PartitionSpec(_AXES), PartitionSpec()), PartitionSpec())
        split = PartitionSpec("tensor", None, _AXES)
        played = jax.shard_map(share, mesh=self.mesh, in_specs=inputs, out_specs=split, check_vma=False)
        return jax.tree.map(lambda x: x[0], played(params, world, key))

    def _act(
        self, params: Any, seen: Inputs, carry: Carry, active: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Carry, _Kept]:
        learner = self.learner
        features, context = learner.perceive(params, seen, carry, active)
        actions, drawn, head = learner.head(params, features, context.head, key)
        log_prob, _ = learner.log_prob(params, features, context.head, drawn)
        known = (None, features, context.head) if self.head_only else (seen, None, carry)
        kept = _Kept(
            objective.View(*known), drawn, log_prob[:, : self.settings.actions], learner.value(params, features)
        )
        after = Carry(where(active, head, carry.head), context.history)
        return self.model.config.normalizer.unnormalize(actions), after, kept

    def _rewards(self, world: playing.World, outcome: playing.Outcome, task: jax.Array) -> jax.Array:
        """float32[T, B], of each decision; task: int32[T, B], its part in `tables.NAMES`."""
        if self.reward is None:
            return outcome.success.astype(jnp.float32)
        scenes = env.pick(progress.lean(world.scenes), world.scene[jnp.maximum(outcome.trial, 0)])
        numbers = jax.vmap(jax.vmap(progress.numbers))
        before, after = (numbers(scenes, jax.tree.map(lambda x, at=at: x[:, :, at], outcome.states)) for at in (0, -1))
        learned = self.reward(progress.frame(before, after, task)) * self.settings.update.reward_scale
        return jnp.where(outcome.steps > 0, learned, 0.0)

    def _judged(
        self, world: playing.World, outcome: playing.Outcome, rewards: jax.Array, values: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Advantages and targets of values, float32[T, B] each; rewards float32[T, B], values float32[T + 1, B]."""
        update = self.settings.update
        if update.method == "grpo":
            groups = world.group[jnp.maximum(outcome.trial[0], 0)]
            advantage = estimates.group_advantages(rewards.sum(0), groups, self.settings.tables)
            return jnp.broadcast_to(advantage, rewards.shape), jnp.zeros_like(rewards)
        cut = outcome.over | outcome.looked | (outcome.trial < 0)
        advantage = estimates.advantages(
            rewards, values, outcome.success, cut, discount=update.discount, trace=update.trace
        )
        return advantage, advantage + values[:-1]
