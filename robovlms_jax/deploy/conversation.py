"""What a robot's client says and does, without the line that it does it on (sans-IO).

`Conversation` knows the messages. `Course` knows their course: it yields what is to be done on the line, and is sent
what came of it; `client.Client` does so blocking, `client.AsyncClient` in an event loop. NumPy and msgpack.
"""

from __future__ import annotations

import dataclasses
import logging
import ssl
import time
from collections.abc import Generator
from typing import Any

import numpy as np

from robovlms_jax.control.interface import ActionChunk, Observation
from robovlms_jax.deploy import codec
from robovlms_jax.deploy.config import require_token
from robovlms_jax.deploy.limits import is_number

log = logging.getLogger(__name__)

BOUNDS = codec.Bounds()


class ServerError(RuntimeError):
    """The server answered with an error; the episode is over. Its text says what was wrong."""


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    """How patient a client is.

    connect_timeout_s: for everything until the server's first message, retries included; refused connections are tried
      again, with pauses that double from 0.1 to 2 s.
    timeout_s: for an answer. reconnects: how often one `act` connects anew where the connection was lost before the
      answer came; the episode then begins anew at the server, which is logged.
    """

    token: str = ""
    connect_timeout_s: float = 30.0
    timeout_s: float = 5.0
    reconnects: int = 1
    ssl: ssl.SSLContext | None = None

    def __post_init__(self):
        require_token(self.token)
        given = (self.connect_timeout_s, self.timeout_s, self.reconnects)
        if not all(is_number(x) for x in given) or not (min(given[:2]) > 0 and self.reconnects >= 0):
            raise ValueError(
                f"connect_timeout_s={self.connect_timeout_s!r} and timeout_s={self.timeout_s!r} must be numbers above "
                f"0, reconnects={self.reconnects!r} 0 or more."
            )


@dataclasses.dataclass(frozen=True)
class Clock:
    """How the server's clock stands to ours, from the exchange with the shortest round trip since a clock was set.

    offset_s: server's time minus ours; off by at most half of round_trip_s, which leaves out the time of the answer.
    """

    offset_s: float
    round_trip_s: float


@dataclasses.dataclass(frozen=True)
class Open:
    """Make a line, shake hands, and receive its first message: -> bytes or text, within `seconds`; else no line."""

    seconds: float


@dataclasses.dataclass(frozen=True)
class Ask:
    """Send a message and receive one: -> bytes or text. Both within `seconds`, or TimeoutError or a lost line."""

    message: bytes
    seconds: float


@dataclasses.dataclass(frozen=True)
class Close:
    """The line, if there is one. goodbye: say so; else it is cut, for what could not be sent would be waited for."""

    goodbye: bool


@dataclasses.dataclass(frozen=True)
class Pause:
    """Do nothing for so long."""

    seconds: float


Steps = Generator["Open | Ask | Close | Pause", Any, Any]
"""What is to be done; what came of it is sent in, or thrown in."""


