"""Where results of an evaluation are kept: under what they are results of, never under a path somebody typed.

    <root>/step_<step>-<fingerprint>/<name>-<hash>/results-000.jsonl, rollouts.md, films

The fingerprint is of the checkpoint's content, the hash of everything else that results depend on: picture sizes,
execution, protocol. Another checkpoint, another size or another protocol therefore never finds these results, and a run
that goes on leaves those of its earlier steps where they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from robovlms_jax import json_files
from robovlms_jax.evaluation import chains

logger = logging.getLogger(__name__)


def place(root: pathlib.Path, name: str, conditions: Mapping[str, Any]) -> pathlib.Path:
    """The directory below `root` for results under `conditions`, a name for the eye before their hash.

    Results that lie directly in `root` or a folder of it were filed by earlier versions and do not say which checkpoint
    they are of: they are named in the log, and stay.

    Args:
      conditions: JSON values, "checkpoint" among them: what results depend on.
    """
    target = _target(root, name, conditions)
    old = sorted({path.parent for pattern in ("", "*/") for path in root.glob(f"{pattern}results-*.jsonl")})
    if old and not target.is_dir():
        logger.warning(
            "results of an earlier version do not say which checkpoint they are of, and are left alone: %s; new ones "
            "go to %s",
            *(", ".join(str(path) for path in old), target),
        )
    return target


def choose(output: pathlib.Path, name: str, conditions: Mapping[str, Any]) -> pathlib.Path:
    """`output` itself, where it holds no results or some under the same `conditions`; else a place below it, and the
    log says what was found.

    Raises ValueError: a file of results there is damaged.
    """
    found = [setup for path in sorted(output.glob("results-*.jsonl")) if (setup := chains.read_setup(path)) is not None]
    differing = [text for setup in found if (text := json_files.differences(setup, conditions, conditions))]
    if not differing:
        return output
    target = _target(output, name, conditions)
    logger.warning(
        "%s has results of another setup (%s), which are left alone; new ones go to %s", output, differing[0], target
    )
    return target


def _target(root: pathlib.Path, name: str, conditions: Mapping[str, Any]) -> pathlib.Path:
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:8]
    return root / conditions["checkpoint"] / f"{name}-{digest}"
