"""The closed loop of a navigation run: the expert's drives recorded before it, the policy's own after it, in a report.

Every scenario is driven in rooms that no recording has, asked in words of training and in held-out ones, bare and
through the deployment's safety layer; collisions are counted beside successes, each with its interval.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import time
from collections.abc import Sequence

from robovlms_jax.control.execution import BatchedPolicy, Execution
from robovlms_jax.driving import env, instructions, recording, scenarios
from robovlms_jax.driving.config import DrivesConfig, RecordingConfig
from robovlms_jax.evaluation import chains, filing, rollout
from robovlms_jax.evaluation.report import films as film_files
from robovlms_jax.evaluation.report import tables
from robovlms_jax.evaluation.rollout_metrics import Rate

logger = logging.getLogger(__name__)

_FIRST_SEED = 2 * 10**7
"""Of the rooms that policies are driven in."""
_LAYERS = {"bare": None, "safety layer, stops": "stop", "safety layer, slows down": "slow"}


def ensure_recorded(config: RecordingConfig, root: str) -> None:
    """Record to `root` unless it is there. Raises as `recording.record`."""
    begin = time.perf_counter()
    counts = recording.record(config, root) | {"seconds": time.perf_counter() - begin, "root": root}
    logger.info("%(root)s: %(recorded)d of %(attempted)d drives end well, %(frames)d frames, %(seconds)d s", counts)


def trials(config: DrivesConfig, *, held_out: bool) -> list[rollout.Trial]:
    """Scenarios taking turns; the left and the right one of a kind are driven in the same rooms."""
    names = list(scenarios.SCENARIOS)
    made = []
    for index in range(config.trials):
        name, seed = names[index % len(names)], _FIRST_SEED + index // len(names)
        sentence = instructions.ask(name, seed, held_out=held_out)
        labels = {"scene": "room", "phrasing": "held out" if held_out else "training"}
        start = {"scenario": name, "seed": seed}
        made.append(rollout.Trial(index, start, (name,), (sentence,), labels))
    return made


@dataclasses.dataclass(frozen=True)
class Drives:
    """One table: how it was driven, in whose words, and what came of it."""

    layer: str
    phrasing: str
    results: tuple[rollout.TrialResult, ...]

    def rates(self, scenario: str | None = None) -> tuple[Rate, Rate]:
        """(success, no collision) of one scenario, or of all."""
        chosen = [r for r in self.results if scenario in (None, r.tasks[0])]
        free = sum(not result.partial["collided"] for result in chosen)
        return Rate(sum(result.success[0] for result in chosen), len(chosen)), Rate(free, len(chosen))


def evaluate(policy: BatchedPolicy, config: DrivesConfig, output: pathlib.Path, checkpoint: str) -> list[Drives]:
    """Drive `policy`, which has `config.rooms` slots, in all ways; what `output` has results of is not driven again.

    Args:
      checkpoint: what names the policy's parameters.
    """
    found = []
    for layer in _LAYERS:
        for held_out in (False, True):
            found.append(drive(policy, config, output, checkpoint, layer=layer, held_out=held_out))
            success, free = found[-1].rates()
            logger.info(
                "%s, %s words: %s succeed, %s without collision",
                layer,
                found[-1].phrasing,
                *map(_rate, (success, free)),
            )
    return found


def drive(
    policy: BatchedPolicy,
    config: DrivesConfig,
    output: pathlib.Path,
    checkpoint: str,
    *,
    layer: str = "bare",
    held_out: bool = False,
) -> Drives:
    """One way of `evaluate`: through which safety layer (`bare`: none), and in whose words."""
    settings = chains.Settings(
        checkpoint,
        Execution("receding", horizon=config.horizon),
        rollout.SuccessCriterion(config.max_steps, env.completed_in_each),
        {"checkpoint": checkpoint, "protocol": {"trials": config.trials}},
    )
    rooms = env.Drives(min(config.rooms, config.trials), safety=_LAYERS[layer])
    asked = trials(config, held_out=held_out)
    folder = filing.place(output, f"{rooms.name}-{asked[0].labels['phrasing'].replace(' ', '_')}", _key(settings))
    results = chains.evaluate(policy, rooms, asked, folder, settings).results
    return Drives(layer, str(asked[0].labels["phrasing"]), results)


def _key(settings: chains.Settings) -> dict[str, object]:
    return {**settings.conditions, "execution": settings.execution.label, "max_steps": settings.criterion.max_steps}


def film(policy: BatchedPolicy, config: DrivesConfig, output: pathlib.Path) -> list[pathlib.Path]:
    """Drives of the first trials, one of each scenario, as films: camera, map, and what the policy is shown. Returns
    the files."""
    count = min(config.films, config.trials)
    if not count:
        return []
    recordings: list[rollout.Recording] = []
    rooms = env.Drives(min(count, config.rooms), views=("view", "map"))
    executed = chains.ExecutedBatch(policy, Execution("receding", horizon=config.horizon))
    criterion = rollout.SuccessCriterion(config.max_steps, env.completed_in_each)
    asked = trials(config, held_out=True)[:count]
    wanted = rollout.Films(range(count), recordings.append, every=2)
    list(rollout.run(executed, rooms, asked, criterion, films=wanted))
    recordings.sort(key=lambda recording: recording.trial.index)
    files = [film_files.write_film(x, output / f"{x.trial.index}_{x.trial.tasks[0]}") for x in recordings]
    film_files.draw_strips(recordings).save(output / "strips.png")
    return [*files, output / "strips.png"]


def section(found: Sequence[Drives], films: Sequence[pathlib.Path], run: pathlib.Path) -> str:
    """Markdown for the run's report; paths relative to `run`."""
    parts = ["## Drives", _overview(found)]
    for drives in found:
        parts += [f"### {drives.layer}, {drives.phrasing} words", _by_scenario(drives)]
    parts.append(
        "Success: at the cup, slow, past every box on the side that was named (by winding), without a collision. In "
        "brackets: 95 % confidence intervals (Wilson). Numbers of this simulator say nothing about a real robot."
    )
    for path in films:
        relative = path.relative_to(run)
        parts.append(
            f"![drives, one per row]({relative.as_posix()})" if path.stem == "strips" else film_files.link(relative)
        )
    return "\n\n".join(parts) + "\n"