class Conversation:
    """What is said, without the line it is said on."""

    def __init__(self):
        self.metadata: dict[str, Any] = {}
        self.instruction: str | None = None
        self.begin = True
        """The next observation begins an episode."""
        self.clock: Clock | None = None
        self.last_reply: dict[str, Any] = {}
        """The last answer without its actions: timings, and `clipped`, names of dimensions that were out of bounds."""

    def greeted(self, message: bytes | str) -> None:
        content = self._read(message)
        if not isinstance(content, dict) or "action_dim" not in content:
            raise ServerError(f"the server's first message is none of a policy server: {codec.brief(content, 200)}")
        self.metadata, self.begin = content, True

    def request(self, observation: Observation) -> bytes:
        if self.instruction is None:
            raise RuntimeError("there is no episode: act() before reset(instruction).")
        message: dict[str, Any] = {"prompt": self.instruction, "reset": self.begin}
        message |= {f"observation/{camera}": np.asarray(image) for camera, image in observation.images.items()}
        if observation.proprio is not None:
            message["observation/state"] = np.asarray(observation.proprio, np.float32)
        if observation.executed is not None:
            message["executed"] = np.asarray(observation.executed, np.float32)
        if observation.committed is not None:
            message["committed"] = np.asarray(observation.committed, np.float32)
            message["delay"] = int(observation.delay)
        readings = {name: value for name, value in observation.sensors.items() if value is not None}
        message |= {f"observation/sensors/{name}": np.asarray(x, np.float32) for name, x in readings.items()}
        return codec.pack(message)

    def answered(self, message: bytes | str, sent_s: float) -> ActionChunk:
        """sent_s: our clock when the request went out."""
        came_s = time.time()
        if isinstance(message, str):
            raise ServerError(message)
        content = self._read(message)
        actions = content.get("actions") if isinstance(content, dict) else None
        dim = self.metadata["action_dim"]
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.shape[1] != dim or not len(actions):
            found = list(actions.shape) if isinstance(actions, np.ndarray) else type(actions).__name__
            raise ServerError(f"the answer has actions {found}; expected [horizon, {dim}].")
        with np.errstate(over="ignore"):  # 1e300 is infinite in float32
            actions = actions.astype(np.float32) if actions.dtype.kind == "f" else actions
        if actions.dtype.kind != "f" or not np.isfinite(actions).all():
            raise ServerError("the answer has actions that are not finite.")
        chunk = ActionChunk(actions, *_confidence(content, actions.shape))
        self.last_reply = {key: value for key, value in content.items() if key != "actions"}
        self._set_clock(content.get("server_timing"), sent_s, came_s)
        self.begin = False
        return chunk

    def _set_clock(self, timing: Any, sent_s: float, came_s: float) -> None:
        if not isinstance(timing, dict) or not all(isinstance(timing.get(k), float) for k in ("received_s", "sent_s")):
            return
        received_s, answered_s = timing["received_s"], timing["sent_s"]
        round_trip = (came_s - sent_s) - (answered_s - received_s)
        if round_trip < 0:  # a clock was set meanwhile
            self.clock = None
            return
        found, known = Clock(((received_s - sent_s) + (answered_s - came_s)) / 2, round_trip), self.clock
        # Two exchanges that contradict each other: one of the clocks was set, and the newer one says how they stand.
        jumped = (
            known is not None and abs(found.offset_s - known.offset_s) > (found.round_trip_s + known.round_trip_s) / 2
        )
        if known is None or jumped or round_trip <= known.round_trip_s:
            self.clock = found

    def _read(self, message: bytes | str) -> Any:
        if isinstance(message, str):
            raise ServerError(message)
        try:
            return codec.unpack(message, BOUNDS)
        except ValueError as error:
            raise ServerError(f"the server's message cannot be read: {error}") from error


