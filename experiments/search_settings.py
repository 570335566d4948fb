"""Whether the trials of `experiments.search` can run: every setting is looked at as its run would, before the first."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments import protocols
from robovlms_jax import bars, cli, schema
from robovlms_jax.data import notices, opening
from robovlms_jax.runs import measured, run
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.search import queue, space
from robovlms_jax.search.config import SearchConfig

logger = logging.getLogger(__name__)

CHECKED = 1_000
"""Settings of which every combination is looked at: each takes some ten milliseconds. Of more, every value is once."""
OWN = ("train.output", "out", "output", "train.seed", "train.resume")
"""What the search sets itself."""


def require(config: SearchConfig, devices: Callable[[], int | None]) -> None:
    """Every setting is one that its run takes, and measures what the search ranks by; of ranges, their ends.

    Args:
      devices: how many a trial has, asked once all else that is said of the search as a whole is right, for counting
        takes seconds; None: it is not known, and what depends on it is left to the trials.
    Raises:
      ValueError, OSError, ImportError: names the setting, and what its run would refuse.
    """
    queue.require_out(config.out)
    if config.direction == "minimize" and measured.is_better_higher(config.objective):
        raise ValueError(f"{config.objective} is the better the higher it is; pass --direction maximize.")
    start, fixed = protocols.preset(config.experiment, config.start, (), "search"), space.fixed(config.fixed)
    fields = space.read(config.space)
    if config.sampler == "grid":
        space.grid(fields)
    names = {field.name for field in fields}
    if names & set(fixed):
        raise ValueError(f"search.fixed and search.space both set {sorted(names & set(fixed))}; a field does one.")
    if own := set(OWN) & (names | set(fixed)):
        raise ValueError(
            f"{sorted(own)} are set by the search for every trial (search.out, search.seeds); leave them out."
        )
    opened: list[Any] = []
    known = devices()
    for setting, trial in configurations(start, fixed, fields):
        try:
            _require(config, trial, known, opened)
        except (ValueError, OSError, ImportError) as error:
            raise notices.about(_trial(setting), error) from None


def configurations(
    start: ExperimentConfig, fixed: space.Setting, fields: Sequence[space.Values | space.Range]
) -> Iterator[tuple[space.Setting, ExperimentConfig]]:
    """Every setting of the fields, and the configuration of its trial. Raises as `cli.read` does."""
    base, values = _known(start, fixed, fields)
    for setting in _settings(fields):
        parts = [values.get(item) for item in setting.items()]
        if base is None or None in parts:
            try:
                yield setting, cli.read(start, argv=space.flags(fixed | setting))
            except SystemExit:
                print(f"error: this is {_trial(setting)}", file=sys.stderr)
                raise
            continue
        plain = schema.to_dict(base)
        for name, (found,) in sorted(zip(setting, parts, strict=True), key=_depth):  # a part before its fields
            if name in cli.INSTEAD and cli.INSTEAD[name] not in fixed | setting:
                _put(plain, cli.INSTEAD[name], 0.0)
            _put(plain, name, copy.deepcopy(found))
        yield setting, schema.from_dict(type(base), plain)


def _trial(setting: space.Setting) -> str:
    return "a trial with " + ", ".join(f"{name}={value}" for name, value in setting.items())


def devices() -> int | None:
    """How many a trial would have on this machine, asked in a process of its own: whoever starts trials must hold none
    of them. None: they cannot be had now, or not in a minute."""
    words = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    little = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        with bars.waiting("counting the devices of a trial"):
            found = subprocess.run(words, env=little, capture_output=True, text=True, timeout=60, check=True)
        return int(found.stdout.split()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        logger.debug("how many devices there are is not known: %s", error)
        return None


def _require(search: SearchConfig, config: ExperimentConfig, devices: int | None, opened: list[Any]) -> None:
    """opened: settings of data that are known to open; it grows."""
    recorded = config.demonstrations.episodes or getattr(getattr(config, "recording", None), "episodes", 0)
    made_up = search.experiment == "lerobot" and not config.data.root
    config = getattr(config, "experiment", config)
    measured.require(search.objective, config, "search.objective")
    if search.prune and not measured.while_learning(search.objective, config):
        raise ValueError(
            f"search.prune ends runs by what {search.objective} is meanwhile, and it is written at their end alone; "
            "set train.eval_every (of rollouts, rollouts.every) below train.steps."
        )
    mesh = config.mesh
    fewest = math.prod(size for size in (mesh.data, mesh.fsdp, mesh.tensor) if size != -1)
    config.validate(devices or fewest)
    run.require_packages(config)
    read = (config.data.vl, config.policy.auxiliary.vl_weight)
    if read not in opened:
        run.require_collections(config)
        opened.append(read)
    plain = dataclasses.replace(config.data, augment=type(config.data.augment)())
    if not (recorded or made_up) and plain not in opened:
        opening.open_split(config.data, "training")
        opened.append(plain)


def _settings(fields: Sequence[space.Values | space.Range]) -> Iterator[space.Setting]:
    values = [field.values if isinstance(field, space.Values) else _ends(field) for field in fields]
    if math.prod(map(len, values)) <= CHECKED:
        rows: Any = itertools.product(*values)
    else:  # every value once, whatever stands beside it
        rows = ([some[min(row, len(some) - 1)] for some in values] for row in range(max(map(len, values))))
    for row in rows:
        yield dict(zip((field.name for field in fields), row, strict=True))


def _ends(field: space.Range) -> tuple[str, str]:
    return tuple(str(int(x)) if field.whole else repr(x) for x in (field.low, field.high))


def _known(
    start: ExperimentConfig, fixed: space.Setting, fields: Sequence[space.Values | space.Range]
) -> tuple[ExperimentConfig | None, dict[tuple[str, str], tuple[Any]]]:
    """The preset with what is fixed, None where that means nothing by itself; and of (field, text) the values that mean
    something beside it alone. A command line takes a hundred times as long to be read as fields to be put together."""
    base = _read(start, fixed)
    found: dict[tuple[str, str], tuple[Any]] = {}
    for field in fields if base is not None else ():
        for text in field.values if isinstance(field, space.Values) else _ends(field):
            alone = _read(start, fixed | {field.name: text})
            with contextlib.suppress(LookupError, TypeError, ValueError):  # another spelling of a flag
                if alone is not None:
                    found[field.name, text] = (_get(schema.to_dict(alone), field.name),)
    return base, found


def _read(start: ExperimentConfig, setting: space.Setting) -> ExperimentConfig | None:
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return cli.read(start, argv=space.flags(setting))
        except (SystemExit, ValueError):
            return None  # together with others it may do, or `configurations` says what is wrong


def _get(plain: Any, name: str) -> Any:
    for part in name.split("."):
        plain = plain[int(part) if isinstance(plain, list) else part]
    return plain


def _depth(item: tuple[str, Any]) -> int:
    return item[0].count(".")


def _put(plain: Any, name: str, value: Any) -> None:
    *above, last = name.split(".")
    inside = _get(plain, ".".join(above)) if above else plain
    inside[int(last) if isinstance(inside, list) else last] = value
