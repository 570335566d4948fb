"""A run of reinforcement learning on PlayTable: measure a checkpoint, improve it, measure it again on the same
trials."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from robovlms_jax import atomic, ending, json_files, schema
from robovlms_jax.control.execution import Execution
from robovlms_jax.evaluation.rollout import SuccessCriterion, Trial
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.rl import direct, learning, rewards, rollouts, starts
from robovlms_jax.rl import tables as playing
from robovlms_jax.rl.config import ReinforceConfig, unread
from robovlms_jax.rl.preferences import RewardModel
from robovlms_jax.runs import build, load, played, preferring, reinforced, saved
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import require
from robovlms_jax.training import checkpoints, directory, loop, metrics, provenance, seals, stages, stopping
from robovlms_jax.training.config import TrainConfig

log = logging.getLogger(__name__)

LEARNING, SETTINGS = "learning", "reinforce.json"
"""In the output: what a stopped run goes on from; its settings."""
_MAY_CHANGE = ("iterations", "resume", "checkpoint_every", "out", "checkpoint", "reward", "labels", "devices", "mesh")
"""Where checkpoint, reward and labels lie may change; their identities are compared. On other devices a run goes on
with other draws."""

Rounds = Callable[[int], Iterator[Any]]
"""Number of the first iteration -> what that one and all later ones learn from."""
Learner = learning.Reinforcement | direct.DirectPreferences


@dataclasses.dataclass(frozen=True)
class _Position:
    """Where a run is; step: iterations made."""

    step: int


def run(config: ReinforceConfig) -> pathlib.Path:
    """The whole run; returns its report. Raises ValueError, OSError that say what is wrong, KeyboardInterrupt."""
    require(config.checkpoint != "", "reinforce.checkpoint is empty; name the policy to begin with.")
    _devices(config)  # before a checkpoint is read
    output = pathlib.Path(config.out)
    directory.require_writable(output)
    model, params, encode = load.open_model(config.checkpoint, weights="float32")
    experiment, assets = saved.read_checkpoint(checkpoints.locate(config.checkpoint))
    config = _resolved(config, experiment)
    reward = _reward(config, model.config.chunk)
    with directory.claim(output), stopping.Interrupts() as interrupts:
        # Nothing is written before all that can be wrong with the settings has been said.
        directory.keep_programs("auto")
        questions, trials = reinforced.measurements(config), _trials(config)
        labels = preferring.about(config)
        sizes = dict(zip(("static", "wrist"), config.image_size, strict=True))
        how = Execution("receding", horizon=config.horizon), SuccessCriterion(max_steps=config.max_steps)
        player = rollouts.Player(model, encode, config.tables, sizes, *how)
        learner = _learner(config, model, params, reward)
        if isinstance(learner, direct.DirectPreferences):
            preferring.require_readable(config, learner)
        _settle(config, output, labels)
        before = reinforced.before(output, player, params, questions)
        serving = {"config": schema.to_dict(experiment), "assets": dict(assets)}
        if isinstance(learner, direct.DirectPreferences):
            rounds = functools.partial(_again, preferring.compared(config, output, learner, encode))
        else:
            rounds = functools.partial(worlds, config, playing.make_world(trials, encode, config.image_size[0]))
        finished = _learn(config, output, learner, rounds, serving)
        if interrupts.asked:
            raise KeyboardInterrupt
        if not finished:
            raise ending.Terminated
        policy = learner.policy()
        after = reinforced.measure(player, policy, questions)
        checkpoints.write_policy(output, policy, serving)
        count = sum(x.size for x in learner.state.trainable.values())
        return reinforced.report(config.checkpoint, schema.to_dict(config), output, before, after, count)


def words(out: str) -> str:
    """What a run that a signal has ended leaves, and how to go on (`ending.stop`)."""
    output = pathlib.Path(out)
    if not (output / SETTINGS).exists():
        return ending.ANEW
    try:
        done = checkpoints.resume_point(output / LEARNING).name
    except OSError:
        return "no iteration is saved; the same command with --resume begins with the first one."
    return f"iteration {done} is saved; the same command with --resume goes on from there."


def _resolved(config: ReinforceConfig, experiment: ExperimentConfig) -> ReinforceConfig:
    """With what the checkpoint knows where `config` leaves it open. Raises ValueError."""
    config = dataclasses.replace(config, checkpoint=str(checkpoints.locate(config.checkpoint)))
    return preferring.resolved(_filled(config, experiment))


def _filled(config: ReinforceConfig, experiment: ExperimentConfig) -> ReinforceConfig:
    names = ("tasks", "scenes", "unseen_scene", "max_steps", "horizon", "image_size")
    found = played.filled(config, experiment, names)
    require(
        len(found.tasks) > 0,
        "reinforce.tasks is empty, and the checkpoint's rollouts and demonstrations name none; name the tasks to "
        "improve.",
    )
    if found.unseen_scene in played.of(experiment).scenes:
        log.warning(
            "unseen_scene %s is a table that the checkpoint's demonstrations showed: unseen_table measures one that "
            "only reinforcement did not learn on",
            found.unseen_scene,
        )
    steps = found.decisions * min(found.horizon, experiment.policy.chunk)
    if steps < found.max_steps and found.update.method in ("ppo", "awr"):
        log.info(
            "an iteration has %d decisions a table, %d control steps: of trials of %d the rest is not learned from",
            found.decisions,
            steps,
            found.max_steps,
        )
    return found


def _settle(config: ReinforceConfig, output: pathlib.Path, labels: Mapping[str, Any] | None = None) -> None:
    """Refuse a directory with something else in it; write down what this run is. labels: see `preferring.about`."""
    path = output / SETTINGS
    now = json.loads(json.dumps(schema.to_dict(config))) | {
        "identity": seals.identity(pathlib.Path(config.checkpoint)).label,
        **(labels or {}),
    }
    if config.reward:
        now["reward_identity"] = rewards.identity(config.reward)
    policy = output / checkpoints.FOLDER
    unreported = path.exists() and reinforced.is_unreported(output)
    require(
        not policy.exists() or unreported,
        f"{output} holds a policy already; choose another reinforce.out.",
    )
    if not config.resume:
        require(not path.exists(), f"{path} is there: pass --resume to go on with that run, or another --out.")
        left = [name for name in (LEARNING, reinforced.BEFORE) if (output / name).exists()]
        require(
            not left,
            f"{output} has {' and '.join(left)} of a run whose settings ({SETTINGS}) are gone, and this run would take "
            "them for its own; remove them, or choose another --out.",
        )
        output.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(now, indent=2) + "\n")
        return
    require(path.exists(), f"nothing to resume: there is no {path}; leave out --resume, or correct --out.")
    before = _known_since(json_files.read_object(path, "settings of a reinforcement"))
    differing = json_files.differences(before, now, sorted({*before, *now} - set(_MAY_CHANGE)))
    require(
        not differing,
        f"{output} was begun with other settings ({differing}); leave them as they were, or choose another --out.",
    )
    if policy.exists():
        log.info("%s was written by a run that ended before its report; it is written again", policy)
        shutil.rmtree(policy)


def _known_since(before: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as an earlier version wrote them, with those that came later as they are when nobody gives them."""
    usual = json.loads(json.dumps(schema.to_dict(ReinforceConfig())))
    nested = {name: {**usual[name], **x} for name, x in before.items() if isinstance(usual.get(name), dict)}
    method = before.get("update", {}).get("method", "ppo")
    if method == "dpo":
        usual["held_out"] = 0.0  # all pairs taught
    known = {**usual, **before, **nested}
    given = method, known["labels"], known["reward"]
    for part, field, _ in unread(*given):  # given all the same, by a version that did not refuse it
        at, plain = (known, usual) if part == "reinforce" else (known["update"], usual["update"])
        at[field] = plain[field]
    return known


