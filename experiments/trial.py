"""Policies on a real robot, compared blind: a form in the terminal for the operator.

    python -m experiments.trial --checkpoints runs/a runs/b --robot my_robot:connect --out trials/monday \\
        --instructions "open the drawer" --reworded "pull the drawer out"

The operator arranges each scene, starts, and says whether it was solved; which checkpoint acted is not told before the
end. Five rollouts of every task in every setting (Li et al. 2024). Video and actions go to OUT/dataset, a
LeRobotDataset v3, answers to OUT/trials.jsonl, rollouts that did not count, with the reason, to OUT/voids.jsonl; the
same command goes on where it was stopped, by q, Ctrl-C or a power failure.

`--robot MODULE:FUNCTION` names a function without arguments that returns a `Robot`; `playtable` is the simulated one.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from robovlms_jax import atomic, bars, cli, ending, json_files, json_lines
from robovlms_jax.control.execution import Executed, Execution
from robovlms_jax.control.interface import Observation, Policy
from robovlms_jax.control.robot import RobotSpec
from robovlms_jax.data.lerobot import writing
from robovlms_jax.evaluation import blind
from robovlms_jax.inputs import proprio
from robovlms_jax.load import load_config, load_policy
from robovlms_jax.playtable.env import PlayTable
from robovlms_jax.runs import logs
from robovlms_jax.training import checkpoints, seals

log = logging.getLogger(__name__)


class Robot(Protocol):
    """A robot as the form needs it. What moves it is checked by its own `deploy.safety.SafetyLayer`, in `step`."""

    def reset(self) -> None:
        """To where a rollout begins."""

    def observe(self) -> Observation: ...

    def step(self, action: np.ndarray) -> None:
        """Executes one action float[A] and returns when the next is due."""


@dataclasses.dataclass(frozen=True)
class TrialConfig:
    """What is compared, and how often."""

    checkpoints: tuple[str, ...]
    """Run directories, checkpoints/<step> folders, or hf://OWNER/NAME."""
    out: str
    """Folder of the session."""
    instructions: tuple[str, ...]
    """One sentence per task."""
    reworded: tuple[str, ...] = ()
    """The same tasks in words that training did not have, for the setting `instruction`."""
    robot: str = "playtable"
    """MODULE:FUNCTION, or playtable."""
    settings: tuple[str, ...] = tuple(blind.SETTINGS)
    """seen, unseen_object, background, distractors, instruction."""
    rollouts: int = 5
    """Of each task in each setting, by each checkpoint."""
    max_steps: int = 360
    """Control steps of a rollout; Ctrl-C ends one early."""
    execution: Execution = Execution()
    seed: int = 0
    """Of the order in which checkpoints act."""

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ValueError("checkpoints is empty; name the checkpoints to compare, one at least.")
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: a rollout needs 1 control step at least.")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A line of trials.jsonl.

    rollout: its number in the session. episode: of the recording. steps: how many were executed.
    """

    rollout: int
    episode: int
    success: bool
    steps: int
    setting: str
    instruction: str
    remark: str

    def __post_init__(self) -> None:
        """Raises TypeError for a value of another type: a text "no" would count as a success."""
        kinds = {"int": int, "bool": bool, "str": str}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not kinds[str(field.type)]:
                raise TypeError(f"{field.name} is {value!r}, not of type {field.type}")


class Stop(Exception):
    """The operator wants to go on another time."""


def open_robot(name: str) -> Robot:
    """Raises ValueError that says what was expected."""
    if name == "playtable":
        return PlayTable()
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"robot={name!r}: expected MODULE:FUNCTION, or playtable.")
    try:
        make = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module runs whatever it likes while it is imported
        raise ValueError(f"robot={name!r} cannot be imported: {type(error).__name__}: {error}.") from error
    try:
        robot = make()
    except Exception as error:
        raise ValueError(
            f"robot={name!r}: expected a function without arguments that returns a robot; called, it raised "
            f"{type(error).__name__}: {error}."
        ) from error
    missing = [method for method in ("reset", "observe", "step") if not callable(getattr(robot, method, None))]
    if missing:
        raise ValueError(f"robot={name!r} returned {type(robot).__name__}, which has no {', '.join(missing)}().")
    return robot


class Session:
    """A session on disk and its form.

    robot, policies, spec: who acts, and what their numbers are. ask, say: the terminal.
    """

    def __init__(
        self,
        config: TrialConfig,
        robot: Robot,
        policies: Sequence[Policy],
        spec: RobotSpec,
        *,
        labels: Sequence[str] = (),
        ask: Callable[[str], str] = input,
        say: Callable[[str], None] = print,
    ):
        self._config, self._robot, self._spec, self._ask, self._say = config, robot, spec, ask, say
        self._policies = [Executed(policy, config.execution) for policy in policies]
        self._compiled = False
        self._labels = list(labels) or list(config.checkpoints)
        self.rollouts = blind.schedule(
            config.instructions, config.reworded, config.settings, config.rollouts, len(policies), config.seed
        )
        self._root = pathlib.Path(config.out)
        self._root.mkdir(parents=True, exist_ok=True)
        self._require_same_plan()
        self._dataset = writing.Writer(self._root / "dataset", spec)
        self.answers: list[Answer] = []
        json_lines.read(
            self._root / "trials.jsonl",
            self._take,
            expected="an operator's answer",
            remedy="Remove the line; its rollout is asked for again, and what was recorded of it stays.",
        )
        spare = self._dataset.episodes - len(self.answers)
        if spare:
            log.warning("%s holds %d recorded rollouts without an answer; they stay.", self._root / "dataset", spare)

    def _take(self, number: int, line: dict[str, Any]) -> None:
        """A line of trials.jsonl becomes an answer. Raises ValueError, TypeError for one that cannot be."""
        answer = Answer(**line)
        if not 0 <= answer.rollout < len(self.rollouts):
            raise ValueError(f"rollout {answer.rollout} is none of this session's 0 to {len(self.rollouts) - 1}")
        if not 0 <= answer.episode < self._dataset.episodes:
            raise ValueError(f"episode {answer.episode} is none of the {self._dataset.episodes} that dataset/ holds")
        for name in ("rollout", "episode"):
            if getattr(answer, name) in {getattr(known, name) for known in self.answers}:
                raise ValueError(f"an earlier line has {name} {getattr(answer, name)}, too")
        self.answers.append(answer)

    def _require_same_plan(self) -> None:
        """The session that the folder holds is this one. Raises ValueError naming what differs."""
        path, plan = self._root / "session.json", dataclasses.asdict(self._config) | {"policies": self._labels}
        plan = {name: list(value) if isinstance(value, tuple) else value for name, value in plan.items()}
        plan.pop("out")
        if not path.exists():
            atomic.write_json(path, plan)
            return
        known = json_files.read(path)
        if isinstance(known.get("execution"), dict):  # sessions begun before there was `retry` tried nothing again
            known["execution"] = {"retry": dataclasses.asdict(Execution().retry), **known["execution"]}
        wrong = [
            f"{name}: {known.get(name)!r} there, {plan[name]!r} now" for name in plan if known.get(name) != plan[name]
        ]
        if wrong:
            raise ValueError(f"{path} is another session's ({'; '.join(wrong)}); name another --out.")

    @property
    def left(self) -> list[blind.Rollout]:
        """Rollouts without an answer, in order."""
        done = {answer.rollout for answer in self.answers}
        return [rollout for rollout in self.rollouts if rollout.number not in done]

    def run(self) -> bool:
        """Asks until all is done, or the operator stops; whether all is done."""
        previous = None
        try:
            for rollout in self.left:
                again = rollout.scene == previous
                previous = rollout.scene
                while not self._one(rollout, again):
                    self._say("It does not count; the same once more.")
        except (Stop, EOFError, KeyboardInterrupt):
            self._say(f"{len(self.left)} of {len(self.rollouts)} rollouts are left; the same command goes on.")
        return not self.left

    def _one(self, rollout: blind.Rollout, again: bool) -> bool:
        """One rollout; False where it does not count."""
        scene = "the same scene as before" if again else blind.SETTINGS[rollout.setting]
        self._say(
            f"\nRollout {rollout.number + 1} of {len(self.rollouts)}, setting {rollout.setting}: {scene}\n"
            f"Instruction: {rollout.instruction}"
        )
        self._choose("Arrange it. g: go, q: stop for today", "g")
        steps = self._act(rollout)
        if not steps:
            return False
        answer = self._choose("Solved? y: yes, n: no, v: void (a fault of the robot or the scene), q: stop", "ynv")
        if answer == "v":
            return self._void(rollout, "by the operator")
        remark = self._ask("Remark (Enter: none): ").strip()
        success = answer == "y"
        try:
            episode = self._dataset.add(steps, rollout.instruction, success)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"It cannot be recorded: {type(error).__name__}: {error}"
            return self._void(rollout, reason, traceback.format_exc())
        found = Answer(rollout.number, episode, success, len(steps), rollout.setting, rollout.instruction, remark)
        json_lines.append(self._root / "trials.jsonl", dataclasses.asdict(found))
        self.answers.append(found)
        return True

    def _void(self, rollout: blind.Rollout, reason: str, details: str = "") -> bool:
        """False: the rollout does not count. Why is said, and kept in voids.jsonl."""
        self._say(reason)
        line = {"rollout": rollout.number, "reason": reason, "traceback": details}
        json_lines.append(self._root / "voids.jsonl", line)
        return False

    def _act(self, rollout: blind.Rollout) -> list[writing.Step]:
        """What was seen and done, up to the last step or Ctrl-C; nothing where robot or policy failed."""
        policy, steps, limit = self._policies[rollout.policy], [], self._config.max_steps
        try:
            self._robot.reset()
            self._compile(rollout.instruction)
            policy.reset(rollout.instruction)
            chunk: list[np.ndarray] = []
            while len(steps) < limit:
                seen = self._robot.observe()
                chunk = chunk or list(policy.act(seen).actions)
                # copies, made before the step: drivers reuse their buffers, and some scale an action in place
                images = {camera: np.array(image) for camera, image in seen.images.items()}
                state, action = np.array(self._state(seen)), np.array(chunk.pop(0), np.float32)
                self._robot.step(action.copy())
                steps.append(writing.Step(images, state, action))
        except KeyboardInterrupt:
            self._say("ended by Ctrl-C")
        except Exception as error:  # whatever a robot's driver raises
            self._void(rollout, f"The rollout broke off: {type(error).__name__}: {error}", traceback.format_exc())
            return []
        return steps

    def _compile(self, instruction: str) -> None:
        """Every policy acts once before the first rollout, and nothing of it is executed: a policy that compiles in the
        middle of the session would leave the robot waiting, and tell the operator that another one acts."""
        if not self._compiled:
            seen = self._robot.observe()
            with bars.waiting("compiling the policies, which takes up to minutes; the robot stands still"):
                for policy in self._policies:
                    policy.reset(instruction)
                    policy.act(seen)
            self._compiled = True

    def _state(self, seen: Observation) -> np.ndarray:
        """float32[P], what is recorded of the robot's state. Raises ValueError where there is none."""
        if seen.proprio is None:
            raise ValueError("the robot's observe() gives no proprio; a recording needs the robot's state.")
        return proprio.from_robot_state(np.asarray(seen.proprio, np.float32), len(self._spec.state))

    def _choose(self, question: str, letters: str) -> str:
        """One of the letters; whatever else is typed is asked again. Raises Stop for q."""
        while True:
            answer = self._ask(f"{question}: ").strip().lower()
            if answer == "q":
                raise Stop
            if len(answer) == 1 and answer in letters:
                return answer
            self._say(f"{answer[:20]!r} is none of {', '.join([*letters, 'q'])}.")

    def report(self) -> str:
        """Markdown. Who is who is told only once every rollout has an answer."""
        names = self._labels if not self.left else [f"policy {index + 1}" for index in range(len(self._labels))]
        success = {answer.rollout: answer.success for answer in self.answers}
        if self.left:
            return f"{len(self.left)} of {len(self.rollouts)} rollouts are left; the report comes when all are done.\n"
        found = blind.rates(self.rollouts, success)
        lines = ["| setting | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        for setting in (*self._config.settings, "all"):
            cells = []
            for policy in range(len(names)):
                rate = found[setting, policy]
                low, high = rate.interval
                cells.append(f"{rate.successes} of {rate.attempts} ({100 * low:.0f}-{100 * high:.0f} %)")
            lines.append(f"| {setting} | " + " | ".join(cells) + " |")
        lines += ["", "95 % Wilson intervals. Paired, on the same scenes (exact McNemar test):", ""]
        for second in range(1, len(names)):
            pair = blind.compare(self.rollouts, success, 0, second)
            lines.append(
                f"- {names[0]} and {names[second]}: both solved {pair.both}, only the first {pair.first}, only the "
                f"second {pair.second}, neither {pair.neither}; p = {pair.p:.3f}"
            )
        return "\n".join(lines) + "\n"


def main() -> None:
    """Errors of the user end the process with a message and status 1."""
    logs.to_stderr(level=logging.WARNING)
    config = cli.read(TrialConfig, description=__doc__)
    try:
        specs = [load_config(path).policy.robot for path in config.checkpoints]
        if any(spec != specs[0] for spec in specs):
            raise ValueError("the checkpoints drive different robots; compare those of one.")
        config.execution.require(specs[0])
        labels = [f"{path}, {seals.identity(checkpoints.locate(path)).label}" for path in config.checkpoints]
        with bars.waiting("reading the checkpoints"):
            policies = [load_policy(path) for path in config.checkpoints]
        session = Session(config, open_robot(config.robot), policies, specs[0], labels=labels)
        if session.run():
            atomic.write_text(pathlib.Path(config.out) / "report.md", session.report())
        ending.show(session.report())
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
