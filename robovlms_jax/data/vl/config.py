"""Pictures with text about them, beside a robot's demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from robovlms_jax import schema
from robovlms_jax.schema import require


@dataclasses.dataclass(frozen=True)
@schema.checked("data.vl")
class VLConfig:
    """Sources of pictures with text about them, by names of one's own; train.sources and stages say their shares."""

    paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name -> *.json or *.jsonl (LLaVA's conversations, or COCO's captions), *.tar, a folder of them, or
    NAME-{000000..000099}.tar (WebDataset). Such as --data.vl.paths questions data/playtable_questions/train.jsonl."""
    validation: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name -> the same of questions that are kept for validation."""
    images: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name -> folder that the pictures' paths begin in; where it is not named, the file's own folder."""
    turns: Literal["conversation", "each"] = "conversation"
    """conversation: all turns in one sequence. each: every question by itself, with all pictures."""
    length: int = 0
    """Tokens of a conversation, its pictures' included, at most; 0: those of the longest."""
    leave_out_long: bool = False
    """Leave out what is longer than `length`, and say how many, instead of refusing it."""

    def __post_init__(self):
        require(self.length >= 0, f"data.vl.length={self.length} must be 0 (the longest) or positive.")
        require(
            not self.leave_out_long or self.length > 0, "data.vl.leave_out_long needs a data.vl.length to leave out by."
        )
        for field in ("validation", "images"):
            unknown = sorted(set(getattr(self, field)) - set(self.paths))
            require(not unknown, f"data.vl.{field} names {unknown}; data.vl.paths has {sorted(self.paths)}.")
        require("robot" not in self.paths, "data.vl.paths: `robot` is the name of the robot's own demonstrations.")
