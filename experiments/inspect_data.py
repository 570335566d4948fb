"""One page about a dataset before anything is trained on it: what it holds, and what looks wrong.

    python -m experiments.inspect_data --root data/calvin_sample
    python -m experiments.inspect_data --root data/oxe --dataset fractal20220817_data
    python -m experiments.inspect_data --root DIR --dataset mine.yaml --out report

The kind of dataset is seen from the directory. Findings are printed, problems first, and written to summary.md; the
page, dataset.html, opens from disk and needs nothing else. Numbers and pictures are a sample (--frames, --pictures).
What a training run would refuse is shown as it is in the files, where it can be read; the exit status is then 2.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from experiments import inspection_page, spreading
from robovlms_jax import atomic, cli, cores, ending
from robovlms_jax.data import base, calvin, findings, inspection, lerobot, libero_hdf5, packed, rlds, storage
from robovlms_jax.data.registry import mixtures
from robovlms_jax.evaluation.report import rerun_file
from robovlms_jax.parallel.config import RayConfig
from robovlms_jax.runs import logs
from robovlms_jax.training import directory as directories

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation")
Open = Callable[[str], base.Dataset]


@dataclasses.dataclass(frozen=True)
class Args:
    """Look at a dataset before training on it."""

    root: str
    """The dataset, or for RLDS the directory above it."""
    dataset: str = ""
    """calvin, lerobot, libero_hdf5, a dataset or mixture of the registry, or a YAML or JSON file (data/README.md).
    Empty: what the directory looks like."""
    out: str = ""
    """Where dataset.html and summary.md go. Empty: runs/inspect_NAME."""
    frames: int = 5000
    """Frames whose actions and state are read: whole episodes, spread over the dataset."""
    pictures: int = 300
    """Pictures of each camera that are decoded and compared."""
    episodes: int = 4
    """Episodes to look through on the page: pictures and numbers under one cursor."""
    rrd: str = ""
    """A file such as episodes.rrd: the same episodes for the Rerun viewer (`pip install -e '.[rerun]'`)."""
    conventions: str = ""
    """LeRobot: a file that says what the numbers mean, in place of <root>/meta/robovlms.json."""
    ray: RayConfig = RayConfig()
    """RLDS: workers that index the shards, on machines that see the same files."""
    index_dir: str = ""
    """RLDS: where the index goes. Empty: beside the data, or in the user's cache."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One dataset to look at.

    kind: its format and how it was recognised, for people.
    open: "training" or "validation" -> that split, as a training run opens it.
    lenient: what is tried in turn where that is refused.
    """

    name: str
    kind: str
    open: Open
    lenient: tuple[Open, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """notes: (level name, text) that the reader logged. refusal: why training would not take it, "" where it would."""

    source: Source
    inspection: inspection.Inspection
    findings: tuple[findings.Finding, ...]
    notes: tuple[tuple[str, str], ...]
    refusal: str


class Notes(logging.Handler):
    """Collects what readers log while it is attached (`with Notes() as notes`): what they guess, what they leave out.

    messages: (level name, text), each once, in order.
    """

    def __init__(self):
        super().__init__(logging.INFO)
        self.messages: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = (record.levelname, record.getMessage())
        if message not in self.messages:
            self.messages.append(message)

    def __enter__(self) -> Notes:
        self._logger = logging.getLogger("robovlms_jax.data")
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)


def sources(args: Args) -> list[Source]:
    """What is at `args.root`, from `args.dataset` or the directory. Raises ValueError saying what was looked for."""
    storage.require_no_file(args.root)
    root = storage.Directory(args.root)
    inside = root.names()
    if not inside:
        state = "is empty" if root.exists() else "does not exist"
        raise ValueError(f"--root {args.root} {state}; expected the directory of a dataset (data/README.md).")
    if args.dataset == "calvin":
        return [_calvin(args.root, "as --dataset says")]
    if args.dataset == "lerobot":
        return [_lerobot(args, "as --dataset says")]
    if args.dataset == "libero_hdf5":
        return [_libero(args.root, "as --dataset says")]
    if args.dataset:
        mixture = mixtures.resolve(args.dataset)
        alone = len(mixture.weights) == 1
        return [
            _rlds(args, name, mixture.datasets[name], alone=alone, reason=f"named by {args.dataset}")
            for name in mixture.weights
        ]
    if "info.json" in (root / "meta").names():
        return [_lerobot(args, "it has meta/info.json")]
    if root.name in SPLITS and _is_split(inside):
        raise ValueError(f"{args.root} is one split of a dataset; pass the directory above it.")
    named = _rlds_names(root, inside)
    _require_one_format(root, inside, named)
    if len(named) > 1:
        raise ValueError(
            f"{args.root} holds {len(named)} RLDS datasets: {', '.join(named)}; pass --dataset NAME, or a file that "
            "lists several."
        )
    if named:
        ((name, where),) = named.items()
        return [_rlds(args, name, _entry(name), alone=True, reason=f"{where}/features.json")]
    for split in SPLITS:
        if split in inside:
            return [_calvin(args.root, f"it has {split}/")]
    if any(any(pathlib.Path(args.root).glob(pattern)) for pattern in libero_hdf5.PATTERNS):
        return [_libero(args.root, "it has .hdf5 files")]
    shown = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
    raise ValueError(
        f"{args.root} is no dataset that can be read: looked for meta/info.json (LeRobot), features.json, "
        f"<version>/features.json and <name>/<version>/features.json (RLDS), training/ (CALVIN, packed), *.hdf5 "
        f"(LIBERO); it holds {shown}."
    )


def _is_split(inside: Sequence[str]) -> bool:
    """Whether these are the files of one of CALVIN's splits, packed or not."""
    return packed.META in inside or any(name.endswith(".npz") for name in inside)


