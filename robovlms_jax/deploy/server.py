"""A policy behind websockets: openpi's protocol on every path, vla-eval's on /vla-eval, both on one port.

Each connection has a slot of the policy to itself, so a history of its own, which begins with the connection, with
another instruction, or when a client asks for it. The model runs in a thread of its own (`batching`); the event loop
only reads, checks and answers, so health checks and other robots never wait for it. `websockets` and `msgpack` are
imported where they are used.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import hmac
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from robovlms_jax.control.robot import RobotSpec
from robovlms_jax.deploy import codec, messages
from robovlms_jax.deploy.batching import InferenceThread, ServedPolicy
from robovlms_jax.deploy.config import ServerConfig, tls_context
from robovlms_jax.deploy.metrics import Metrics

log = logging.getLogger(__name__)

VLA_EVAL_PATH = "/vla-eval"
SMALL = 64 * 1024
"""Bytes of a message that is read at once, in the event loop: a fraction of a millisecond."""


@dataclasses.dataclass(eq=False)
class Session:
    """A connection and its slot.

    instruction: of the episode; None before the first step. queued: vla-eval's actions that are still to be answered.
    """

    socket: Any
    slot: int
    instruction: str | None = None
    busy: bool = False
    benchmark: str = ""
    queued: list[np.ndarray] = dataclasses.field(default_factory=list)


class PolicyServer:
    """Serves one policy; made and run in an event loop.

    Args:
      policy: answers; warmed up already, or its first answers are late.
      robot: what its actions and observations are made of.
      reader: what it needs to see.
      horizon: actions of a chunk.
      name: of the policy, for metadata.
      decode_image: for vla-eval's compressed pictures (`codec.DecodeImage`); None: they are refused.
      executed: actions of a chunk that vla-eval's clients are given before the policy is asked again.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        robot: RobotSpec,
        reader: messages.Reader,
        horizon: int,
        config: ServerConfig,
        *,
        name: str = "robovlms_jax",
        decode_image: codec.DecodeImage | None = None,
        executed: int = 1,
    ):
        if not 1 <= executed <= horizon:
            raise ValueError(f"executed={executed} must be 1 ... {horizon}, the actions of a chunk.")
        self.config, self.robot, self.horizon, self.name = config, robot, horizon, name
        self.metrics = Metrics()
        self._token = config.secret()
        self._reader = dataclasses.replace(reader, max_pixels=config.max_picture_pixels)
        self._bounds = codec.Bounds(message_bytes=config.max_message_bytes)
        self._decode_image, self._executed = decode_image, executed
        self._readers = concurrent.futures.ThreadPoolExecutor(config.reading_threads, "reading")
        self._inference = InferenceThread(
            policy, max_batch=config.max_batch, max_wait_s=config.max_wait_s, on_batch=self._count_batch
        )
        self._free = list(range(policy.slots))[::-1]
        self._slots = policy.slots
        self._sessions: set[Session] = set()
        self._draining = False
        self._server: Any = None

    @property
    def port(self) -> int:
        return self._server.sockets[0].getsockname()[1]

    async def start(self) -> None:
        """Begins to listen. Raises OSError where the address is taken, ValueError for a certificate that is none."""
        from websockets.asyncio import server as websockets

        quiet = logging.getLogger("robovlms_jax.deploy.websockets")
        quiet.setLevel(logging.CRITICAL)  # hostile handshakes would fill the log with tracebacks
        tls = tls_context(self.config)
        self._inference.start()
        self._server = await websockets.serve(
            self._connected,
            self.config.host,
            self.config.port,
            process_request=self._http,
            compression=None,
            max_size=self.config.max_message_bytes,
            max_queue=2,
            origins=[None],  # no web page of a browser on this machine drives the robot
            close_timeout=1,  # who does not say goodbye in a second keeps its slot no longer
            ssl=tls,
            logger=quiet,
            server_header=None,
        )
        self.metrics.set("ready", 1)
        if self.config.host not in ("127.0.0.1", "::1", "localhost") and not self._token:
            log.warning("anyone who reaches %s can drive the robot: set a token.", self.config.host)

    async def drain(self) -> None:
        """Answers what runs, lets nobody in any more, closes with 1001 and ends the inference thread."""
        self._draining = True  # from now on `_http` answers 503; who asks for /healthz must be able to hear it
        self.metrics.set("ready", 0)
        idle = [session.socket.close(1001, "the server stops") for session in self._sessions if not session.busy]
        await asyncio.gather(*idle)
        deadline = time.monotonic() + self.config.drain_timeout_s
        while self._sessions and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._server.close(close_connections=True)
        await asyncio.get_running_loop().run_in_executor(self._readers, self._inference.stop, 5.0)
        self._readers.shutdown(wait=False, cancel_futures=True)

    @property
    def metadata(self) -> dict[str, Any]:
        """The first message of every connection of openpi's protocol."""
        return {
            "policy": self.name,
            "action_horizon": self.horizon,
            "action_dim": len(self.robot.action),
            "control_rate_hz": self.robot.rate_hz,
            "robot": self.robot.to_json(),
            "cameras": list(self._reader.cameras),
            "observation_keys": self._reader.keys(),
            "keeps_history": True,
            "goes_on_from_committed": self._reader.committed,
            "new_episode": "a new connection, another prompt, or reset: true in an observation",
        }

    def _count_batch(self, size: int, seconds: float) -> None:
        self.metrics.add("batched_steps_total", size)
        self.metrics.observe("inference_seconds", seconds)

    def _http(self, connection: Any, request: Any) -> Any:
        """Answers plain GETs; None lets a websocket in."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(503, "stopping\n") if self._draining else connection.respond(200, "OK\n")
        if not self._authorized(request.headers.get_all("Authorization")):
            self.metrics.add("connections_refused_total", label="unauthorized")
            return connection.respond(401, "Authorization: Bearer TOKEN is missing or wrong.\n")
        if path == "/metrics":
            return connection.respond(200, self.metrics.text())
        if path == "/health":
            response = connection.respond(200, json.dumps({"status": "ok"}))
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
            return response
        if self._draining:
            return connection.respond(503, "stopping\n")
        return None

    def _authorized(self, given: list[str]) -> bool:
        if not self._token:
            return True
        kind, _, token = (given[0] if len(given) == 1 else "").partition(" ")
        return kind in ("Bearer", "Api-Key") and hmac.compare_digest(token.encode(), self._token.encode())

    async def _connected(self, socket: Any) -> None:
        if not self._free:
            self.metrics.add("connections_refused_total", label="full")
            await socket.close(1013, f"all {self._slots} slots are taken; try again later")
            return
        session = Session(socket, self._free.pop())
        self._sessions.add(session)
        self.metrics.add("connections_total")
        self.metrics.set("connections", len(self._sessions))
        loop = asyncio.get_running_loop()
        try:
            if socket.request.path.partition("?")[0] == VLA_EVAL_PATH:
                await self._speak_vla_eval(session)
            else:
                await self._speak_openpi(session)
        finally:
            self._sessions.discard(session)
            self.metrics.set("connections", len(self._sessions))
            # the slot is free when the inference thread is done with it
            freed = functools.partial(loop.call_soon_threadsafe, self._free.append, session.slot)
            self._inference.release(session.slot, freed)

    async def _receive(self, session: Session) -> bytes | str | None:
        """The next message; None when the connection is over."""
        from websockets.exceptions import ConnectionClosed

        if self._draining:
            await session.socket.close(1001, "the server stops")
            return None
        try:
            return await asyncio.wait_for(session.socket.recv(), self.config.idle_timeout_s or None)
        except TimeoutError:
            await session.socket.close(1000, f"nothing was sent for {self.config.idle_timeout_s:g} s")
        except ConnectionClosed:
            pass
        return None

    async def _send(self, session: Session, message: bytes | str) -> bool:
        """Whether it went out; a client that does not read is dropped."""
        from websockets.exceptions import ConnectionClosed

        try:
            await asyncio.wait_for(session.socket.send(message), self.config.send_timeout_s)
        except TimeoutError:
            session.socket.transport.abort()
            return False
        except ConnectionClosed:
            return False
        return True

    async def _speak_openpi(self, session: Session) -> None:
        if not await self._send(session, codec.pack(self.metadata)):
            return
        previous_ms = None
        while (message := await self._receive(session)) is not None:
            received_s, session.busy = time.time(), True
            started = time.perf_counter()
            try:
                if isinstance(message, str):
                    raise ValueError("the message is text; expected a binary msgpack map.")
                step = await self._apart(message, lambda message=message: self._reader.read(self._unpack(message)))
                actions, beside, infer_ms = await self._step(session, step)
            except Exception as error:
                self._failed(error)
                if await self._send(session, f"{type(error).__name__}: {error}"):
                    await session.socket.close(1011, "the error is in the frame before")
                return
            timing = {"infer_ms": (time.perf_counter() - started) * 1000, "received_s": received_s}
            if previous_ms is not None:
                timing["prev_total_ms"] = previous_ms
            reply = {"actions": actions, "policy_timing": {"infer_ms": infer_ms}, "server_timing": timing, **beside}
            timing["sent_s"] = time.time()
            if not await self._send(session, codec.pack(reply)):
                return
            previous_ms = (time.perf_counter() - started) * 1000
            self._answered(session, previous_ms / 1000)

    async def _speak_vla_eval(self, session: Session) -> None:
        while (message := await self._receive(session)) is not None:
            session.busy, started, sequence, late = True, time.perf_counter(), 0, False
            try:
                kind, payload, sequence = await self._envelope(message)
                answer = await self._vla_eval_answer(session, kind, payload, message)
            except Exception as error:
                self._failed(error)
                session.instruction, session.queued = None, []  # it may have been what begins an episode
                answer, late = ("error", {"error": f"{type(error).__name__}: {error}"}), isinstance(error, TimeoutError)
            if answer is not None:
                frame = dict(zip(("type", "payload"), answer), seq=sequence, timestamp=time.time())
                if not await self._send(session, codec.pack(frame, text_keys=True)):
                    return
                if answer[0] == "action":
                    self._answered(session, time.perf_counter() - started)
            session.busy = False
            if late:
                await session.socket.close(1011, "the policy did not answer in time")
                return

    def _unpack(self, message: bytes) -> Any:
        return codec.unpack(message, self._bounds, self._decode_image)

    async def _apart(self, message: bytes, read: Callable[[], Any]) -> Any:
        """read(), in a thread where the message is large or has compressed pictures: other robots do not wait for it.
        A connection has one message under way, so no more than there are slots wait for a thread."""
        if len(message) <= SMALL and b"__image__" not in message:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    async def _envelope(self, message: bytes | str) -> tuple[str, dict, int]:
        if isinstance(message, str):
            raise ValueError("the message is text; expected a binary msgpack map.")
        content = await self._apart(message, lambda: self._unpack(message))
        if not isinstance(content, dict) or not {"type", "payload", "seq", "timestamp"} <= set(content):
            raise ValueError("expected a map with type, payload, seq and timestamp.")
        kind, payload, sequence = content["type"], content["payload"], content["seq"]
        if not isinstance(kind, str) or not isinstance(payload, dict) or type(sequence) is not int:
            raise ValueError("type must be text, payload a map and seq a whole number.")
        return kind, payload, sequence

    async def _vla_eval_answer(
        self, session: Session, kind: str, payload: dict, message: bytes
    ) -> tuple[str, dict] | None:
        if kind == "hello":
            session.benchmark = codec.brief(payload.get("benchmark", ""), 200)
            wanted = {"send_wrist_image": "wrist" in self._reader.cameras, "send_state": self._reader.state}
            hello = {"harness_version": "0.8.0", "protocol_version": 1, "model_server": self.name, "capabilities": {}}
            return "hello", {**hello, "observation_params": wanted}
        if kind in ("episode_start", "episode_end"):
            session.instruction, session.queued = None, []
            return None
        if kind != "observation":
            raise ValueError(f"type {kind[:40]!r} is none of hello, observation, episode_start, episode_end.")
        states = payload.get("states")
        if "calvin" in session.benchmark.lower() and isinstance(states, np.ndarray) and states.shape == (8,):
            payload = {**payload, "states": messages.calvin_state(states)}
        names = {"prompt": "task_description", "restart": "episode_restart"}
        instruction, restart = self._reader.begins(payload, **names)
        # Of an observation that the policy is not asked about nothing else is read.
        if restart or instruction != session.instruction or not session.queued:
            step = await self._apart(message, lambda: self._reader.read(payload, **names))
            actions, _, _ = await self._step(session, step)
            session.queued = list(messages.in_si_units(actions[: self._executed], self.robot))
        return "action", {"actions": session.queued.pop(0)}

    async def _step(self, session: Session, step: messages.Step) -> tuple[np.ndarray, dict[str, Any], float]:
        """Actions float32[C, A], what else the answer says of them, and the milliseconds of the model."""
        begins = step.restart or step.instruction != session.instruction
        # until it is answered there is no episode: a failed one must not go on as if nothing had happened
        session.instruction, session.queued = None, []
        started = time.perf_counter()
        answer = self._inference.submit(session.slot, step.observation, step.instruction if begins else None)
        try:
            chunk = await asyncio.wait_for(asyncio.wrap_future(answer), self.config.request_timeout_s)
        except TimeoutError:
            raise TimeoutError(f"the policy did not answer in {self.config.request_timeout_s:g} s.") from None
        infer_ms = (time.perf_counter() - started) * 1000
        actions, clipped = messages.within_bounds(chunk.actions, self.robot, self.horizon)
        beside = messages.confidence(chunk, self.robot, self.horizon)
        if clipped:
            self.metrics.add("clipped_actions_total")
            beside["clipped"] = clipped
        session.instruction = step.instruction
        return actions, beside, infer_ms

    def _failed(self, error: Exception) -> None:
        expected = isinstance(error, ValueError | RuntimeError | TimeoutError)
        kind = type(error).__name__ if expected else "internal"
        self.metrics.add("errors_total", label=kind)
        log.log(logging.INFO if expected else logging.ERROR, "refused: %s", str(error)[:300], exc_info=not expected)

    def _answered(self, session: Session, seconds: float) -> None:
        session.busy = False
        self.metrics.add("requests_total")
        self.metrics.observe("request_seconds", seconds)


async def serve(server: PolicyServer, ready: Callable[[], None] = lambda: None) -> None:
    """Runs until SIGTERM or SIGINT, then drains; a second signal ends the process at once."""
    import signal

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    await server.start()

    def on_signal(number: int) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    ready()
    await stop.wait()
    log.info("stopping: running requests are answered, new ones are not let in")
    await server.drain()
