"""Print what pip installs for `make test-oldest` or `make test-newest`, one requirement a line.

python tests/environments.py oldest     # every lower bound of setup.cfg as exactly that version
python tests/environments.py newest     # the same packages without a version, for `pip install --upgrade`

setup.cfg is the only list. Both print the packages and the extra `test` (with `train` in it) without torch and what
brings it: it is an oracle of gigabytes, and the tests that need it are skipped where it is missing.
"""

from __future__ import annotations

import configparser
import pathlib
import re
import sys
from typing import NamedTuple

SETUP = pathlib.Path(__file__).resolve().parents[1] / "setup.cfg"
LEFT_OUT = {"torch", "peft"}  # which brings torch


class Requirement(NamedTuple):
    """`name[extras]>=lowest` of setup.cfg; extras is "" or "[...]"."""

    name: str
    extras: str
    lowest: str


def read(path: pathlib.Path = SETUP) -> dict[str, list[Requirement]]:
    """Requirements per extra; "" are those of every installation. An extra that names another (robovlms_jax[train]) has
    its requirements, too.

    Raises:
      ValueError: a line is not of the form name>=version, so that there is no lower bound to try.
    """
    parser = configparser.ConfigParser()
    parser.read_string(path.read_text())
    texts = {"": parser["options"]["install_requires"], **parser["options.extras_require"]}
    lines = {extra: [line.strip() for line in text.split("\n") if line.strip()] for extra, text in texts.items()}

    def expand(extra: str) -> list[Requirement]:
        found: list[Requirement] = []
        for line in lines[extra]:
            other = re.fullmatch(r"robovlms_jax\[(\w+)\]", line)
            found += expand(other[1]) if other else [parse(line)]
        return found

    return {extra: expand(extra) for extra in lines}


def parse(line: str) -> Requirement:
    match = re.fullmatch(r"([\w.-]+)(\[[\w,-]+\])?\s*>=\s*([\w.]+)", line.strip())
    if match is None:
        raise ValueError(f"setup.cfg: {line.strip()!r} is not of the form name>=version.")
    return Requirement(match[1], match[2] or "", match[3])


def requirements(which: str) -> list[str]:
    """Lines for pip; `which` is "oldest" or "newest"."""
    if which not in ("oldest", "newest"):
        raise ValueError(f"{which!r} is neither oldest nor newest.")
    extras = read()
    chosen = [r for r in (*extras[""], *extras["test"]) if r.name not in LEFT_OUT]
    return [f"{r.name}{r.extras}=={r.lowest}" if which == "oldest" else f"{r.name}{r.extras}" for r in chosen]


if __name__ == "__main__":
    print(*requirements(sys.argv[1]), sep="\n")