def _reward(config: ReinforceConfig, chunk: int) -> RewardModel | None:
    """The learned one, if there is one, which must be about these tasks and decisions."""
    if not config.reward:
        return None
    saved_reward = rewards.load(config.reward)
    unknown = sorted(set(config.tasks) - set(saved_reward.tasks))
    require(
        not unknown,
        f"{config.reward} was learned from answers about {list(saved_reward.tasks)}, not about {unknown}; leave these "
        "out of --tasks, or answer questions about them.",
    )
    actions = min(config.horizon, chunk)
    require(
        saved_reward.every == actions,
        f"{config.reward} reads frames of {saved_reward.every} control steps, and a decision has {actions}; pass "
        f"--horizon {saved_reward.every}.",
    )
    return saved_reward.model


def _devices(config: ReinforceConfig) -> list[jax.Device]:
    """Raises ValueError where there are not as many."""
    found = jax.local_devices()
    require(
        len(found) >= config.devices,
        f"reinforce.devices={config.devices}, and this process has {len(found)}; pass --devices {len(found)}.",
    )
    return found[: config.devices]


def _learner(config: ReinforceConfig, model: Any, params: Any, reward: RewardModel | None = None) -> Learner:
    updates = config.iterations * config.update.epochs * config.update.minibatches
    (stage,) = stages.plan(TrainConfig(steps=updates, trainable=config.trainable), config.optimizer)
    mesh = meshes.make_mesh(config.mesh.sizes(config.devices), _devices(config))
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        params = jax.device_put(params, build.abstract_params(model, mesh)[1])
    if config.update.method == "dpo":
        return direct.DirectPreferences(model, params, config.behaviour, config.update, stage, mesh, config.seed)
    settings = learning.Settings(
        config.behaviour,
        config.update,
        config.tables,
        config.decisions,
        tuple(zip(("static", "wrist"), config.image_size, strict=True)),
        min(config.horizon, model.config.chunk),
        config.max_steps,
        tuple(playing.NAMES.index(name) for name in config.others) if config.update.hold_weight else (),
    )
    return learning.Reinforcement(model, params, settings, stage, mesh, config.seed, reward)


