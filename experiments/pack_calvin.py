"""Pack CALVIN once for fast loading, or several recordings as one.

python -m experiments.pack_calvin --root task_D_D --out packed/task_D_D
python -m experiments.pack_calvin --root data/recorded_abc data/recorded_d --out data/recorded
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys

import numpy as np

from experiments import spreading
from robovlms_jax import cli, cores, ending
from robovlms_jax.data import base, calvin, joining, language, packed, packing
from robovlms_jax.parallel.config import RayConfig
from robovlms_jax.runs import logs

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Args:
    """Convert CALVIN from one npz per frame to the packed layout. May be stopped and repeated: finished parts stay."""

    root: tuple[pathlib.Path, ...]
    """CALVIN as published: the directory that holds `training` and `validation` (one of them is enough). Of several,
    packed ones among them, the frames are numbered anew, one recording behind the other."""
    out: pathlib.Path
    """Where the packed splits go; pass it as --data.root afterwards."""
    codec: packing.Codec = "jpeg"
    """jpeg: 4:4:4, visually lossless at quality 95. png: the exact pixels, twice the size, read as slowly as npz."""
    quality: int = 95
    """Of jpeg."""
    all_frames: bool = False
    """Also store the frames that no annotation covers; training does not read them."""
    annotation_folder: str = "lang_annotations"
    """Folder under each split with auto_lang_ann.npy."""
    sensors: tuple[str, ...] = ()
    """Further numeric arrays of one recording's frames to store, for policy.sensors: depth_static, depth_tactile, ...
    A depth picture of 200 x 200 pixels takes 160 kB."""
    ray: RayConfig = RayConfig()
    """Workers that share the shards, on machines that see the same files; `workers` then counts for nothing."""
    workers: int = cores.usable()
    """Processes."""
    skip_corrupt: bool = False
    """Leave out unreadable frames, and the episodes that use them, instead of refusing."""

    def __post_init__(self):
        if not self.root:
            raise ValueError("root is empty; name at least one recording.")
        twice = sorted({str(root) for root in self.root if self.root.count(root) > 1})
        if twice:
            raise ValueError(f"root names {', '.join(twice)} more than once; its frames would count so many times.")
        if self.sensors and len(self.root) > 1:
            raise ValueError(
                f"sensors={list(self.sensors)} are read from one recording; pack each of {list(map(str, self.root))} "
                "with them, and these as one without."
            )


def main(args: Args) -> None:
    """Pack every split found. Raises ValueError, OSError or RuntimeError with the way out (see `packing.pack`)."""
    for split, sources in _opened(args).items():
        source = sources[0] if len(args.root) == 1 else joining.Joined(sources)
        stored = source if not args.sensors else packing.WithSensors(source, args.sensors)
        spans = [(episode.start, episode.end) for episode in source.episodes]
        sidecars = {}
        if len(args.root) == 1:  # of several recordings there is no such file of all
            spans += source.sessions().tolist() if args.all_frames else []
            sidecars = {name: source.directory / name for name in calvin.SIDECARS if (source.directory / name).exists()}
        elif args.all_frames:
            spans.append((source.frame_ids[0], source.frame_ids[-1]))
        dataset = packing.pack(
            stored,
            args.out / split,
            frame_ids=base.frames_within(source.frame_ids, np.array(spans)),
            codec=args.codec,
            quality=args.quality,
            workers=args.workers,
            skip_corrupt=args.skip_corrupt,
            sidecars=sidecars,
        )
        size = sum(shard["size"] for shard in dataset.meta["shards"])
        logger.info(
            "%s: %d frames of %d episodes, %.1f kB per frame, %.2f GB; verified",
            args.out / split,
            len(dataset.frame_ids),
            len(dataset.episodes),
            size / len(dataset.frame_ids) / 1e3,
            size / 1e9,
        )
    language.join(args.root, args.out)


def _opened(args: Args) -> dict[str, list[joining.Split]]:
    """Split -> what each recording has of it. Raises ValueError."""
    opened: dict[str, list[joining.Split]] = {}
    for root in args.root:

        def open_one(split: calvin.Split, root: pathlib.Path = root) -> joining.Split:
            if len(args.root) > 1 and (root / split / packed.META).exists():
                return joining.PackedSplit(root / split)
            return calvin.open_npz(root, split, annotation_folder=args.annotation_folder)

        for split, source in calvin.open_splits(root, open_one).items():
            opened.setdefault(split, []).append(source)
    return opened


if __name__ == "__main__":
    logs.to_stderr()
    try:
        settings = cli.read(Args, description=__doc__)
        with spreading.over_files(settings.ray):
            main(settings)
    except KeyboardInterrupt:
        ending.stop("finished shards are kept, and the same command goes on with the others.")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
