"""Serve a checkpoint to robots: openpi's websocket protocol on every path, vla-eval's on /vla-eval.

    python -m experiments.serve --checkpoint runs/sample
    python -m experiments.serve --checkpoint runs/sample --slots 8 --server.host 0.0.0.0 --server.token SECRET

/healthz, /health and /metrics (Prometheus) answer on the same port. docs/serving.md has the protocols and the clients.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import sys
import time

import jax
import numpy as np
from PIL import Image

import experiments
from robovlms_jax import bars, cli
from robovlms_jax.control import robot as robots
from robovlms_jax.deploy import messages, server
from robovlms_jax.deploy.config import ServerConfig, tls_context
from robovlms_jax.deploy.metrics import Metrics
from robovlms_jax.inputs import prompts
from robovlms_jax.load import load_batched_policy
from robovlms_jax.policies.serving import BatchedVLAPolicy
from robovlms_jax.runs import logs, played
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.runs.load import Weights, load_config
from robovlms_jax.training import checkpoints
from robovlms_jax.web import addresses, running

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What to serve, and where."""

    checkpoint: str
    """Run directory, one of its checkpoints/<step> folders, or hf://OWNER/NAME."""
    slots: int = 4
    """Robots at once; one compiled step serves them all."""
    server: ServerConfig = ServerConfig()
    image_size: tuple[int, ...] = ()
    """Height and width of the pictures that robots send: the step is compiled for them, and for pictures that were
    resized to the model's size before, as those of other sizes are. Empty: the robot's own sizes where they are known,
    else the model's."""
    prompt_lengths: tuple[int, ...] = ()
    """Tokens that prompts are padded to; the step is compiled for each, and longer prompts are refused. Empty: the
    longest of training, and twice that."""
    weights: Weights | None = None
    """How the backbone's parameters are kept, and w8a8 what they multiply (docs/serving.md); None: in the type that it
    computes in."""
    executed: int = 0
    """Actions of a chunk that vla-eval's clients are given before the policy is asked again; 0: as many as in the run's
    own rollouts, one where it had none."""

    def __post_init__(self):
        if self.slots < 1:
            raise ValueError(f"slots={self.slots} must be at least 1.")
        if self.executed < 0:
            raise ValueError(f"executed={self.executed} must not be negative.")
        if len(self.image_size) not in (0, 2) or any(size < 1 for size in self.image_size):
            raise ValueError(f"image_size={self.image_size}: expected height and width, or nothing.")
        if any(length < 1 for length in self.prompt_lengths):
            raise ValueError(f"prompt_lengths={self.prompt_lengths}: expected numbers of tokens of 1 or more.")


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
    """Compiles all that robots can ask for, see `BatchedVLAPolicy.warm_up`."""
    own = {camera.name: (camera.height, camera.width) for camera in robot.cameras if camera.height and camera.width}
    model_size = (policy.model.vlm.image.size,) * 2
    sizes = {camera: config.image_size or own.get(camera, model_size) for camera in policy.model.config.cameras}
    shown = ", ".join(f"{camera} {height}x{width}" for camera, (height, width) in sizes.items())
    lengths = " and ".join(map(str, policy.prompt_lengths))
    log.info("for up to %d robots, pictures %s, prompts of %s tokens", policy.slots, shown, lengths)
    started = time.monotonic()
    with bars.waiting("compiling, which takes up to minutes for large models"):
        policy.warm_up(sizes)
    log.info("compiled in %.1f s", time.monotonic() - started)


def count_compilations(metrics: Metrics) -> None:
    """From now on, all of this process: after the warm-up there should be none, for robots wait meanwhile."""

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            metrics.add("compilations_total")
            metrics.add("compilation_seconds_total", seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)


def require_address(config: ServerConfig) -> None:
    """What would be found out only after loading and compiling: a bad token file or certificate, a port that is taken.

    Raises ValueError, OSError that say what to change.
    """
    config.secret()
    tls_context(config)
    addresses.check(config.host, config.port, option="--server.")


def executed_of_a_chunk(config: ServeConfig, experiment: ExperimentConfig) -> int:
    """What vla-eval's clients are given, see `ServeConfig.executed`."""
    own = played.of(experiment)
    played.say_no_retry(own)  # who executes what is served is the client
    return config.executed or (own.horizon if experiment.rollouts.trials else 1)


def build(config: ServeConfig) -> server.PolicyServer:
    """Loads and warms up; raises ValueError, FileNotFoundError for a checkpoint that is none, OSError for an address
    that is taken."""
    require_address(config.server)
    directory = checkpoints.locate(config.checkpoint, strict=True)
    experiment = load_config(directory)
    settings = experiment.policy
    usual = max(experiment.data.text_length, 8)
    most = max(prompts.MAX_TOKENS, usual)
    if config.prompt_lengths and max(config.prompt_lengths) > most:
        raise ValueError(
            f"prompt_lengths={list(config.prompt_lengths)}: no prompt of more than {most} tokens is served (training's "
            f"longest has {usual}); give lengths up to {most}."
        )
    lengths = config.prompt_lengths or tuple(sorted({usual, min(2 * usual, most)}))
    policy = load_batched_policy(directory, config.slots, weights=config.weights, prompt_lengths=lengths)
    readings = {sensor.name: sensor.reading for sensor in settings.sensors}
    shapes = {name: (None, *x.shape[1:]) if x.any_rows else x.shape for name, x in readings.items()}
    needs_state = settings.proprio.enabled or settings.representation != "robot"
    reader = messages.Reader(tuple(settings.cameras), state=needs_state, sensors=shapes, committed=policy.takes_plan)
    served = server.PolicyServer(
        policy,
        settings.robot,
        reader,
        settings.chunk,
        config.server,
        name=f"{experiment.backbone.name}, {settings.history}, {config.checkpoint}",
        decode_image=lambda data: decode_image(data, config.server.max_picture_pixels),
        executed=executed_of_a_chunk(config, experiment),
    )
    count_compilations(served.metrics)
    warm_up(policy, settings.robot, config)
    return served


def main() -> None:
    logs.to_stderr(absl=logging.ERROR)
    config = cli.read(ServeConfig, description=__doc__)
    try:
        experiments.need("serve", "websockets", "msgpack")
        policy_server = build(config)
        scheme = "wss" if config.server.certificate else "ws"

        def announce() -> None:
            log.info("ready: %s://%s:%d", scheme, config.server.host, policy_server.port)

        running.run(server.serve(policy_server, announce))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
