"""The page on which a person takes over, put together: what is compiled before it, and what each command does."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from robovlms_jax.control.execution import Execution
from robovlms_jax.control.interface import Policy
from robovlms_jax.demo import show
from robovlms_jax.demo import world as worlds
from robovlms_jax.demo.live import Live, number
from robovlms_jax.teaching.keeping import Keeper
from robovlms_jax.teaching.lesson import Exercise, Lesson
from robovlms_jax.web import pages
from robovlms_jax.web.access import Access

PAGE = pathlib.Path(__file__).with_name("page.html")
_AXES = ("x", "y", "z", "turn")


@dataclasses.dataclass(frozen=True)
class TeachingConfig:
    """What is shown.

    about: of the policy, a sentence for the page. image_sizes: camera -> px of what it sees, and of what is recorded.
    view_sizes: camera -> px of what people see. max_steps: of the policy.
    """

    about: str
    image_sizes: Mapping[str, int]
    view_sizes: Mapping[str, int]
    execution: Execution
    max_steps: int


class Teaching(Live):
    """The page of a `lesson.Lesson`."""

    def __init__(self, access: Access):
        super().__init__(access, pages.read(PAGE))

    def prepare(
        self, config: TeachingConfig, load: Callable[[], Policy], exercises: Sequence[Exercise], keeper: Keeper
    ) -> None:
        """Compiles everything, and begins. Called beside the event loop; takes up to a minute.

        load: loads the policy. exercises: trials that have not ended yet.
        """
        sentences = [exercise.instruction for exercise in exercises] or [""]
        work: list[tuple[str, Callable[[], Any]]] = [
            ("the policy", lambda: show.warmed(load(), sentences, config.image_sizes)),
            ("recorded pictures", lambda: keeper.warm_up(worlds.World(config.image_sizes).frozen.state)),
        ]
        policy, *_ = self._compile([*work, *worlds.warm_up(config.image_sizes, config.view_sizes)])
        world = worlds.World(config.image_sizes)
        how = {"execution": config.execution, "max_steps": config.max_steps, "begun": keeper.kept}
        self.show(Lesson(world, policy, exercises, keeper.keep, **how), config)

    def show(self, lesson: Lesson, config: TeachingConfig) -> None:
        """Time goes on from here."""
        self._begin(lesson, config.view_sizes, {"about": config.about})

    def _left(self) -> None:
        if self._control is not None:
            self._control.do(lambda lesson: lesson.hold("Who controlled the robot has left: it stands still."))

    def _command(self, kind: str, content: Mapping[str, Any], who: str) -> None:
        if kind == "speed":
            self._control.set_speed(number(content, "value"))
        elif kind == "drive":
            drive = np.array([number(content, axis) for axis in _AXES])
            self._control.do(lambda lesson: lesson.drive(drive))
        elif kind == "grip":
            opens = number(content, "value") > 0
            self._control.do(lambda lesson: lesson.grip(opens))
        else:
            simple: dict[str, Callable[[Lesson], Any]] = {
                "begin": lambda lesson: lesson.begin(),
                "take": lambda lesson: lesson.take(),
                "again": lambda lesson: lesson.again(),
                "skip": lambda lesson: lesson.skip(),
                "stop": lambda lesson: lesson.hold(f"Stopped by {who}."),
            }
            if kind not in simple:
                raise ValueError(f"there is no command {kind[:40]!r}.")
            self._control.do(simple[kind])