def _require_one_format(root: storage.Directory, inside: Sequence[str], named: Collection[str]) -> None:
    """Raises ValueError where what lies in `root` is datasets of several formats, or several of one that has no way to
    name one of them; it lists them.

    Args:
      named: those of RLDS. Where none of them lies in `root`, that is one itself.
    """
    if any(split in inside for split in SPLITS) or not set(named) <= set(inside):
        return
    kinds: dict[str, list[str]] = {"rlds": [*named]} if named else {}
    for name in sorted({*inside} - {*named}):
        below = (root / name).names()
        if "meta" in below and "info.json" in (root / name / "meta").names():
            kinds.setdefault("lerobot", []).append(name)
        elif any(split in below and _is_split((root / name / split).names()) for split in SPLITS):
            kinds.setdefault("calvin", []).append(name)
        elif any(entry.endswith(".hdf5") for entry in below):
            kinds.setdefault("libero", []).append(name)  # its suites may be read together
    found = sorted(str(root / name) for names in kinds.values() for name in names)
    if len(kinds) > 1 or any(len(kinds.get(kind, ())) > 1 for kind in ("lerobot", "calvin")):
        raise ValueError(f"{root} holds {len(found)} datasets: {', '.join(found)}; pass one of these as --root.")


def _rlds_names(root: storage.Directory, inside: Sequence[str]) -> dict[str, storage.Directory]:
    """Name of each RLDS dataset at or just below `root` -> the directory of its features.json, the newest version's.

    Raises SeveralError where the only one has several configurations.
    """
    found: dict[str, storage.Directory] = {}
    several: rlds.SeveralError | None = None
    for directory in (root, *(root / name for name in inside)):
        try:
            # A directory below `root` is one dataset, perhaps with configurations; `root` may be that of several.
            where = rlds.find(str(directory), () if directory is root else (directory.name,))
        except rlds.SeveralError as error:
            several = error
            continue
        except rlds.NotFoundError:
            continue
        if directory is not root:
            found[directory.name] = where
            continue
        path = str(where) if where.is_remote else os.path.abspath(str(where))
        return {next(part for part in reversed(path.split("/")) if not re.fullmatch(r"[\d.]+", part)): where}
    if several and not found:
        raise several
    return found


def _entry(name: str) -> Any:
    """The registry's, or {} to infer one from common names."""
    try:
        mixture = mixtures.resolve(name)
    except ValueError:
        return {}
    return next(iter(mixture.datasets.values())) if len(mixture.datasets) == 1 else {}


def _rlds(args: Args, name: str, entry: Any, *, alone: bool, reason: str) -> Source:
    options = rlds.Options(index_dir=args.index_dir, workers=cores.usable())
    known = "fields inferred from common names" if isinstance(entry, Mapping) else "described by the registry"

    def open_split(split: str, options: rlds.Options = options) -> base.Dataset:
        return rlds.open_dataset(args.root, entry, split, name=name, options=options, alone=alone)

    def open_stored(split: str) -> base.Dataset:
        return rlds.StoredDataset(rlds.find(args.root, _directories(name, entry), alone=alone), split, options)

    lenient = functools.partial(open_split, options=dataclasses.replace(options, max_damaged_share=1.0))
    return Source(name, f"RLDS, {known} ({reason})", open_split, (lenient, open_stored))


def _directories(name: str, entry: Any) -> tuple[str, ...]:
    """Names that the dataset's directory may have."""
    others = entry.get("directories", ()) if isinstance(entry, Mapping) else entry.directories
    return (name, *((others,) if isinstance(others, str) else others))


def _lerobot(args: Args, reason: str) -> Source:
    def open_split(split: str, **options: float) -> base.Dataset:
        return lerobot.open_dataset(args.root, split, conventions=args.conventions, **options)

    stored = functools.partial(lerobot.StoredDataset, args.root)
    lenient = functools.partial(open_split, max_left_out_share=1.0), stored
    return Source(_name(args.root), f"LeRobotDataset ({reason})", open_split, lenient)


