"""How long until a robot answers what has just changed.   python -m benchmarks.reaction

The mobile robot's design documents compare two schemes (2 to 5 s against below 100 ms) without a protocol. Here, with
the same architecture and the times that this machine needs:

- window and chunk: at every inference a window of `window` frames is encoded anew, and the whole chunk is executed
  before the next one; whatever happens meanwhile waits for the chunk's end, and then for the inference.
- event-triggered: history is kept between steps, so an inference encodes one frame; an event (a new instruction,
  another picture) asks the policy at the next tick.

Reaction is the time from an event, equally likely at any time, to the first command that was computed from a picture
taken after it. Both schemes' inference times are measured in turn, so that load meets both. Prints JSON.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import machine, policy_step, workload
from robovlms_jax import cli
from robovlms_jax.control.interface import Observation
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.parallel.config import MeshConfig
from robovlms_jax.policies import objective, serving
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build
from robovlms_jax.types import Inputs


@dataclasses.dataclass(frozen=True)
class Args:
    """Time both schemes' inference and say what reaction follows."""

    size: workload.Size = "small"
    """small: seconds on a laptop. full: published KOSMOS-2, bfloat16; 6.8 GB of parameters."""
    window: int = 16
    """Frames that the window scheme encodes each time (the documents')."""
    chunk: int = 10
    """Actions of a chunk."""
    periods_s: tuple[float, ...] = (0.02, 0.1, 0.4)
    """Time between two actions: the user's repository has both 20 ms and 0.4 s; the driving simulator has 0.1 s."""
    steps: int = 60
    """Inferences timed of each scheme."""
    events: int = 100_000
    """Events of which the reaction is reckoned."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        for field in ("window", "chunk", "steps", "events"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        if not self.periods_s or min(self.periods_s) <= 0:
            raise ValueError(f"periods_s={self.periods_s} must be times above 0.")


def main(args: Args) -> None:
    config = workload.experiment(args.size, window=args.window, batch_size=1, mesh=MeshConfig(data=1))
    policy = dataclasses.replace(config.policy, chunk=args.chunk)
    model = workload.make_model(args.size, dataclasses.replace(config, policy=policy))
    params = build.init_params(model, meshes.make_mesh((1, 1, 1), jax.local_devices()[:1]), seed=0)
    seconds = time_inference(model, params, args.steps)
    rng = np.random.default_rng(0)
    reactions = {
        f"{period:g}": {
            "window and chunk": _summary(window_and_chunk(seconds["window"], args.chunk, period, args.events, rng)),
            "event-triggered": _summary(event_triggered(seconds["event"], period, args.events, rng)),
        }
        for period in args.periods_s
    }
    machine.report(
        {
            "inference_s": {name: _summary(x) for name, x in seconds.items()},
            "reaction_s_by_period_s": reactions,
            "parameters": build.count(params),
            "settings": {name: value for name, value in dataclasses.asdict(args).items() if name != "out"},
        },
        args.out,
    )


def time_inference(model: VLA, params: Any, steps: int) -> dict[str, np.ndarray]:
    """float[steps] seconds of an inference of each scheme: "window", "event". NumPy pictures in, NumPy actions out."""
    streaming = serving.BatchedVLAPolicy(model, params, policy_step.encode_text, 1)
    streaming.reset([0], ["push the block"])
    observations = policy_step.make_observations(model)
    encode = window_step(model)
    window, seconds = model.config.window, {"window": [], "event": []}
    for index in range(steps + 2):  # the first two compile, or touch memory for the first time
        seen = [observations[(index + i) % len(observations)] for i in range(window)]
        begin = time.perf_counter()
        np.asarray(encode(params, *_stacked(seen)))
        middle = time.perf_counter()
        streaming.act([seen[-1]], [0])
        seconds["window"].append(middle - begin)
        seconds["event"].append(time.perf_counter() - middle)
    return {name: np.array(x[2:]) for name, x in seconds.items()}


def window_step(model: VLA) -> Any:
    """(params, images, ids, mask) -> the newest step's chunk, all frames of the window encoded; compiled."""

    def predict(params: Any, images: dict[str, jax.Array], ids: jax.Array, mask: jax.Array) -> jax.Array:
        inputs = Inputs(images, ids, mask, np.ones((1, model.config.window), bool))
        inputs = objective.prepare(inputs, model.vlm.image, model.config.cameras)
        prediction = model.apply({"params": params}, inputs)
        return jax.tree.leaves(prediction)[0][:, -1]

    return jax.jit(predict)


def _stacked(seen: list[Observation]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    images = {camera: np.stack([x.images[camera] for x in seen])[None] for camera in seen[0].images}
    ids, mask = policy_step.encode_text("")
    return images, ids[None], mask[None]


def window_and_chunk(
    inference_s: np.ndarray, chunk: int, period_s: float, events: int, rng: np.random.Generator
) -> np.ndarray:
    """float[events] seconds. A cycle is an inference, during which the robot waits, and then `chunk` ticks. What
    happens during the inference has missed its pictures and waits for the one after."""
    thinking, after = rng.choice(inference_s, (2, events))
    at = rng.uniform(0, 1, events) * (thinking + chunk * period_s)
    return thinking + chunk * period_s - at + after


def event_triggered(inference_s: np.ndarray, period_s: float, events: int, rng: np.random.Generator) -> np.ndarray:
    """float[events] seconds. At the next tick the policy is asked, unless it is thinking already: at most one period,
    or the rest of an inference that is longer than one. The answer is sent as soon as it is there."""
    wait = rng.uniform(0, 1, events) * np.maximum(period_s, rng.choice(inference_s, events))
    return wait + rng.choice(inference_s, events)


def _summary(seconds: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(seconds, [0, 50, 99])
    return {"mean": float(seconds.mean()), "least": float(low), "median": float(median), "99 %": float(high)}


if __name__ == "__main__":
    main(cli.read(Args))
