"""Our training step, forward pass and control step beside PyTorch's, on a CPU.   python -m benchmarks.against_torch

One small policy (a 6-layer vision tower of width 384, a 6-layer decoder of width 512, KOSMOS-2's layers, LSTM head;
one camera, W = 8, float32) with the same parameters in two processes: ours, and eager PyTorch (`torch_policy`). They
take turns, section by section; only one computes at a time. Their first predictions are compared: what differs by more
than rounding is not timed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, workload
from robovlms_jax import cli
from robovlms_jax.backbones import kosmos2, registry
from robovlms_jax.control.interface import Observation
from robovlms_jax.nn import stack
from robovlms_jax.parallel import cpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import objective, serving
from robovlms_jax.policies.config import PolicyConfig
from robovlms_jax.policies.heads.lstm import LSTMHeadConfig
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import build
from robovlms_jax.training import optimizer, state, step
from robovlms_jax.training.config import OptimizerConfig
from robovlms_jax.types import Batch, Inputs

SECTIONS = ("training", "forward", "control")
"""One update on one window, one pass of its frames, one control step with a new frame."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare with PyTorch on this processor."""

    rounds: int = 12
    """Turns of each section."""
    steps: tuple[int, int, int] = (1, 2, 8)
    """Steps of a turn, of each section. Turns are short, so that a change of load meets both sides."""
    threads: int = 2
    """Processors for each side."""
    side: Literal["", "ours", "torch"] = ""
    """For the processes that this program starts."""
    out: pathlib.Path | None = None
    """Also write the JSON to this file."""

    def __post_init__(self):
        if min(self.rounds, self.threads, *self.steps) < 1:
            raise ValueError("rounds, threads and steps must be positive.")