def _calvin(root: str, reason: str) -> Source:
    is_packed = (pathlib.Path(root) / "training" / packed.META).exists()
    kind = "packed" if is_packed else "CALVIN, one file per frame"
    return Source(_name(root), f"{kind} ({reason})", lambda split: calvin.open_dataset(root, split))


def _libero(root: str, reason: str) -> Source:
    return Source(_name(root), f"LIBERO's HDF5 files ({reason})", lambda split: libero_hdf5.LiberoDataset(root, split))


def _name(root: str) -> str:
    return pathlib.PurePath(os.path.abspath(root)).name


def look(source: Source, budget: inspection.Budget) -> Result:
    """Open and measure one dataset. Raises ValueError, OSError or ImportError when there is no training split."""
    with Notes() as notes:
        logger.info("%s: %s", source.name, source.kind)
        logger.info("opening training")
        training, opener, refusal = _open(source)
        opened = {"training": training}
        try:
            logger.info("opening validation")
            opened["validation"] = opener("validation")
        except (ValueError, OSError) as error:
            notes.messages.append(("WARNING", f"the validation split cannot be opened: {error}"))
        logger.info("reading a sample of %s", opened["training"].name)
        found = inspection.inspect(opened, budget)
    listed = findings.find(found, notes.messages, refusal)
    return Result(source, found, listed, tuple(notes.messages), refusal)


def _open(source: Source) -> tuple[base.Dataset, Open, str]:
    """(training split, what opened it, why a training run would not). Raises the first error where nothing opens it."""
    refused: Exception | None = None
    for opener in (source.open, *source.lenient):
        try:
            return opener("training"), opener, "" if refused is None else str(refused)
        except rlds.NotFoundError:
            raise
        except (ValueError, OSError) as error:
            refused = refused or error
    raise refused


_HEADINGS = {"problem": "Problems", "look": "Worth a look", "fine": "Fine"}


def summary(result: Result) -> str:
    """Markdown: findings first, then the facts in a few lines."""
    found = result.inspection
    lines = [f"# {result.source.name}", "", f"{result.source.kind}."]
    for level in findings.LEVELS:
        listed = [finding for finding in result.findings if finding.level == level]
        if listed:
            lines += ["", f"## {_HEADINGS[level]} ({len(listed)})", ""]
            lines += [f"- **{finding.topic}**: {' '.join(finding.message.split())}" for finding in listed]
    lines += ["", "## Facts", ""]
    lines += [f"- {name}: {value}" for name, value in inspection_page.facts(found).items()]
    return "\n".join(lines) + "\n"


def main(args: Args) -> tuple[pathlib.Path, list[str]]:
    """Write the page and the summary, and print the summary. Returns the page's path, and why training would refuse
    what is on it. Raises as `look` does."""
    budget = inspection.Budget(args.frames, args.pictures, args.episodes)
    rerun_file.check(args.rrd)
    listed = sources(args)
    results, missing = [], []
    for source in listed:
        try:
            results.append(look(source, budget))
        except rlds.NotFoundError as error:  # of a mixture the others can be looked at
            missing.append(str(error))
    if not results:
        raise ValueError("\n".join(missing))
    label = pathlib.PurePath(args.dataset).stem if args.dataset and len(listed) > 1 else listed[0].name
    directory = pathlib.Path(args.out or pathlib.Path("runs") / f"inspect_{label}")
    directories.require_writable(directory)
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / "dataset.html"
    atomic.write_text(page, inspection_page.render(label, results, missing))
    text = "\n".join([*(f"**Not found**: {message}\n" for message in missing), *map(summary, results)])
    atomic.write_text(directory / "summary.md", text)
    ending.show(text)
    if args.rrd:
        shown = [episode for result in results for episode in inspection_page.episodes(result)]
        ending.show(f"{rerun_file.write(args.rrd, label, shown)} opens in the Rerun viewer: rerun {args.rrd}")
    ending.show(
        f"{page} ({page.stat().st_size / 1e6:.1f} MB) opens in any browser; {directory / 'summary.md'} is this text."
    )
    return page, [f"training would refuse {r.source.name}: {r.refusal}" for r in results if r.refusal]


if __name__ == "__main__":
    logs.to_stderr()
    arguments = cli.read(Args, description=__doc__)
    try:
        with spreading.over_files(arguments.ray):
            _, refusals = main(arguments)
    except (ValueError, OSError, ImportError) as problem:
        refusals = [str(problem)]
    for refusal in refusals:
        print(f"error: {refusal}", file=sys.stderr)
    sys.exit(2 if refusals else 0)
