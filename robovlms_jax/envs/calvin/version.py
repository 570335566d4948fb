"""Which calvin_env results come from: its commit, and whether its button works.

github.com/mees/calvin names a version of calvin_env whose button does not know after a reset that its LED is on. Its
next press then switches the LED "on", so `turn_off_led` takes two presses instead of one. Commit 797142c mends it.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import logging
import pathlib
import subprocess
import types
from collections.abc import Mapping
from typing import Any
from unittest import mock

log = logging.getLogger(__name__)

BROKEN_BUTTON = "off after every reset, even where the LED is on"
SOUND_BUTTON = "as the LED after every reset"
UNKNOWN = "unknown"


def describe(root: pathlib.Path, env: Any) -> dict[str, str]:
    """Commit, button and PyBullet's version of a simulator built from the checkout `root`; "unknown" where in doubt."""
    try:
        version = importlib.metadata.version("pybullet")
    except importlib.metadata.PackageNotFoundError:
        version = UNKNOWN
    return {"calvin_env": commit(root), "button": button(env), "pybullet": version}


def warn(root: pathlib.Path, about: Mapping[str, str]) -> None:
    """Say what is wrong with the version that `about` (of `describe`) is about, once per checkout."""
    if about["button"] == BROKEN_BUTTON:
        _warn_of_button(root, about["calvin_env"])


def button(env: Any) -> str:
    """BROKEN_BUTTON, SOUND_BUTTON or UNKNOWN: tried on a copy of the button, which moves nothing."""
    try:
        trial = copy.copy(env.scene.buttons[0])
        trial.p, trial.light = mock.MagicMock(), types.SimpleNamespace(get_state=lambda: 1)
        trial.reset()
        return SOUND_BUTTON if trial.state.value == 1 else BROKEN_BUTTON
    except (AttributeError, IndexError, TypeError):  # not the classes of the versions that are known
        return UNKNOWN


def commit(root: pathlib.Path) -> str:
    """calvin_env's commit, and whether its files were changed since; UNKNOWN without git or outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]  # the checkout may be another user's
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root:  # a project around it has a commit too
            return UNKNOWN
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


@functools.cache  # once, however many simulators there are
def _warn_of_button(root: pathlib.Path, its_commit: str) -> None:
    log.warning(
        "calvin_env at %s (commit %s) resets its button to off even where the LED is on: turn_off_led, asked in 185 of "
        "the 1000 chains, then takes two presses instead of one. This is the version that github.com/mees/calvin "
        "names; the mended one is commit 797142c or later: git -C %s checkout main (docs/calvin.md). Results say which "
        "of the two they come from.",
        *(root, its_commit, root),
    )