def _trials(config: ReinforceConfig) -> list[Trial]:
    """What is learned from."""
    tables = config.tables_to_learn_on
    return starts.draw(config.played, tables, config.pool, config.seed, spread=config.start_spread)


def _again(compared: direct.Comparisons, begin: int) -> Iterator[direct.Comparisons]:
    """The same pairs in every iteration."""
    return itertools.repeat(compared)


def worlds(config: ReinforceConfig, pool: playing.World, begin: int) -> Iterator[playing.World]:
    """The trials of each iteration, from number `begin` on; a function of the seed and that number."""
    for number in itertools.count(begin):
        rng = np.random.default_rng([config.seed, 1, number])
        if config.update.method != "grpo":
            rows = rng.permutation(np.arange(max(pool.trials, 2 * config.tables)) % pool.trials)
            rows = rows[: len(rows) - len(rows) % config.shards]  # each plays as many
            yield pool.take(rows, np.zeros(len(rows), np.int32))
        else:
            count = config.tables // config.group
            rows = rng.permutation(np.arange(max(pool.trials, count)) % pool.trials)[:count]
            yield pool.take(np.repeat(rows, config.group), np.repeat(np.arange(count), config.group))


def _learn(
    config: ReinforceConfig,
    output: pathlib.Path,
    learner: Learner,
    rounds: Rounds,
    serving: Mapping[str, Any],
) -> bool:
    """All iterations that are left; False: stopped by a signal, saved."""
    checkpointer = checkpoints.Checkpointer(output / LEARNING, keep=2, serving=serving)
    done = {"iteration": 0, "env_steps": 0, "seconds": 0.0}
    if config.resume and checkpointer.latest is not None:
        learner.state, position = checkpointer.restore(learner.state)
        done = {name: position[name] for name in done}
        require(
            done["iteration"] <= config.iterations,
            f"reinforce.iterations={config.iterations}, and {output} has made {done['iteration']}; give at least as "
            "many.",
        )
    else:
        provenance.write_record(output, "reinforce", schema.to_dict(config))
    writer = metrics.JsonLines(output / "metrics.jsonl", done["iteration"])
    clock = _Clock(done)

    def step(position: _Position, given: Any) -> tuple[_Position, dict[str, float]]:
        _, numbers = learner.iterate(given, position.step)
        numbers |= clock.count(position.step + 1, numbers["env_steps"])
        writer.write(position.step + 1, numbers)
        return _Position(position.step + 1), numbers

    schedule = loop.Schedule(config.iterations, config.iterations, 1, config.checkpoint_every)
    saving = _Saving(checkpointer, learner, clock)
    with contextlib.closing(checkpointer):
        _, finished = loop.fit(
            _Position(done["iteration"]),
            rounds(done["iteration"]),
            step,
            schedule=schedule,
            hooks=[_Stop(), _Say(config.iterations), saving],
        )
    return finished


class _Clock:
    """Environment steps and seconds of a run, over all of its parts."""

    def __init__(self, done: Mapping[str, Any]):
        self.done, self._begin, self._before = dict(done), time.perf_counter(), done["seconds"]

    def count(self, iteration: int, env_steps: float) -> dict[str, float]:
        seconds = self._before + time.perf_counter() - self._begin
        steps = self.done["env_steps"] + int(env_steps)
        self.done = {"iteration": iteration, "env_steps": steps, "seconds": round(seconds, 2)}
        return {"env_steps": steps, "seconds": self.done["seconds"]}


class _Stop(stopping.StopSignal):
    """As in training, but the program has the last word: its flag has another name."""

    def finish(self, step: int, stopped: bool) -> None:
        pass


class _Say(loop.Hook):
    """A line per iteration."""

    def __init__(self, iterations: int):
        self._iterations = iterations

    def after(self, step: loop.Step, metrics: Mapping[str, Any]) -> None:
        names = ("success", "reward", "trials", "loss", "preferred", "preferred_held_out", "env_steps", "seconds")
        names += ("ratio", "moved", "from_reference", "explained")
        said = ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
        log.info("iteration %d of %d: %s", step.number, self._iterations, said)


class _Saving(loop.Hook):
    """Points to go on from."""

    def __init__(self, checkpointer: checkpoints.Checkpointer, learner: Learner, clock: _Clock):
        self._checkpointer, self._learner, self._clock = checkpointer, learner, clock

    def after(self, step: loop.Step, metrics: Mapping[str, Any]) -> None:
        if step.save or step.stop:
            self._checkpointer.save(self._learner.state, self._clock.done)

    def finish(self, step: int, stopped: bool) -> None:
        self._checkpointer.wait()
