"""A policy on many PlayTables in one jitted program: look, decide, execute a part of the chunk, check, take the next
trial; a `lax.scan` of that. Pictures are made once per decision. Evaluation and reinforcement learning share it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from robovlms_jax.control import robot as robots
from robovlms_jax.control.execution import Execution
from robovlms_jax.evaluation.rollout import SuccessCriterion, Trial, TrialResult
from robovlms_jax.inputs import proprio
from robovlms_jax.parallel import cpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.playtable import env
from robovlms_jax.policies import objective, serving
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.sensors import base as sensors
from robovlms_jax.policies.vla import VLA, Carry
from robovlms_jax.rl import tables as playing
from robovlms_jax.schema import require
from robovlms_jax.types import Inputs

Act = Callable[[Any, Inputs, Carry, jax.Array, jax.Array], tuple[jax.Array, Carry, Any]]
"""(parameters, `Inputs` of one frame as it was seen, the carry, bool[B] who is asked, a key) -> chunks float32[B, C, A]
in dataset units, the new carry, and whatever is to be kept of the decision, leaves [B, ...]."""

_AT_ONCE = 8
"""Decisions between two looks at whether any trial is left."""


@flax.struct.dataclass
class Game:
    """Everything that a further decision depends on. carry: the policy's. key: of its draws."""

    tables: playing.Tables
    carry: Carry
    key: jax.Array


def require_playable(config: PolicyConfig) -> None:
    """Raise ValueError for a policy that needs what tables on the device do not have."""
    require(
        config.robot == robots.CALVIN,
        f"the policy drives robot {config.robot.name!r}; PlayTable is CALVIN's. Roll it out where its robot is.",
    )
    require(
        config.representation == "robot",
        f"policy.representation={config.representation!r} is turned into the robot's own actions on the host; tables "
        "on the device take policy.representation='robot' alone. Use the host's loop.",
    )
    others = [sensor.name for sensor in config.all_sensors if sensor.name != "proprio"]
    require(
        not others,
        f"the policy reads {others}; tables on the device have pictures and the robot's state. Use the host's loop.",
    )


def begin(model: VLA, params: Any, world: playing.World, tables: int, key: jax.Array) -> Game:
    """Before the first decision of B tables."""
    carry = model.init_carry(tables, params, world.text_ids.shape[2])
    return Game(playing.begin(world, tables), carry, key)


def see(config: PolicyConfig, images: Any, robot_obs: jax.Array, text: tuple[jax.Array, jax.Array]) -> Inputs:
    """What a policy is shown of B tables, one frame of each; pictures as they were taken."""
    batch = len(robot_obs)
    extras = sensors.blank(config.all_sensors, batch, 1)
    if config.proprio.enabled:
        state = proprio.from_robot_state(robot_obs, len(config.robot.state))
        extras["sensors"] = {**extras["sensors"], "proprio": state[:, None]}
    images = {camera: images[camera][:, None] for camera in config.cameras}
    return Inputs(images, *text, jnp.ones((batch, 1), bool), **extras)


def play(
    model: VLA, act: Act, how: playing.Play, decisions: int, params: Any, world: playing.World, game: Game
) -> tuple[Game, tuple[playing.Outcome, Any]]:
    """So many decisions of every table; pure.

    Returns:
      Where the game stands then; outcomes and what `act` wants kept, leaves [decisions, B, ...].
    """

    def decide(game: Game, _: None) -> tuple[Game, tuple[playing.Outcome, Any]]:
        key, own = jax.random.split(game.key)
        images, robot_obs, text = playing.look(world, how, game.tables)
        seen = see(model.config, images, robot_obs, text)
        carry = forget(model, game.carry, game.tables.fresh)
        actions, carry, kept = act(params, seen, carry, game.tables.trial >= 0, own)
        tables, outcome = playing.execute(world, how, game.tables, actions)
        return Game(tables, carry, key), (outcome, kept)

    return jax.lax.scan(decide, game, length=decisions)


def forget(model: VLA, carry: Carry, fresh: jax.Array) -> Carry:
    """The carry as before an episode's first step where bool[B] `fresh`."""
    slots = jnp.where(fresh, jnp.arange(len(fresh)), len(fresh))  # what is written behind the last is dropped
    return model.reset_slot(carry, slots, model.init_head_carry(1))


def greedy(model: VLA) -> Act:
    """The policy as it is served: the actions that `BatchedVLAPolicy` would hand out. Keeps nothing."""

    def act(params: Any, seen: Inputs, carry: Carry, active: jax.Array, key: jax.Array) -> tuple[Any, Carry, tuple]:
        images = {camera: x[:, 0] for camera, x in seen.images.items()}
        extras = {"sensors": seen.sensors, "sensor_mask": seen.sensor_mask}
        actions, carry = serving.control_step(
            model, params, carry, images, seen.text_ids, seen.text_mask, active, extras
        )
        return actions, carry, ()

    return act


def prepared(model: VLA, seen: Inputs) -> Inputs:
    """The same with pictures as the model takes them."""
    return objective.prepare(seen, model.vlm.image, model.config.cameras)


