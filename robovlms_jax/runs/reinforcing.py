"""A run of reinforcement learning on PlayTable: measure a checkpoint, improve it, measure it again on the same
trials."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from robovlms_jax import atomic, json_files, schema
from robovlms_jax.control.execution import Execution
from robovlms_jax.evaluation import chains
from robovlms_jax.evaluation.rollout import SuccessCriterion, Trial, TrialResult
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.rl import learning, rewards, rollouts, starts
from robovlms_jax.rl import tables as playing
from robovlms_jax.rl.config import BehaviourConfig, UpdateConfig
from robovlms_jax.rl.preferences import RewardModel
from robovlms_jax.runs import load, played, reinforced, saved
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.schema import require
from robovlms_jax.training import checkpoints, directory, loop, metrics, provenance, seals, stages, stopping
from robovlms_jax.training.config import OptimizerConfig, TrainConfig

log = logging.getLogger(__name__)

LEARNING, SETTINGS, BEFORE = "learning", "reinforce.json", "before.json"
"""In the output: what a stopped run goes on from; its settings; successes of the checkpoint that it began with."""
_MAY_CHANGE = ("iterations", "resume", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
@schema.checked("reinforce")
class ReinforceConfig:
    """What to improve, on what, and how."""

    checkpoint: str = ""
    """The policy to begin with: a run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME."""
    out: str = "runs/reinforce"
    """Where the improved policy goes, as a checkpoint like any other, with the report and what a stopped run needs."""
    resume: bool = False
    """Go on with the run in `out`."""
    tasks: tuple[str, ...] = ()
    """Tasks to improve; empty: those of the checkpoint's own rollouts or demonstrations."""
    others: tuple[str, ...] = ()
    """Tasks that are not trained and measured all the same: whether they suffer."""
    scenes: tuple[str, ...] = ()
    """Tables to learn on; empty: those that the checkpoint learned on."""
    unseen_scene: str = ""
    """Table that is measured and not learned on; empty: that of the checkpoint's own rollouts."""
    pool: int = 256
    """Starts that trials are drawn from."""
    start_spread: float = 0.25
    """Metres by which the hand is moved at a trial's beginning, at most (`demonstrations.start_spread`)."""
    max_steps: int = 0
    """Control steps of a trial; 0: as in the checkpoint's own rollouts or demonstrations."""
    horizon: int = 0
    """Actions executed of every predicted chunk; 0: as in the checkpoint's own rollouts."""
    image_size: tuple[int, ...] = ()
    """Pixels of static and wrist camera; empty: what the policy was trained with."""
    iterations: int = 50
    tables: int = 32
    """Side by side while learning and measuring."""
    decisions: int = 32
    """Of every table in one iteration."""
    group: int = 8
    """Method grpo: trials from the same state."""
    trainable: tuple[str, ...] = ("^head/", "^rl/")
    """As train.trainable, of the policy's parameters and of those under rl/: the behaviour's spread and the critic. The
    head alone is cheap: features are kept, and the backbone is not asked again. "lora_" trains adapters."""
    behaviour: BehaviourConfig = BehaviourConfig()
    update: UpdateConfig = UpdateConfig()
    reward: str = ""
    """A learned reward (experiments.reward) in place of the task checker's, which then only ends trials and measures;
    empty: the checker's. Weigh the divergence with it (--preset preferences)."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, rates={"^rl/value/": 10.0}, clip_norm=1.0)
    trials: int = 200
    """Of each measurement."""
    checkpoint_every: int = 10
    """Iterations between two points that a stopped run goes on from."""
    seed: int = 0

    def __post_init__(self):
        for field in ("pool", "iterations", "tables", "decisions", "group", "trials"):
            require(getattr(self, field) >= 1, f"reinforce.{field}={getattr(self, field)} must be at least 1.")
        for field in ("max_steps", "horizon"):
            require(getattr(self, field) >= 0, f"reinforce.{field}={getattr(self, field)} must not be negative.")
        require(
            len(self.image_size) in (0, 2),
            f"reinforce.image_size={self.image_size}: expected pixels of static and wrist camera, or nothing.",
        )
        require(self.checkpoint_every >= 1, f"reinforce.checkpoint_every={self.checkpoint_every} must be at least 1.")
        require(
            self.update.method == "ppo" or self.tables % self.group == 0,
            f"reinforce.tables={self.tables} is no multiple of reinforce.group={self.group}; each group plays whole.",
        )
        require(
            not set(self.tasks) & set(self.others),
            f"reinforce.others names {sorted(set(self.tasks) & set(self.others))}, which reinforce.tasks trains.",
        )
        require(
            not self.unseen_scene or self.unseen_scene not in self.scenes,
            f"reinforce.unseen_scene={self.unseen_scene!r} is one of reinforce.scenes={self.scenes}; name another.",
        )


@dataclasses.dataclass(frozen=True)
class _Position:
    """Where a run is; step: iterations made."""

    step: int


def run(config: ReinforceConfig) -> pathlib.Path:
    """The whole run; returns its report. Raises ValueError, OSError that say what is wrong, KeyboardInterrupt."""
    require(config.checkpoint != "", "reinforce.checkpoint is empty; name the policy to begin with.")
    output = pathlib.Path(config.out)
    directory.require_writable(output)
    model, params, encode = load.open_model(config.checkpoint, weights="float32")
    experiment, assets = saved.read_checkpoint(checkpoints.locate(config.checkpoint))
    config = _resolved(config, experiment)
    reward = _reward(config, model.config.chunk)
    with directory.claim(output), stopping.Interrupts() as interrupts:
        _settle(config, output)
        directory.keep_programs("auto")
        sizes = dict(zip(("static", "wrist"), config.image_size, strict=True))
        how = Execution("receding", horizon=config.horizon), SuccessCriterion(max_steps=config.max_steps)
        player = rollouts.Player(model, encode, config.tables, sizes, *how)
        questions = measurements(config)
        before = _before(output, player, params, questions)
        learner = _learner(config, model, params, reward)
        serving = {"config": schema.to_dict(experiment), "assets": dict(assets)}
        finished = _learn(config, output, learner, encode, serving)
        if not finished or interrupts.asked:
            raise KeyboardInterrupt
        policy = learner.policy()
        after = {name: _measure(player, policy, trials) for name, trials in questions.items()}
        checkpoints.write_policy(output, policy, serving)
        count = sum(x.size for x in learner.state.trainable.values())
        return reinforced.report(config.checkpoint, schema.to_dict(config), output, before, after, count)


def _resolved(config: ReinforceConfig, experiment: ExperimentConfig) -> ReinforceConfig:
    """With what the checkpoint knows where `config` leaves it open. Raises ValueError."""
    asked = dataclasses.replace(config, checkpoint=str(checkpoints.locate(config.checkpoint)))
    names = ("tasks", "scenes", "unseen_scene", "max_steps", "horizon", "image_size")
    found = played.filled(asked, experiment, names)
    require(
        len(found.tasks) > 0,
        "reinforce.tasks is empty, and the checkpoint's rollouts and demonstrations name none; name the tasks to "
        "improve.",
    )
    return found


def _settle(config: ReinforceConfig, output: pathlib.Path) -> None:
    """Refuse a directory with something else in it; write down what this run is."""
    path = output / SETTINGS
    now = json.loads(json.dumps(schema.to_dict(config))) | {
        "identity": seals.identity(pathlib.Path(config.checkpoint)).label
    }
    if config.reward:
        now["reward_identity"] = rewards.identity(config.reward)
    require(
        not (output / checkpoints.FOLDER).exists(),
        f"{output} holds a policy already; choose another reinforce.out.",
    )
    if not config.resume:
        require(not path.exists(), f"{path} is there: pass --resume to go on with that run, or another --out.")
        output.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(now, indent=2) + "\n")
        return
    before = json_files.read_object(path, "settings of a reinforcement")
    differing = json_files.differences(before, now, sorted({*before, *now} - set(_MAY_CHANGE)))
    require(
        not differing,
        f"{output} was begun with other settings ({differing}); leave them as they were, or choose another --out.",
    )


def measurements(config: ReinforceConfig) -> dict[str, list[Trial]]:
    """Name -> the trials that are played before and after. Each but the first changes one thing: the table, the words,
    where hand and blocks begin."""
    seen = config.scenes

    def resting(names: Sequence[str], scenes: Sequence[str], *, held_out: bool = False) -> list[Trial]:
        """Tables take turns, each for all tasks once."""
        found = []
        for chain in chains.single_tasks(names, config.trials):
            scene = scenes[chain.index // len(names) % len(scenes)]
            found += chains.chain_trials([chain], scene=scene, train_scenes=config.scenes, held_out=held_out)
        return found

    found = {
        "trained": resting(config.tasks, seen),
        "unseen_table": resting(config.tasks, (config.unseen_scene,)),
        "unseen_phrasing": resting(config.tasks, seen, held_out=True),
        "unseen_start": starts.draw(config.tasks, seen, config.trials, 2**31, spread=config.start_spread),
    }
    return found | ({"other_tasks": resting(config.others, seen)} if config.others else {})


def _measure(player: rollouts.Player, params: Any, trials: Sequence[Trial]) -> list[TrialResult]:
    return sorted(player.results(params, trials), key=lambda result: result.index)


def _before(
    output: pathlib.Path, player: rollouts.Player, params: Any, questions: Mapping[str, Sequence[Trial]]
) -> dict[str, list[bool]]:
    """Name -> success of every trial before learning; measured once."""
    path = output / BEFORE
    known: dict[str, list[bool]] = json_files.read_object(path, "successes") if path.is_file() else {}
    for name, trials in questions.items():
        if len(known.get(name, [])) != len(trials):
            begin = time.perf_counter()
            known[name] = [result.success == (True,) for result in _measure(player, params, trials)]
            took = time.perf_counter() - begin
            log.info("before, %s: %d of %d succeed (%d s)", name, sum(known[name]), len(trials), took)
            atomic.write_text(path, json.dumps(known) + "\n")
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


def _learner(
    config: ReinforceConfig, model: Any, params: Any, reward: RewardModel | None = None
) -> learning.Reinforcement:
    settings = learning.Settings(
        config.behaviour,
        config.update,
        config.tables,
        config.decisions,
        tuple(zip(("static", "wrist"), config.image_size, strict=True)),
        min(config.horizon, model.config.chunk),
        config.max_steps,
    )
    updates = config.iterations * config.update.epochs * config.update.minibatches
    (stage,) = stages.plan(TrainConfig(steps=updates, trainable=config.trainable), config.optimizer)
    mesh = meshes.make_mesh((1, 1, 1), jax.local_devices()[:1])
    return learning.Reinforcement(model, params, settings, stage, mesh, config.seed, reward)


def worlds(config: ReinforceConfig, pool: playing.World, begin: int) -> Iterator[playing.World]:
    """The trials of each iteration, from number `begin` on; a function of the seed and that number."""
    for number in itertools.count(begin):
        rng = np.random.default_rng([config.seed, 1, number])
        if config.update.method == "ppo":
            rows = rng.permutation(np.arange(max(pool.trials, 2 * config.tables)) % pool.trials)
            yield pool.take(rows, np.zeros(len(rows), np.int32))
        else:
            count = config.tables // config.group
            rows = rng.permutation(np.arange(max(pool.trials, count)) % pool.trials)[:count]
            yield pool.take(np.repeat(rows, config.group), np.repeat(np.arange(count), config.group))


def _learn(
    config: ReinforceConfig,
    output: pathlib.Path,
    learner: learning.Reinforcement,
    encode: playing.EncodeText,
    serving: Mapping[str, Any],
) -> bool:
    """All iterations that are left; False: stopped by a signal, saved."""
    trials = starts.draw(config.tasks, config.scenes, config.pool, config.seed, spread=config.start_spread)
    pool = playing.make_world(trials, encode, config.image_size[0])
    checkpointer = checkpoints.Checkpointer(output / LEARNING, keep=2, serving=serving)
    done = {"iteration": 0, "env_steps": 0, "seconds": 0.0}
    if config.resume and checkpointer.latest is not None:
        learner.state, position = checkpointer.restore(learner.state)
        done = {name: position[name] for name in done}
    else:
        provenance.write_record(output, "reinforce", schema.to_dict(config))
    writer = metrics.JsonLines(output / "metrics.jsonl", done["iteration"])
    clock = _Clock(done)

    def step(position: _Position, world: playing.World) -> tuple[_Position, dict[str, float]]:
        _, numbers = learner.iterate(world, position.step)
        numbers |= clock.count(position.step + 1, numbers["env_steps"])
        writer.write(position.step + 1, numbers)
        return _Position(position.step + 1), numbers

    schedule = loop.Schedule(config.iterations, config.iterations, 1, config.checkpoint_every)
    saving = _Saving(checkpointer, learner, clock)
    with contextlib.closing(checkpointer):
        _, finished = loop.fit(
            _Position(done["iteration"]),
            worlds(config, pool, done["iteration"]),
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
        names = ("success", "reward", "trials", "env_steps", "seconds", "ratio", "moved", "from_reference", "explained")
        said = ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
        log.info("iteration %d of %d: %s", step.number, self._iterations, said)


class _Saving(loop.Hook):
    """Points to go on from."""

    def __init__(self, checkpointer: checkpoints.Checkpointer, learner: learning.Reinforcement, clock: _Clock):
        self._checkpointer, self._learner, self._clock = checkpointer, learner, clock

    def after(self, step: loop.Step, metrics: Mapping[str, Any]) -> None:
        if step.save or step.stop:
            self._checkpointer.save(self._learner.state, self._clock.done)

    def finish(self, step: int, stopped: bool) -> None:
        self._checkpointer.wait()
