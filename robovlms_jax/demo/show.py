"""The demonstration put together: what is compiled before it, its threads, and what each command of the page does."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.control.execution import Execution
from robovlms_jax.control.interface import Policy
from robovlms_jax.demo import world as worlds
from robovlms_jax.demo.loop import SPEEDS, Camera, ControlLoop
from robovlms_jax.demo.sentences import Sentences
from robovlms_jax.demo.server import DemoServer
from robovlms_jax.demo.stage import SPEEDS_M_S, Stage
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.web.access import Access

log = logging.getLogger(__name__)

PAGE = pathlib.Path(__file__).with_name("page.html")


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """What is shown.

    about: of the policy, a sentence for the page. tasks: names of `tasks.TASKS` that it was trained on. image_sizes:
    camera -> px of what it sees. view_sizes: camera -> px of what people see. seed: of the scenes.
    """

    about: str
    tasks: Sequence[str]
    image_sizes: Mapping[str, int]
    view_sizes: Mapping[str, int]
    execution: Execution
    max_steps: int
    seed: int = 0

    @property
    def sentences(self) -> Sentences:
        return Sentences({name: tasks.TASKS[name].phrasings for name in self.tasks})


class Show:
    """A page that is there at once, and behind it, once it is compiled, the table."""

    def __init__(self, access: Access):
        page = PAGE.read_text(encoding="utf-8")
        self.server = DemoServer(access, page, self._command, self._left, self._want)
        self._control: ControlLoop | None = None
        self._camera: Camera | None = None

    def prepare(self, config: ShowConfig, load: Callable[[], Policy]) -> None:
        """Compiles everything, in two threads, and begins. Called beside the event loop; takes up to a minute.

        load: loads the policy.
        """
        work = [("the policy", lambda: _loaded(load(), config))]
        work += list(worlds.warm_up(config.image_sizes, config.view_sizes))
        self.server.prepare(f"Compiling: 0 of {len(work)}")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = {pool.submit(function): name for name, function in work}
            for count, done in enumerate(concurrent.futures.as_completed(running), start=1):
                log.info("ready: %s (%d of %d)", running[done], count, len(work))
                self.server.prepare(f"Compiling: {count} of {len(work)}")
                if running[done] == "the policy":
                    policy = done.result()
                done.result()
        stage = Stage(
            worlds.World(config.image_sizes),
            policy,
            config.sentences,
            worlds.starts(config.tasks, config.seed),
            execution=config.execution,
            max_steps=config.max_steps,
        )
        self._begin(stage, config)

    def _begin(self, stage: Stage, config: ShowConfig) -> None:
        self._control = ControlLoop(stage, lambda snapshot: self._camera.see(snapshot))
        self._camera = Camera(config.view_sizes, self.server.deliver, lambda: self._control.numbers)
        self._camera.start()
        self._control.start()
        self.server.open(
            {
                "about": config.about,
                "sentences": {name: list(texts) for name, texts in config.sentences.known.items()},
                "speeds": list(SPEEDS),
                "limits": list(SPEEDS_M_S),
                "per_metre": worlds.per_metre(),
                "rate_hz": worlds.World.rate_hz,
            }
        )
        self._want()

    def close(self) -> None:
        """Ends the threads; the server is stopped by whoever started it."""
        for part in (self._control, self._camera):
            if part is not None:
                part.stop()

    def _want(self) -> None:
        if self._camera is not None:
            self._camera.want()

    def _left(self) -> None:
        if self._control is not None:
            self._control.do(lambda stage: stage.hold("Who controlled the robot has left: it stands still."))

    def _command(self, kind: str, content: Mapping[str, Any], who: str) -> None:
        """One command of the page; raises ValueError for one that there is not."""
        if kind == "speed":
            self._control.set_speed(_number(content, "value"))
        elif kind == "limit":
            value = _number(content, "value")
            if value not in SPEEDS_M_S:
                raise ValueError(f"speed limit {value:g} m/s is none of {list(SPEEDS_M_S)}.")
            self._control.do(lambda stage: stage.limit_speed(value))
        elif kind == "instruct":
            text = content.get("text")
            self._control.do(lambda stage: stage.instruct(text))
        else:
            simple: dict[str, Callable[[Stage], Any]] = {
                "stop": lambda stage: stage.stop(who),
                "release": lambda stage: stage.release(who),
                "reset": lambda stage: stage.reset(),
                "next": lambda stage: stage.next_scene(),
            }
            if kind not in simple:
                raise ValueError(f"there is no command {kind[:40]!r}.")
            self._control.do(simple[kind])


def _number(content: Mapping[str, Any], name: str) -> float:
    value = content.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"{name}={str(value)[:40]!r}: expected a number.")
    return float(value)


def _loaded(policy: Policy, config: ShowConfig) -> Policy:
    """The policy, with its step compiled."""
    policy.reset(max((text for texts in config.sentences.known.values() for text in texts), key=len))
    policy.act(worlds.World(config.image_sizes).observe())
    return policy
