"""Serve a checkpoint to robots: openpi's websocket protocol on every path, vla-eval's on /vla-eval.

    python -m experiments.serve --checkpoint runs/sample
    python -m experiments.serve --checkpoint runs/sample --slots 8 --server.host 0.0.0.0 --server.token SECRET

/healthz, /health and /metrics (Prometheus) answer on the same port. docs/serving.md has the protocols and the clients.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import socket
import sys

import numpy as np
from PIL import Image

from robovlms_jax import cli
from robovlms_jax.control import robot as robots
from robovlms_jax.control.interface import Observation
from robovlms_jax.deploy import messages, server
from robovlms_jax.deploy.config import ServerConfig, tls_context
from robovlms_jax.load import load_batched_policy
from robovlms_jax.policies.serving import BatchedVLAPolicy
from robovlms_jax.runs import logs
from robovlms_jax.runs.load import load_config

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What to serve, and where."""

    checkpoint: str
    """Run directory or one of its checkpoints/<step> folders."""
    slots: int = 4
    """Robots at once; one compiled step serves them all."""
    server: ServerConfig = ServerConfig()
    image_size: tuple[int, ...] = ()
    """Height and width of the pictures that robots send, for the warm-up: the step is compiled for them. Empty: the
    robot's own sizes where they are known, else the model's."""
    executed: int = 1
    """Actions of a chunk that vla-eval's clients are given before the policy is asked again."""

    def __post_init__(self):
        if self.slots < 1:
            raise ValueError(f"slots={self.slots} must be at least 1.")
        if len(self.image_size) not in (0, 2) or any(size < 1 for size in self.image_size):
            raise ValueError(f"image_size={self.image_size}: expected height and width, or nothing.")


def decode_image(data: bytes, max_pixels: int) -> np.ndarray:
    """A PNG or JPEG -> uint8[height, width, 3]. Its size is read before its pixels are. Raises ValueError."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"a picture has {image.width} x {image.height} pixels; at most {max_pixels} are read.")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture is no PNG or JPEG: {error}") from error


def warm_up(policy: BatchedVLAPolicy, robot: robots.RobotSpec, config: ServeConfig) -> None:
    """Compiles the step, in every slot's place, with pictures of the size that will come."""
    cameras = policy.model.config.cameras
    own = {camera.name: (camera.height, camera.width) for camera in robot.cameras if camera.height and camera.width}
    model_size = (policy.model.vlm.image.size,) * 2
    images = {}
    for camera in cameras:
        height, width = config.image_size or own.get(camera, model_size)
        images[camera] = np.zeros((height, width, 3), np.uint8)
    state = np.zeros(len(policy.robot.state), np.float32) if policy.robot.state else None
    slots = list(range(policy.slots))
    policy.reset(slots, ["move"] * policy.slots)
    seen = [Observation(images, state)] * policy.slots
    for _ in range(2):
        chunks = policy.act(seen, slots)
    if policy.takes_plan:  # a step of its own
        left = [dataclasses.replace(x, committed=chunk.actions) for x, chunk in zip(seen, chunks, strict=True)]
        policy.act(left, slots)
    policy.release(slots)


def require_address(config: ServerConfig) -> None:
    """What would be found out only after loading and compiling: a bad token file or certificate, a port that is taken.

    Raises ValueError, OSError that say what to change.
    """
    config.secret()
    tls_context(config)
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        raise OSError(
            f"nobody can listen at {config.host}:{config.port} ({error.strerror or error}); choose another "
            "--server.port (0: any that is free), or end what listens there."
        ) from error


def build(config: ServeConfig) -> server.PolicyServer:
    """Loads and warms up; raises ValueError, FileNotFoundError for a checkpoint that is none, OSError for an address
    that is taken."""
    require_address(config.server)
    experiment = load_config(config.checkpoint)
    settings = experiment.policy
    policy = load_batched_policy(config.checkpoint, slots=config.slots)
    log.info("warming up %d slots", config.slots)
    warm_up(policy, settings.robot, config)
    readings = {sensor.name: sensor.reading for sensor in settings.sensors}
    shapes = {name: (None, *x.shape[1:]) if x.any_rows else x.shape for name, x in readings.items()}
    needs_state = settings.proprio.enabled or settings.representation != "robot"
    reader = messages.Reader(tuple(settings.cameras), state=needs_state, sensors=shapes, committed=policy.takes_plan)
    return server.PolicyServer(
        policy,
        settings.robot,
        reader,
        settings.chunk,
        config.server,
        name=f"{experiment.backbone.name}, {settings.history}, {config.checkpoint}",
        decode_image=lambda data: decode_image(data, config.server.max_picture_pixels),
        executed=config.executed,
    )


def main() -> None:
    logs.to_stderr(absl=logging.ERROR)
    config = cli.read(ServeConfig, description=__doc__)
    try:
        policy_server = build(config)
        scheme = "wss" if config.server.certificate else "ws"

        def announce() -> None:
            log.info("ready: %s://%s:%d", scheme, config.server.host, policy_server.port)

        asyncio.run(server.serve(policy_server, announce))
    except (ValueError, FileNotFoundError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
