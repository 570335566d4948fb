"""The demonstration put together: what is compiled before it, and what each command of the page does."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robovlms_jax.control.execution import Execution
from robovlms_jax.control.interface import Policy
from robovlms_jax.demo import world as worlds
from robovlms_jax.demo.live import Live, number
from robovlms_jax.demo.sentences import Sentences
from robovlms_jax.demo.stage import SPEEDS_M_S, Stage
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.web import pages
from robovlms_jax.web.access import Access

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


class Show(Live):
    """The page of the demonstration."""

    def __init__(self, access: Access):
        super().__init__(access, pages.read(PAGE))

    def prepare(self, config: ShowConfig, load: Callable[[], Policy]) -> None:
        """Compiles everything, and begins. Called beside the event loop; takes up to a minute.

        load: loads the policy.
        """
        texts = [text for known in config.sentences.known.values() for text in known]
        work = [("the policy", lambda: warmed(load(), texts, config.image_sizes))]
        policy, *_ = self._compile([*work, *worlds.warm_up(config.image_sizes, config.view_sizes)])
        stage = Stage(
            worlds.World(config.image_sizes),
            policy,
            config.sentences,
            worlds.starts(config.tasks, config.seed),
            execution=config.execution,
            max_steps=config.max_steps,
        )
        self.show(stage, config)

    def show(self, stage: Stage, config: ShowConfig) -> None:
        """Time goes on from here."""
        hello = {
            "about": config.about,
            "sentences": {name: list(texts) for name, texts in config.sentences.known.items()},
            "limits": list(SPEEDS_M_S),
        }
        self._begin(stage, config.view_sizes, hello)

    def _left(self) -> None:
        if self._control is not None:
            self._control.do(lambda stage: stage.hold("Who controlled the robot has left: it stands still."))

    def _command(self, kind: str, content: Mapping[str, Any], who: str) -> None:
        """One command of the page; raises ValueError for one that there is not."""
        if kind == "speed":
            self._control.set_speed(number(content, "value"))
        elif kind == "limit":
            value = number(content, "value")
            if value not in SPEEDS_M_S:
                raise ValueError(f"speed limit {value:g} m/s is none of {list(SPEEDS_M_S)}.")
            self._control.do(lambda stage: stage.limit_speed(value))
        elif kind == "instruct":
            text = content.get("text")
            self._control.do(lambda stage: stage.instruct(text, who))
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


def warmed(policy: Policy, sentences: Sequence[str], image_sizes: Mapping[str, int]) -> Policy:
    """The policy, with its step compiled for the longest sentence. image_sizes: camera -> px of what it sees."""
    policy.reset(max(sentences, key=len))
    policy.act(worlds.World(image_sizes).observe())
    return policy
