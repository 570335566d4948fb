"""How the 34 tasks are asked for: several phrasings to train on and others, never trained on, to validate with.

Our own wording, not CALVIN's: someone who evaluates on the real benchmark reads its fixed sentences from their own
checkout (`envs.calvin.adapter.validation_instructions`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

COLORS = ("red", "blue", "pink")
SIDES = ("right", "left")


@dataclasses.dataclass(frozen=True)
class Family:
    """Tasks that differ only in the words filled into `{slots}`, in the published order of tasks."""

    name: str
    category: str
    phrasings: tuple[str, ...]
    held_out: tuple[str, ...]
    members: tuple[Mapping[str, str], ...] = ({},)


_HANDS = {"right": "clockwise", "left": "counterclockwise"}
_WHERE = {
    "table": {"where": "table", "off": "off", "hold": "get hold of the {color} block on the table and bring it up"},
    "slider": {
        "where": "shelf behind the sliding door",
        "off": "out of",
        "hold": "reach into the shelf and fetch the {color} block",
    },
    "drawer": {"where": "drawer", "off": "out of", "hold": "reach into the drawer and fetch the {color} block"},
}
_LIGHTS = {
    "lightbulb": {
        "lamp": "yellow light bulb",
        "part": "lever",
        "on": "move the lever up",
        "off": "move the lever down",
    },
    "led": {"lamp": "green light", "part": "button", "on": "push the button", "off": "push the button"},
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "rotate_{color}_block_{side}",
        "move_block",
        (
            "rotate the {color} block to the {side}",
            "turn the {color} block {side}",
            "twist the {color} block {hands}",
            "spin the {color} block {hands} on the table",
            "grab the {color} block and turn it to the {side}",
            "give the {color} block a quarter turn {hands}",
        ),
        (
            "make the {color} block face further to the {side}",
            "revolve the {color} block {hands}",
            "swivel the {color} block {side}",
        ),
        tuple({"color": color, "side": side, "hands": _HANDS[side]} for color in COLORS for side in SIDES),
    ),
    Family(
        "push_{color}_block_{side}",
        "move_block",
        (
            "push the {color} block to the {side}",
            "slide the {color} block over to the {side}",
            "move the {color} block {side}",
            "shove the {color} block towards the {side}",
            "nudge the {color} block to the {side} across the table",
            "sweep the {color} block {side}",
        ),
        (
            "get the {color} block further to the {side}",
            "drive the {color} block {side}wards",
            "scoot the {color} block {side}",
        ),
        tuple({"color": color, "side": side} for color in COLORS for side in SIDES),
    ),
    Family(
        "move_slider_{side}",
        "slider",
        (
            "slide the door to the {side}",
            "move the sliding door {side}",
            "push the door all the way to the {side}",
            "grasp the door handle and slide it {side}",
            "shift the cabinet door to the {side}",
            "drag the sliding door towards the {side}",
        ),
        (
            "bring the door over to the {side}",
            "the sliding door should be on the {side}",
            "take the door handle {side}wards",
        ),
        ({"side": "left"}, {"side": "right"}),
    ),
    Family(
        "open_drawer",
        "drawer",
        (
            "open the drawer",
            "pull the drawer out",
            "pull on the drawer handle",
            "slide the drawer open",
            "grasp the handle and pull the drawer open",
            "pull out the drawer below the table",
        ),
        ("make the inside of the drawer reachable", "draw out the drawer", "the drawer should be open"),
    ),
    Family(
        "close_drawer",
        "drawer",
        (
            "close the drawer",
            "push the drawer in",
            "push the drawer shut",
            "slide the drawer closed",
            "shut the drawer below the table",
            "push on the drawer handle until it is closed",
        ),
        ("put the drawer back in", "make sure the drawer is shut", "the drawer should be closed"),
    ),
    Family(
        "lift_{color}_block_{place}",
        "lift_{place}",
        (
            "lift the {color} block {off} the {where}",
            "pick up the {color} block from the {where}",
            "take the {color} block {off} the {where}",
            "grab the {color} block from the {where} and raise it",
            "raise the {color} block {off} the {where}",
            "pick the {color} block {off} the {where}",
        ),
        ("hoist the {color} block {off} the {where}", "{hold}", "collect the {color} block from the {where}"),
        tuple(
            {"color": color, "place": place, **{key: text.format(color=color) for key, text in words.items()}}
            for color in COLORS
            for place, words in _WHERE.items()
        ),
    ),
    Family(
        "place_in_{place}",
        "place",
        (
            "place the block {where}",
            "put the block you are holding {where}",
            "put the block down {where}",
            "set the held block down {where}",
            "drop the block {where}",
            "leave the block {where}",
        ),
        ("deposit the block {where}", "stow what you are holding {where}", "lay the block down {where}"),
        (
            {"place": "slider", "where": "on the shelf behind the sliding door"},
            {"place": "drawer", "where": "in the drawer"},
        ),
    ),
    Family(
        "stack_block",
        "stack",
        (
            "stack the block on another block",
            "put the block you are holding on top of another block",
            "place the block onto the other block",
            "build a tower of two blocks",
            "set the held block down on another block",
            "stack the blocks",
        ),
        (
            "make a pile of two blocks",
            "balance the block on top of a second one",
            "let the block rest on the other block",
        ),
    ),
    Family(
        "unstack_block",
        "unstack",
        (
            "unstack the blocks",
            "take the upper block off the lower one",
            "take the tower of blocks apart",
            "remove the top block from the tower",
            "pull the block down from the other block",
            "push the upper block off the tower",
        ),
        ("undo the pile of blocks", "separate the two blocks on top of each other", "get the top block off the pile"),
    ),
    Family(
        "turn_{verb}_{light}",
        "lights",
        (
            "turn {verb} the {lamp}",
            "switch {verb} the {lamp}",
            "turn the {lamp} {verb} with the {part}",
            "{action} so that the {lamp} goes {verb}",
            "{action} to switch the {lamp} {verb}",
            "make the {lamp} go {verb}",
        ),
        ("I want the {lamp} {verb}", "use the {part} until the {lamp} is {verb}", "the {lamp} should be {verb}"),
        tuple(
            {"verb": verb, "light": light, "lamp": words["lamp"], "part": words["part"], "action": words[verb]}
            for light, words in _LIGHTS.items()
            for verb in ("on", "off")
        ),
    ),
    Family(
        "push_into_drawer",
        "push_into_drawer",
        (
            "push the block into the drawer",
            "push the block off the edge so that it drops into the drawer",
            "sweep the block into the open drawer",
            "shove the block from the table into the drawer",
            "make the block drop into the drawer",
            "move the block over the edge into the drawer without lifting it",
        ),
        (
            "knock the block into the drawer",
            "let the block tumble into the drawer",
            "get the block from the table to the drawer by pushing",
        ),
    ),
)