def make_model(*, layers: int = 6, width: int = 512, image: int = 224, window: int = 8) -> VLA:
    """The policy; 43 million parameters unless asked otherwise. Dropout is off, so that both sides learn the same."""
    published = registry.get("kosmos-2")
    tower = {"patch_size": 16, "width": width * 3 // 4, "mlp_dim": width * 3, "num_heads": 6, "depth": layers}
    text = {"width": width, "mlp_dim": width * 4, "num_heads": 8, "depth": layers, "vocab_size": 4096}
    vlm = dataclasses.replace(
        published,
        vision=dataclasses.replace(published.vision, image_size=image, **tower),
        text=dataclasses.replace(published.text, dropout=0.0, attention_dropout=0.0, **text),
        connector=kosmos2.LatentConnectorConfig(num_latents=64),
        image=dataclasses.replace(published.image, size=image),
    )
    head = LSTMHeadConfig(hidden_size=width)
    return VLA(PolicyConfig(window=window, cameras=("static",), head=head), vlm)


def make_batch(model: VLA) -> Batch:
    """One window of noise in which every action counts; pictures have the model's size, so that none is resized."""
    rng, size = np.random.default_rng(0), model.vlm.image.size
    window, chunk = model.config.window, model.config.chunk
    actions = rng.uniform(-0.6, 0.6, (1, window + chunk - 1, 7)).astype(np.float32)
    actions[..., 6] = np.sign(actions[..., 6])
    return Batch(
        inputs=Inputs(
            images={"static": rng.integers(0, 256, (1, window, size, size, 3), np.uint8)},
            text_ids=rng.integers(4, 500, (1, workload.TEXT_LENGTH), np.int32),
            text_mask=np.ones((1, workload.TEXT_LENGTH), bool),
            step_mask=np.ones((1, window), bool),
        ),
        actions=actions,
        action_mask=np.ones(actions.shape[:2], bool),
        window_mask=np.ones((1, 1), bool),
        episode=np.zeros(1, np.int32),
        corrupt=np.full(1, -1, np.int32),
    )


def make_params(model: VLA) -> Any:
    """The parameters that both sides begin with; action queries begin at 0, which would hide where they stand."""
    params = build.init_params(model, meshes.make_mesh((1, 1, 1), jax.devices()[:1]), seed=0)
    rng = np.random.default_rng(1)
    noise = [
        jax.device_put(rng.normal(0, 0.05, x.shape).astype(np.float32), x.sharding)
        for x in jax.tree.leaves(params["readout"])
    ]
    return {**params, "readout": jax.tree.unflatten(jax.tree.structure(params["readout"]), noise)}


Section = Callable[[], Any]
"""One step; what it gives has been computed when it returns. training: the loss. forward: what the head reads of every
frame and the arm's actions, one behind the other. control: the gripper's and the arm's chunk."""


def ours(model: VLA, batch: Batch) -> dict[str, Section]:
    """As programs of this repository run them: `make_train_step`, a compiled forward pass, `VLAPolicy`."""
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    tx, schedule = optimizer.make_optimizer(OPTIMIZER, 1000), optimizer.learning_rate(OPTIMIZER, 1000)
    current = [state.create(make_params(model), (".*",), tx, 0, mesh)]
    train_step = step.make_train_step(objective.robot(model), tx, schedule, current[0], mesh)
    placed, params = meshes.put_batch({objective.ROBOT: batch}, mesh), make_params(model)

    def training() -> float:
        current[0], metrics = train_step(current[0], placed)
        return float(metrics["loss"])

    def predict(params: Any, inputs: Inputs) -> jax.Array:
        inputs = objective.prepare(inputs, model.vlm.image, model.config.cameras)
        outputs = model.apply({"params": params}, inputs, method="train_outputs")
        return jnp.concatenate([outputs.features.ravel(), outputs.prediction.arm.ravel()])

    passed = jax.jit(predict)
    ids, mask = batch.inputs.text_ids[0], batch.inputs.text_mask[0]
    policy = serving.VLAPolicy(model, stack.parted(params), lambda text: (ids, mask))
    policy.reset("push the block")
    frames = _frames(batch)
    return {
        "training": training,
        "forward": lambda: np.asarray(passed(params, batch.inputs)),
        "control": lambda: policy.act(Observation({"static": next(frames)})).actions,
    }


def torchs(model: VLA, batch: Batch, threads: int) -> dict[str, Section]:
    """The same in PyTorch: fused AdamW, gradients clipped as ours are; in control the window of features is kept."""
    import torch

    from benchmarks import torch_policy

    torch.set_num_threads(threads)
    policy, served = torch_policy.Policy(model), torch_policy.Policy(model)
    for one in (policy, served):
        torch_policy.load(one, make_params(model))
    settings = {"lr": OPTIMIZER.learning_rate, "weight_decay": OPTIMIZER.weight_decay, "eps": OPTIMIZER.epsilon}
    betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
    tx = torch.optim.AdamW(policy.parameters(), betas=betas, fused=True, **settings)
    images = torch.from_numpy(batch.inputs.images["static"][0])
    ids = torch.from_numpy(batch.inputs.text_ids[0]).long()
    actions = torch.from_numpy(model.config.normalizer.normalize(batch.actions[0]))
    kept: list[torch.Tensor] = []

    def training() -> float:
        loss = policy.loss(images, ids, actions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.clip_norm)
        tx.step()
        tx.zero_grad()
        return loss.item()

    @torch.inference_mode()
    def forward() -> np.ndarray:
        features = served.features(images, ids)
        return torch.cat([features.ravel(), served.act(features[None])[0].ravel()]).numpy()

    @torch.inference_mode()
    def control() -> np.ndarray:
        kept.append(served.features(torch.from_numpy(next(frames))[None], ids))
        del kept[: -policy.window]
        arm, gripper = served.act(torch.stack(kept, dim=1))
        open_ = torch.where(gripper[0, -1] > 0, 1.0, -1.0)
        return model.config.normalizer.unnormalize(torch.cat([arm[0, -1], open_], dim=-1).numpy())

    frames = _frames(batch)
    return {"training": training, "forward": forward, "control": control}


def _frames(batch: Batch) -> Iterator[np.ndarray]:
    """The window's pictures, again and again."""
    while True:
        yield from batch.inputs.images["static"][0]


def serve(args: Args) -> None:
    """A side: for each line `SECTION STEPS` on standard input, a line of JSON with what each step took."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    cpu.keep_freed_memory()
    model = make_model()
    batch = make_batch(model)
    sections = ours(model, batch) if args.side == "ours" else torchs(model, batch, args.threads)
    predicted = {name: np.asarray(sections[name]()).tolist() for name in SECTIONS}  # compiles, allocates
    count = build.count(build.abstract_params(model, meshes.make_mesh((1, 1, 1), jax.devices()[:1]))[0])
    print(json.dumps(predicted | {"parameters": count}), flush=True)
    for line in sys.stdin:
        name, steps = line.split()
        seconds = []
        for _ in range(int(steps)):
            begin = time.perf_counter()
            sections[name]()
            seconds.append(time.perf_counter() - begin)
        print(json.dumps(seconds), flush=True)


class Side:
    """A process that `serve`s one side, CPUs alone."""

    def __init__(self, side: str, threads: int):
        command = [sys.executable, "-m", "benchmarks.against_torch", "--side", side, "--threads", str(threads)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.first = self._read()

    def time(self, section: str, steps: int) -> list[float]:
        """Seconds of each of some steps."""
        self._process.stdin.write(f"{section} {steps}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side's process ended with status {self._process.wait()}; its error stands above.")
        return json.loads(line)

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main(args: Args) -> None:
    """Print the result as JSON. Raises RuntimeError where the two do not compute the same."""
    if args.side:
        return serve(args)
    sides = {name: Side(name, args.threads) for name in ("ours", "torch")}
    first = {name: side.first for name, side in sides.items()}
    differ = {name: float(np.abs(np.subtract(first["ours"][name], first["torch"][name])).max()) for name in SECTIONS}
    if max(differ.values()) > TOLERANCE:
        raise RuntimeError(f"the two sides compute different things, by {differ}; at most {TOLERANCE} is rounding.")
    found = {name: {side: [] for side in sides} for name in SECTIONS}
    for turn in range(args.rounds):
        for (name, by_side), steps in zip(found.items(), args.steps):
            for side in sorted(sides, reverse=bool(turn % 2)):
                time.sleep(0.3)  # the other side's threads stop waiting for work
                by_side[side].append(sides[side].time(name, steps))
    for process in sides.values():
        process.end()
    machine.report(
        {
            "sections": {name: summarize(by_side) for name, by_side in found.items()},
            "largest_difference": differ,
            "parameters": first["ours"]["parameters"],
            "torch": importlib.metadata.version("torch"),
            "settings": {name: x for name, x in dataclasses.asdict(args).items() if name not in ("out", "side")},
        },
        args.out,
    )
    return None


def summarize(turns: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Seconds per step of both sides, and ours over PyTorch's: turn against turn (the median of those ratios), and the
    fastest against the fastest, which load from elsewhere hardly reaches."""
    medians = {side: [statistics.median(x) for x in rows] for side, rows in turns.items()}
    fastest = {side: min(map(min, rows)) for side, rows in turns.items()}
    return {
        "times_of_torch": statistics.median(a / b for a, b in zip(medians["ours"], medians["torch"], strict=True)),
        "times_of_torch_fastest": fastest["ours"] / fastest["torch"],
        "median_seconds": {side: statistics.median(x) for side, x in medians.items()},
        "fastest_seconds": fastest,
        "seconds_by_turn": medians,
    }


if __name__ == "__main__":
    main(cli.read(Args, description=__doc__))
