"""What a policy's control step costs on this machine: milliseconds, parameters, memory."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping

import jax
import numpy as np

from robovlms_jax.control.interface import Observation
from robovlms_jax.nn import stack
from robovlms_jax.policies import serving
from robovlms_jax.policies.sensors import base as sensors
from robovlms_jax.training import memory


def measure(policy: serving.BatchedVLAPolicy, sizes: tuple[int, int], steps: int = 50) -> dict[str, float]:
    """Ask a policy of one slot `steps` times, with pictures of noise.

    Args:
      sizes: pixels of the first camera's and the second's square pictures, in the order of `policy.robot.cameras`.
    Returns:
      "milliseconds": the median of a control step, NumPy pictures in and actions out, compilation apart; "parameters"
      and "head_parameters": how many there are; "step_bytes": what XLA plans to hold at a time while a step runs, the
      parameters included.
    """
    cameras, rng = [camera.name for camera in policy.robot.cameras], np.random.default_rng(0)
    pictures = dict(zip(cameras, sizes, strict=True))
    images = {name: rng.integers(0, 256, (size, size, 3), np.uint8) for name, size in pictures.items()}
    state = np.zeros(len(policy.robot.state), np.float32) if policy.robot.state else None
    policy.reset([0], ["open the drawer"])
    seconds = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        policy.act([Observation(images, state)], [0])
        seconds.append(time.perf_counter() - begin)
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in policy.params.items()}
    return {
        "milliseconds": 1000 * statistics.median(seconds[1:]),
        "parameters": sum(count.values()),
        "head_parameters": count.get("head", 0),  # of action tokens: none
        "step_bytes": _step_bytes(policy, images),
    }


def _step_bytes(policy: serving.BatchedVLAPolicy, images: Mapping[str, np.ndarray]) -> int:
    ids, mask = (np.asarray(x)[None] for x in policy.encode_text("open the drawer"))
    carry = policy.model.init_carry(1, jax.eval_shape(stack.joined, policy.params), ids.shape[1])
    seen = {camera: images[camera][None] for camera in policy.model.config.cameras}
    extras = sensors.blank(policy.model.config.all_sensors, 1, 1)
    program = jax.jit(functools.partial(serving.served_step, policy.model), donate_argnums=1)
    lowered = program.lower(policy.params, carry, seen, (ids, mask), np.ones(1, bool), extras)
    return memory.of_program(lowered.compile())["peak"]
