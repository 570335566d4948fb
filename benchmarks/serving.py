"""What serving and safety cost per control step, in milliseconds, as JSON.   python -m benchmarks.serving

server: round trip of our client, over the loop-back device, to a server in a process of its own whose policy answers at
once: what a real policy's step takes longer when it is served. safety: `SafetyLayer.check` on random requests.
`--soak_s 180` instead: clients at full rate for so long, and the memory of the server's process meanwhile.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import machine
from robovlms_jax import cli
from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.control.robot import CALVIN
from robovlms_jax.deploy import geometry, server
from robovlms_jax.deploy.client import Client
from robovlms_jax.deploy.config import ServerConfig
from robovlms_jax.deploy.limits import MOBILE, Limits
from robovlms_jax.deploy.messages import Reader
from robovlms_jax.deploy.safety import Measured, SafetyLayer

WARM_UP = 50
"""Steps that are not counted."""


@dataclasses.dataclass(frozen=True)
class Args:
    """How much to measure."""

    steps: int = 3000
    """Of each kind."""
    image_size: tuple[int, int] = (200, 84)
    """Pixels of static and wrist camera."""
    soak_s: float = 0.0
    """Seconds of a soak instead of the rest; 0: none."""
    clients: int = 3
    """Of a soak."""
    out: pathlib.Path | None = None
    """Write the JSON here, too."""


class AtOnce:
    """A policy that computes nothing."""

    horizon = 10

    def __init__(self, slots: int = 1):
        self.slots = slots

    def reset(self, slots: Sequence[int], instructions: Sequence[str]) -> None: ...

    def release(self, slots: Sequence[int]) -> None: ...

    def act(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[ActionChunk]:
        return [ActionChunk(np.ones((self.horizon, len(CALVIN.action)), np.float32)) for _ in slots]


def serve(port: multiprocessing.queues.Queue, slots: int) -> None:
    """A server's process; tells its port."""
    served = server.PolicyServer(
        AtOnce(slots), CALVIN, Reader(("static", "wrist")), AtOnce.horizon, ServerConfig(port=0)
    )
    asyncio.run(server.serve(served, lambda: port.put(served.port)))


@contextlib.contextmanager
def serving(slots: int) -> Iterator[tuple[str, int]]:
    """Address and process number of a server."""
    spawn = multiprocessing.get_context("spawn")
    port = spawn.Queue()
    process = spawn.Process(target=serve, args=(port, slots), daemon=True)
    process.start()
    try:
        yield f"ws://127.0.0.1:{port.get(timeout=60)}", process.pid
    finally:
        process.terminate()
        process.join(10)


def observation(args: Args) -> Observation:
    rng = np.random.default_rng(0)
    sizes = dict(zip(("static", "wrist"), args.image_size, strict=True))
    images = {name: rng.integers(0, 256, (size, size, 3), np.uint8) for name, size in sizes.items()}
    return Observation(images, np.zeros(7, np.float32))


def measure_server(args: Args) -> dict[str, float]:
    """Milliseconds of a round trip."""
    seen = observation(args)
    with serving(1) as (address, _), Client(address) as client:
        client.reset("push the button")
        return timed(lambda: client.act(seen), args.steps)


def soak(args: Args) -> dict[str, Any]:
    """Answers, and the server's memory (resident, Linux) ten times on the way, in MB; the first after a tenth."""
    seen, answers, memory = observation(args), [0] * args.clients, []
    with serving(args.clients) as (address, process):
        until = time.monotonic() + args.soak_s

        def robot(number: int) -> None:
            with Client(address) as client:
                client.reset("push the button")
                while time.monotonic() < until:
                    client.act(seen)
                    answers[number] += 1

        with concurrent.futures.ThreadPoolExecutor(args.clients) as pool:
            robots = [pool.submit(robot, number) for number in range(args.clients)]
            for _ in range(10):
                time.sleep(max(args.soak_s / 10 - 0.01, 0))
                pages = int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1])
                memory.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1))
            for robot_done in robots:
                robot_done.result()
    return {"seconds": args.soak_s, "clients": args.clients, "answers": sum(answers), "server_mb": memory}


def measure_safety(args: Args, spec: Any, obstacles: int) -> dict[str, float]:
    """Milliseconds of a check; requests change slowly, as a policy's do, and stay inside the workspace."""
    layer = SafetyLayer(spec, Limits(), 0.02)
    rng = np.random.default_rng(0)
    around = [2 * np.pi * index / max(obstacles, 1) for index in range(obstacles)]
    scene = tuple(
        geometry.ball(f"ball {index}", (0.45 * np.cos(angle), 0.45 * np.sin(angle), 0.1), 0.03)
        for index, angle in enumerate(around)
    )
    size, position = len(spec.action), np.zeros(3 if spec is MOBILE else 6)
    position[2] = 0.0 if spec is MOBILE else 0.15
    request, scale = np.zeros(size), np.array([dimension.measure[0] for dimension in spec.action])

    def check() -> None:
        nonlocal request, position
        request = 0.95 * request + 0.05 * rng.uniform(-0.2, 0.2, size)
        decision = layer.check(request, Measured(position, scene))
        if decision.state != "run":
            raise RuntimeError(f"the layer stopped, which is another path: {decision.stop}")
        if spec is not MOBILE:  # an arm that goes where it is sent
            position = position + (decision.action * scale)[: len(position)]

    return timed(check, args.steps)


def timed(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds: p50, p99 and the largest."""
    for _ in range(WARM_UP):
        step()
    found = np.empty(steps)
    for index in range(steps):
        started = time.perf_counter()
        step()
        found[index] = 1000 * (time.perf_counter() - started)
    return {
        "p50_ms": float(np.median(found)),
        "p99_ms": float(np.quantile(found, 0.99)),
        "max_ms": float(found.max()),
    }


def main() -> None:
    args = cli.read(Args, description=__doc__)
    if args.soak_s:
        machine.report({"soak": soak(args), "machine": machine.describe()}, args.out)
        return
    result = {
        "server": measure_server(args),
        "safety": {
            "base, no obstacle": measure_safety(args, MOBILE, 0),
            "base, 8 obstacles": measure_safety(args, MOBILE, 8),
            "arm, no obstacle": measure_safety(args, CALVIN, 0),
            "arm, 8 obstacles": measure_safety(args, CALVIN, 8),
        },
        "machine": machine.describe(),
    }
    machine.report(result, args.out)


if __name__ == "__main__":
    main()