class Course:
    """The course of connecting and acting, for both kinds of client. `connected`: whether there is a line."""

    def __init__(self, url: str, config: ClientConfig):
        if not url.startswith(("ws://", "wss://")):
            raise ValueError(f"url={url!r}: expected ws://HOST:PORT or wss://HOST:PORT.")
        self.url, self.config, self.connected = url, config, False
        self.conversation = Conversation()
        self.episodes_lost = 0

    def connect(self) -> Steps:
        """Raises TimeoutError where no server answers in time, ServerError where it refuses."""
        from websockets.exceptions import InvalidStatus

        deadline, pause, last = time.monotonic() + self.config.connect_timeout_s, 0.1, "no answer"
        yield from self.close()
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.conversation.greeted((yield Open(left)))
                self.connected = True
                return
            except (*transient(), InvalidStatus, TimeoutError) as error:
                if (refused := refusal(error)) is not None:
                    raise refused from error
                last = str(error) or type(error).__name__
            finally:
                if not self.connected:  # its slot at the server is free again
                    yield Close(goodbye=False)
            yield Pause(max(min(pause, deadline - time.monotonic()), 0))
            pause = min(pause * 2, 2.0)
        raise self._too_late(f"no policy server answered ({last})", self.config.connect_timeout_s)

    def close(self, *, goodbye: bool = True) -> Steps:
        self.connected = False
        yield Close(goodbye)

    def reset(self, instruction: str) -> None:
        """The next observation begins an episode."""
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"the instruction is {instruction!r}; say what the robot should do.")
        self.conversation.instruction, self.conversation.begin = instruction, True

    def act(self, observation: Observation) -> Steps:
        """Returns an ActionChunk. Raises TimeoutError, ServerError, or OSError and websockets' ConnectionClosed for a
        line that stays lost."""
        for attempt in range(self.config.reconnects + 1):
            if not self.connected:
                yield from self.connect()
            message = self.conversation.request(observation)
            begun, sent_s = time.monotonic(), time.time()
            try:
                return self.conversation.answered((yield Ask(message, self.config.timeout_s)), sent_s)
            except transient() as error:  # TimeoutError is an OSError
                # What could not be sent in time ends as a lost line.
                late = isinstance(error, TimeoutError) or time.monotonic() - begun >= self.config.timeout_s
                yield from self.close(goodbye=False)
                self._lost(error)
                if late:
                    raise self._too_late("no answer", self.config.timeout_s) from error
                if attempt == self.config.reconnects:
                    raise
            except ServerError:
                yield from self.close()
                raise
            except BaseException as error:  # Ctrl-C, a cancelled task: on this line the next answer would be an old one
                yield from self.close(goodbye=False)
                self._lost(error)
                raise
        raise AssertionError("unreachable")

    def _lost(self, error: BaseException) -> None:
        if not self.conversation.begin:
            self.episodes_lost += 1
            why = str(error) or type(error).__name__
            log.warning("%s: the connection was lost (%s); the episode begins anew there.", self.url, why)

    def _too_late(self, what: str, seconds: float) -> TimeoutError:
        return TimeoutError(f"{self.url}: {what} within {seconds:g} s.")


def _confidence(content: dict[str, Any], shape: tuple[int, int]) -> tuple[Any, Any, float | None]:
    """Uncertainty, interval and coverage, None where the answer has none. Raises ServerError for what cannot be."""
    found = []
    for name, expected in (("uncertainty", shape[:1]), ("interval", shape)):
        value = content.get(name)
        if value is not None:
            numbers = isinstance(value, np.ndarray) and value.shape == expected and value.dtype.kind == "f"
            if not numbers or np.isnan(value).any():
                raise ServerError(
                    f"the answer's {name} is {codec.brief(value, 60)}; expected numbers {list(expected)}."
                )
        found.append(value)
    coverage = content.get("coverage")
    if coverage is not None and not isinstance(coverage, float):
        raise ServerError(f"the answer's coverage is {codec.brief(coverage, 60)!r}; expected a number.")
    return found[0], found[1], coverage


def transient() -> tuple[type[Exception], ...]:
    """What a connection that may come to stand later fails with."""
    from websockets.exceptions import ConnectionClosed, InvalidMessage

    return (OSError, ConnectionClosed, InvalidMessage, EOFError)


def refusal(error: Exception) -> Exception | None:
    """Not None: trying again would not help."""
    from websockets.exceptions import ConnectionClosed, InvalidStatus

    if isinstance(error, ssl.SSLCertVerificationError):
        return ServerError(f"the server's certificate is not trusted: {error}")
    if isinstance(error, InvalidStatus) and error.response.status_code != 503:
        return ServerError(f"the server refuses the connection with {error.response.status_code}: {error}")
    if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code not in (1001, 1013):
        return ServerError(f"the server closed the connection: {error.rcvd.reason or error.rcvd.code}")
    return None
