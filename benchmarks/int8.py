"""What int8 changes in a trained PlayTable policy: bytes, actions on the same observations, time of a step.

    python -m benchmarks.int8 --checkpoint runs/playtable_fixtures

int8: weights alone; w8a8: what they multiply, too. All policies see every picture of trials that the first one plays;
JSON. `layers` says of every matrix what rounding its inputs costs: the relative error of its output (the float product
of the same int8 matrix is the true one) and how far the largest number of a token stands out (over their root mean
square), which is what takes the bits of the others; `outliers`, what a channel that stands out would cost. Success
before and after: `experiments.evaluate`, with `--weights int8` or `w8a8` and without.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import pathlib
import re
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks import machine
from experiments import scripted_presets
from robovlms_jax import cli
from robovlms_jax.control.interface import Observation
from robovlms_jax.evaluation import chains
from robovlms_jax.nn import linear
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.playtable.env import PlayTable
from robovlms_jax.policies.serving import VLAPolicy
from robovlms_jax.runs import build, load, played
from robovlms_jax.weights import quantize

STORED = ("int8", "w8a8")
OUTLIERS = (10, 100)


@dataclasses.dataclass(frozen=True)
class Args:
    """Which policy, and on how much."""

    checkpoint: str
    """Run directory or one of its checkpoints/<step> folders."""
    image_size: tuple[int, ...] = ()
    """Pixels of static and wrist camera; empty: what the policy was trained with."""
    trials: int = 8
    """Single tasks, taking turns."""
    steps: int = 20
    """Control steps of each."""
    out: pathlib.Path | None = None
    """Write the JSON here, too."""


class Layers:
    """Listens to the products of a w8a8 policy while it is traced, and to their numbers while it runs."""

    def __init__(self):
        self._sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(4))

    def listen(self, next_fun: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        """For `nn.intercept_methods`."""
        y, module = next_fun(*args, **kwargs), context.module
        if (
            isinstance(module, linear.Einsum | linear.Dense)
            and context.method_name == "__call__"
            and module.kernel.storage == "w8a8"
        ):
            equation = getattr(module, "equation", "...D,DF->...F")
            parameters = module.variables["params"]
            matrix = parameters["kernel"] * parameters["scale"]
            exact = jnp.einsum(equation, args[0].astype(jnp.float32), matrix) + parameters.get("bias", 0.0)
            inputs, letters, outputs = re.split(",|->", equation)
            axes = tuple(inputs.index(x) - len(inputs) for x in letters if x not in outputs)
            tokens = args[0].astype(jnp.float32)
            peak = jnp.abs(tokens).max(axes) / (jnp.sqrt(jnp.square(tokens).mean(axes)) + 1e-30)
            found = jnp.stack([jnp.square(y - exact).sum(), jnp.square(exact).sum(), peak.mean(), peak.max()])
            jax.debug.callback(functools.partial(self._add, "/".join(module.path)), found)
        return y

    def _add(self, name: str, found: Any) -> None:
        error, size, peak, most = np.asarray(found, np.float64)
        sums = self._sums[name]
        sums += error, size, peak, 0
        sums[3] = max(sums[3], most)
        self._sums[f"{name} calls"][0] += 1

    def report(self) -> dict[str, dict[str, float]]:
        """Path of a matrix, layers of one stack together -> what rounding its inputs costs."""
        return {
            name: {
                "relative_error": float(np.sqrt(sums[0] / sums[1])),
                "largest_over_rms_mean": float(sums[2] / self._sums[f"{name} calls"][0]),
                "largest_over_rms_max": float(sums[3]),
            }
            for name, sums in sorted(self._sums.items())
            if not name.endswith(" calls")
        }


def measure(args: Args) -> dict:
    """Bytes, milliseconds, and the differences of actions, in millimetres and degrees of CALVIN's scales."""
    plain = load.load_policy(args.checkpoint)
    policies = {weights: load.load_policy(args.checkpoint, weights=weights) for weights in STORED}
    episodes = play(plain, args)
    before, layers = replay(plain, episodes), Layers()
    listened = load.load_policy(args.checkpoint, weights="w8a8")
    with nn.intercept_methods(layers.listen):
        replay(listened, episodes)
        jax.effects_barrier()
    every = {"before": plain, **policies}
    return {
        "observations": len(before),
        "bytes": {name: sum(x.nbytes for x in jax.tree.leaves(x._batched.params)) for name, x in every.items()},
        "actions": {weights: differences(before, replay(policy, episodes)) for weights, policy in policies.items()},
        "outliers": {
            str(factor): {
                weights: differences(before, replay(with_outliers(args.checkpoint, factor, weights), episodes))
                for weights in STORED
            }
            for factor in OUTLIERS
        },
        "step_ms": step_times(every, [seen for _, pictures in episodes for seen in pictures]),
        "layers": layers.report(),
        "machine": machine.describe(),
    }