def _overview(found: Sequence[Drives]) -> str:
    head = [
        "driven",
        "words",
        "drives",
        "success",
        "weighted by difficulty",
        "without collision",
        "stopped by the layer",
    ]
    body = []
    for drives in found:
        success, free = drives.rates()
        weights = {name: scenario.weight for name, scenario in scenarios.SCENARIOS.items()}
        rates = {name: drives.rates(name)[0] for name in weights if drives.rates(name)[0].attempts}
        weighted = sum(weights[n] * rate.value for n, rate in rates.items()) / sum(weights[n] for n in rates)
        stopped = sum(result.partial.get("stopped by safety", 0.0) for result in drives.results)
        row = [drives.layer, drives.phrasing, str(success.attempts), _rate(success), f"{100 * weighted:.1f} %"]
        body.append([*row, _rate(free), f"{stopped:.0f}" if drives.layer != "bare" else ""])
    return tables.markdown(head, body, text_columns=2)


def _by_scenario(drives: Drives) -> str:
    head = ["scenario", "drives", "success", "without collision", "at the cup", "least gap (m)", "seconds per success"]
    body = []
    for name in scenarios.SCENARIOS:
        chosen = [result for result in drives.results if result.tasks[0] == name]
        if not chosen:
            continue
        success, free = drives.rates(name)
        arrived = Rate(int(sum(result.partial["arrived"] for result in chosen)), len(chosen))
        gap = min(result.partial["clearance_m"] for result in chosen)
        seconds = [result.steps[0] / env.world.ROBOT.rate_hz for result in chosen if result.success[0]]
        mean = f"{sum(seconds) / len(seconds):.1f}" if seconds else ""
        body.append([name, str(len(chosen)), _rate(success), _rate(free), _rate(arrived), f"{gap:.3f}", mean])
    return tables.markdown(head, body, text_columns=1)


def _rate(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