class Player:
    """A policy's rollouts on the device: the same trials and results as `evaluation.rollout.run`, in one program.

    Compiled for its number of tables, trials and the length of their prompts. Trials must be PlayTable's: their `start`
    has robot_obs and scene_obs, their label "scene" names the table. Tables are split over devices, as many as divide
    them; each device has its own share of the trials, so that none waits for another.

    Args:
      devices: None: those of this process.
    """

    def __init__(
        self,
        model: VLA,
        encode: playing.EncodeText,
        tables: int,
        image_sizes: dict[str, int],
        execution: Execution | None = None,
        criterion: SuccessCriterion | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        criterion = criterion or SuccessCriterion()
        require_playable(model.config)
        require(
            criterion.completed is SuccessCriterion.completed and criterion.stop_at_success,
            "tables on the device judge by CALVIN's rules and stop at success; use the host's loop for others.",
        )
        found = jax.local_devices() if devices is None else list(devices)
        self.shards = max(n for n in range(1, min(len(found), tables) + 1) if tables % n == 0)
        mesh = meshes.make_mesh((self.shards, 1, 1), found[: self.shards])
        self._encode = encode
        self._how = playing.Play(
            tuple(sorted(image_sizes.items())),
            playing.executed(execution or Execution(), model.config.chunk),
            criterion.max_steps,
            platform=meshes.platform(mesh),
        )
        own = tables // self.shards
        run = _on_each(mesh, functools.partial(play, model, greedy(model), self._how, _AT_ONCE), games=1)
        platform = self._how.platform
        self._run = jax.jit(run, donate_argnums=2, compiler_options=cpu.options(env.STEP_KIND, platform))
        first = _on_each(mesh, functools.partial(begin, model, tables=own, key=jax.random.key(0)), games=0)
        self._begin = jax.jit(first, compiler_options=cpu.options("tiny_run_once", platform))
        # Everything lies where it began: placed anew by the first call, the second would compile again.
        self._whole, self._split = meshes.replicated(mesh), meshes.batched(mesh)

    def results(self, params: Any, trials: Sequence[Trial]) -> Iterator[TrialResult]:
        """Results in the order in which trials end."""
        world, numbers = self._shared_out(trials)
        params = jax.device_put(params, self._whole)
        game = self._begin(params, world)
        books: list[dict[int, tuple[list[bool], list[int]]]] = [{} for _ in numbers]
        ended = 0
        while ended < len(trials):
            game, (outcome, _) = self._run(params, world, game)
            outcome = jax.device_get(outcome)
            for shard, (own, book) in enumerate(zip(numbers, books, strict=True)):
                part = jax.tree.map(lambda x, shard=shard: x[shard], outcome)
                for number in _book(part, book, [trials[i] for i in [*own, *numbers[0][:1]]]):
                    if number >= len(own):
                        continue
                    ended += 1
                    trial, (success, steps) = trials[own[number]], book.pop(number)
                    yield TrialResult(
                        trial.index, trial.tasks, trial.instructions, tuple(success), tuple(steps), trial.labels
                    )

    def _shared_out(self, trials: Sequence[Trial]) -> tuple[playing.World, list[list[int]]]:
        """The world, its trials split over the devices, and each device's trials by their numbers. Where they do not
        divide, the last of some devices is another's first once more, whose result nobody counts."""
        world = playing.make_world(trials, self._encode, dict(self._how.image_sizes)["static"])
        numbers = [list(range(shard, len(trials), self.shards)) for shard in range(self.shards)]
        each = len(numbers[0])
        rows = np.array([[*own, *[0] * (each - len(own))] for own in numbers]).reshape(-1)
        world = world.take(rows, np.zeros(len(rows)))
        return jax.device_put(world, by_field(self._split, self._whole)), numbers


def by_field(of_trials: Any, others: Any) -> playing.World:
    """A world whose fields are the first of these where they have an axis of trials, the second elsewhere."""
    names = [field.name for field in dataclasses.fields(playing.World)]
    return playing.World(**{name: of_trials if name in playing.World.OF_TRIALS else others for name in names})


def _on_each(mesh: Mesh, function: Callable[..., Any], games: int) -> Callable[..., Any]:
    """`function(params, world, *games)` on every device, with its own share of the trials; games and what it returns
    have a leading axis of devices."""
    split = meshes.batched(mesh).spec

    def local(params: Any, world: playing.World, *games: Any) -> Any:
        found = function(params, world, *jax.tree.map(lambda x: x[0], games))
        return jax.tree.map(lambda x: x[None], found)

    inputs = (PartitionSpec(), by_field(split, PartitionSpec()), *[split] * games)
    return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=split, check_vma=False)


def _book(
    outcome: playing.Outcome, books: dict[int, tuple[list[bool], list[int]]], trials: Sequence[Trial]
) -> Iterator[int]:
    """Write down the tasks that are over, in their order; yields the numbers of trials that are."""
    for decision, table in np.argwhere(outcome.over):
        number, done = int(outcome.trial[decision, table]), bool(outcome.success[decision, table])
        success, steps = books.setdefault(number, ([], []))
        success.append(done)
        steps.append(int(outcome.step[decision, table] + outcome.steps[decision, table]))
        if not done or len(success) == len(trials[number].tasks):
            yield number