def play(policy: VLAPolicy, args: Args) -> list[tuple[str, list[Observation]]]:
    """Instructions, and what a policy sees while it follows them."""
    sizes = args.image_size or played.of(load.load_config(args.checkpoint)).image_size
    env = PlayTable(image_sizes=dict(zip(("static", "wrist"), sizes, strict=True)))
    episodes = []
    for trial in chains.chain_trials(chains.single_tasks(scripted_presets.FIXTURE_TASKS, args.trials), scene="D"):
        env.reset(**trial.start)
        policy.reset(trial.instructions[0])
        episodes.append((trial.instructions[0], []))
        for _ in range(args.steps):
            seen = env.observe()
            episodes[-1][1].append(seen)
            env.step(policy.act(seen).actions[0])
    return episodes


def replay(policy: VLAPolicy, episodes: list[tuple[str, list[Observation]]]) -> list[np.ndarray]:
    """A policy's chunks float[C, 7] for what another saw."""
    chunks = []
    for instruction, pictures in episodes:
        policy.reset(instruction)
        chunks += [policy.act(seen).actions for seen in pictures]
    return chunks


def with_outliers(checkpoint: str, factor: float, weights: str) -> VLAPolicy:
    """The same policy, stored as `weights`, in which one channel of what every layer's matrices read is `factor` times
    as large and the matrices' rows for it as much smaller: in floating point nothing changes. Large towers have such
    channels by themselves (Dettmers et al. 2022, arXiv:2208.07339)."""
    model, params, encode = load.open_model(checkpoint)
    flat = flatten_dict(params, sep="/")
    for tower, (norm, names) in itertools.product(
        ("text", "vision"), (("attn_norm", ("attn/q", "attn/k", "attn/v")), ("mlp_norm", ("mlp/up",)))
    ):
        place = f"backbone/{tower}/layers/"
        for path in (f"{place}{norm}/scale", f"{place}{norm}/bias"):
            flat[path] = flat[path].at[:, 0].multiply(factor)
        for name in names:
            flat[f"{place}{name}/kernel"] = flat[f"{place}{name}/kernel"].at[:, 0].divide(factor)
    stored = dataclasses.replace(model, vlm=dataclasses.replace(model.vlm, storage=weights))
    shapes, _ = build.abstract_params(stored, meshes.make_mesh((1, 1, 1), jax.local_devices()[:1]))
    return VLAPolicy(stored, quantize.quantize(unflatten_dict(flat, sep="/"), shapes), encode)


def differences(before: list[np.ndarray], after: list[np.ndarray]) -> dict[str, Any]:
    """Two lists of chunks float[C, 7]."""
    first, second = np.stack(before), np.stack(after)
    move = np.linalg.norm((second - first)[..., :3], axis=-1) * 20
    turn = np.degrees(np.linalg.norm((second - first)[..., 3:6], axis=-1) * 0.05)
    flat = [x[..., :6].reshape(len(x), -1) for x in (first, second)]
    norms = np.linalg.norm(flat[0], axis=1) * np.linalg.norm(flat[1], axis=1)
    return {
        "millimetres": {"mean": float(move.mean()), "p95": float(np.quantile(move, 0.95)), "max": float(move.max())},
        "degrees": {"mean": float(turn.mean()), "p95": float(np.quantile(turn, 0.95)), "max": float(turn.max())},
        "gripper_flips": float((first[..., 6] != second[..., 6]).mean()),
        "cosine": float(((flat[0] * flat[1]).sum(1) / norms).mean()),
    }


def step_times(policies: dict[str, VLAPolicy], pictures: list[Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of `act`, the policies taking turns at every picture, so that all see the same load."""
    found = {name: [] for name in policies}
    for seen in pictures:
        for name, policy in policies.items():
            started = time.perf_counter()
            policy.act(seen)
            found[name].append(1000 * (time.perf_counter() - started))
    return {name: {"p50": float(np.median(x)), "p95": float(np.quantile(x, 0.95))} for name, x in found.items()}


if __name__ == "__main__":
    given = cli.read(Args, description=__doc__)
    machine.report(measure(given), given.out)
