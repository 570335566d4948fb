"""The page that a shared policy comes with: what it is, whose robot it drives, what was measured, what it cannot do."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from robovlms_jax import hub
from robovlms_jax.control.robot import Dimension, RobotSpec
from robovlms_jax.evaluation.report import tables
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import checkpoints, seals


@dataclasses.dataclass(frozen=True)
class Words:
    """What only its maker knows. licence: an identifier as "apache-2.0", of the parameters; the backbone's own licence
    may forbid some. data, limits: further sentences of these sections."""

    licence: str
    data: str = ""
    limits: str = ""


def card(step: pathlib.Path, config: ExperimentConfig, repository: str, words: Words) -> str:
    """Markdown with the hub's header.

    Args:
      step: of the checkpoint; what its run stored of rollouts and comparisons is read, of this checkpoint alone.
      repository: OWNER/NAME.
    """
    run, policy = checkpoints.run_of(step), config.policy
    base = config.backbone.weights
    seen = "one frame" if policy.window == 1 else f"the newest {policy.window} frames"
    sections = [
        _header(config, words),
        f"# {repository.partition('/')[2]}",
        f"A robot policy: {config.backbone.name}, history {policy.history}, readout {policy.readout}, head "
        f"{policy.head.kind_of(type(policy.head))}; it sees {seen} at a time (W = {policy.window}) and predicts "
        f"{policy.chunk} actions (C = {policy.chunk}). Parameters of {seals.identity(step).label}"
        + (f", fine-tuned from {base}." if hub.is_name(base) else "."),
        "## Use",
        _use(repository, config),
        "## Robot",
        _robot(policy.robot, policy.cameras),
        "## Data",
        " ".join([_data(config), words.data]).strip(),
        "## What was measured",
        *_numbers(run, seals.identity(step).label),
        "## Limits",
        " ".join([_LIMITS, words.limits]).strip(),
        "## Licence",
        f"{words.licence} for these parameters. The backbone's weights and the data have licences of their own.",
    ]
    return tables.join(sections)


_LIMITS = (
    "It was trained for the robot, cameras and data above; another task, camera position, table or wording may make it "
    "fail without a sign. Numbers of a simulator say nothing about another simulator or a real robot. It checks "
    "nothing for safety: drive a robot through a layer that does, and keep an emergency stop at hand."
)


def _header(config: ExperimentConfig, words: Words) -> str:
    facts: dict[str, Any] = {
        "license": words.licence,
        "library_name": "robovlms_jax",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "vision-language-action", config.backbone.name],
    }
    if hub.is_name(config.backbone.weights):
        facts["base_model"] = hub.parse(config.backbone.weights)[0]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _use(repository: str, config: ExperimentConfig) -> str:
    policy = config.policy
    known = {camera.name: (camera.height, camera.width) for camera in policy.robot.cameras}
    lines = []
    for name in policy.cameras:
        height, width = (size or 224 for size in known.get(name, (0, 0)))
        lines.append(f'    "{name}": np.zeros(({height}, {width}, 3), np.uint8),')
    images = "\n".join(lines)
    needs_state = policy.proprio.enabled or policy.representation != "robot"
    state = f", np.zeros({len(policy.robot.state)}, np.float32)" if needs_state and policy.robot.state else ""
    return f"""```python
import numpy as np
from robovlms_jax.control.interface import Observation
from robovlms_jax.load import load_policy

policy = load_policy("hf://{repository}")
policy.reset("open the drawer")
images = {{  # of your cameras{", and the robot's state below" if state else ""}
{images}
}}
actions = policy.act(Observation(images{state})).actions  # one row per control step
```

`robovlms serve --checkpoint hf://{repository}` serves it to robots on other computers."""


def _robot(robot: RobotSpec, cameras: Sequence[str]) -> str:
    rate = f"{robot.rate_hz:g} control steps per second" if robot.rate_hz else "at a rate that is not known"
    rows = [[d.name, d.unit or "unknown", d.kind, d.quantity, d.frame, _bounds(d)] for d in robot.action]
    table = tables.markdown(["action", "unit", "kind", "of", "frame", "bounds"], rows, text_columns=6)
    return f"{robot.name}, {rate}, cameras {', '.join(cameras)}.\n\n{table}"


def _bounds(dimension: Dimension) -> str:
    known = [f"{x:g}" if math.isfinite(x) else "?" for x in (dimension.low, dimension.high)]
    return "" if known == ["?", "?"] else " to ".join(known)


def _data(config: ExperimentConfig) -> str:
    data, shown = config.data, config.demonstrations
    if shown.episodes:
        tasks = ", ".join(shown.tasks) if shown.tasks else "all tasks"
        return (
            f"{shown.episodes} chains of demonstrations by scripted experts in PlayTable, the embedded simulator, on "
            f"tables {', '.join(shown.scenes)} and {shown.random_scenes} random ones: {tasks}."
        )
    name = pathlib.PurePath(data.root).name  # of the folder alone: where it lies is nobody's business
    return (
        f"{data.dataset}{f', the recording {name}' if name else ''}: {config.train.steps} training steps of "
        f"{config.train.batch_size} windows each."
    )


def _numbers(run: pathlib.Path, label: str) -> Iterator[str]:
    """Paragraphs and tables; says so where nothing is stored."""
    found = [row for path in sorted(run.glob("rollouts/**/rollouts.json")) for row in _read(path).get("rows", ())]
    rows = [row for row in found if row["setup"].get("checkpoint") == label]
    if rows:
        head = ["environment", "scene", "execution", "trials", "success", "95 % interval"]
        yield "Closed loop, success of the first task of a trial; Wilson's intervals:"
        yield tables.markdown(head, [_rollouts(row) for row in rows], text_columns=3)
        for row in rows:
            yield f"Per task, {row['setup']['env']}, {row['setup']['execution']}:"
            tasks = row["summary"]["per_task"].items()
            yield tables.markdown(["task", "success", "95 % interval"], [[name, *_rate(rate)] for name, rate in tasks])
    else:
        yield "No rollout of this checkpoint is stored: how often it succeeds is not known."
    overall = _read(run / "report.json").get("overall")
    if overall:
        yield (
            f"Open loop, on {int(overall['count']):,} recorded actions of the validation split (predicted against "
            f"recorded, nothing executed): gripper {tables.percent(overall['gripper_accuracy'])} right, where always "
            f"answering the commoner state is {tables.percent(overall['gripper_majority'])}."
            if None not in (overall.get("gripper_accuracy"), overall.get("gripper_majority"))
            else f"Open loop, {int(overall['count']):,} recorded actions of the validation split were compared."
        )


def _rollouts(row: Mapping[str, Any]) -> list[str]:
    first = row["summary"]["in_a_row"][0]
    labels = row["labels"]
    return [
        row["setup"]["env"],
        str(labels.get("scene", "")),
        row["setup"]["execution"],
        str(row["summary"]["trials"]),
        *_rate(first),
    ]


def _rate(rate: Mapping[str, Any]) -> tuple[str, str]:
    low, high = rate["interval"]
    return f"{rate['successes']} of {rate['attempts']}", f"{100 * low:.0f} to {100 * high:.0f} %"


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
