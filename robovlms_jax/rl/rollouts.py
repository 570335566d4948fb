"""A policy on many PlayTables in one jitted program: look, decide, execute a part of the chunk, check, take the next
trial; a `lax.scan` of that. Pictures are made once per decision. Evaluation and reinforcement learning share it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

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
    blank = model.init_head_carry(1)

    def one(slot: jax.Array, carry: Carry) -> Carry:
        return jax.lax.cond(fresh[slot], lambda carry: model.reset_slot(carry, slot, blank), lambda carry: carry, carry)

    return jax.lax.fori_loop(0, len(fresh), one, carry)


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
    has robot_obs and scene_obs, their label "scene" names the table.
    """

    def __init__(
        self,
        model: VLA,
        encode: playing.EncodeText,
        tables: int,
        image_sizes: dict[str, int],
        execution: Execution | None = None,
        criterion: SuccessCriterion | None = None,
    ):
        criterion = criterion or SuccessCriterion()
        require_playable(model.config)
        require(
            criterion.completed is SuccessCriterion.completed and criterion.stop_at_success,
            "tables on the device judge by CALVIN's rules and stop at success; use the host's loop for others.",
        )
        self._encode = encode
        mesh = meshes.make_mesh((1, 1, 1), jax.local_devices()[:1])
        self._how = playing.Play(
            tuple(sorted(image_sizes.items())),
            playing.executed(execution or Execution(), model.config.chunk),
            criterion.max_steps,
            platform=meshes.platform(mesh),
        )
        # Everything lies where it began: placed anew by the first call, the second would compile again.
        self._place = meshes.replicated(mesh)
        placed = functools.partial(jax.jit, out_shardings=self._place)
        run = functools.partial(play, model, greedy(model), self._how, _AT_ONCE)
        self._run = placed(
            run, donate_argnums=2, compiler_options=cpu.options(env.step_kind(tables), self._how.platform)
        )
        first = functools.partial(begin, model, tables=tables, key=jax.random.key(0))
        self._begin = placed(first, compiler_options=cpu.options("tiny_run_once", self._how.platform))

    def results(self, params: Any, trials: Sequence[Trial]) -> Iterator[TrialResult]:
        """Results in the order in which trials end."""
        world = playing.make_world(trials, self._encode, dict(self._how.image_sizes)["static"])
        world = jax.device_put(world, self._place)
        game = self._begin(params, world)
        books: dict[int, tuple[list[bool], list[int]]] = {}
        ended = 0
        while ended < len(trials):
            game, (outcome, _) = self._run(params, world, game)
            for number in _book(jax.device_get(outcome), books, trials):
                ended += 1
                trial, (success, steps) = trials[number], books.pop(number)
                yield TrialResult(
                    trial.index, trial.tasks, trial.instructions, tuple(success), tuple(steps), trial.labels
                )


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
