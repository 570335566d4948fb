"""How a dataset is opened."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """How a dataset is opened.

    index_dir: where indexes go; "" = beside the data or in the user's cache.
    workers: processes that build an index.
    max_damaged_share: of the episodes, see `shard_index.build`.
    unlabelled_share: of the episodes without instruction that are kept; they are told `unlabelled_instruction`.
    success_only: leave out episodes that the dataset marks as failed.
    image_size: (height, width) that all images are scaled to; None keeps those of the dataset.
    """

    index_dir: str = ""
    workers: int = 1
    max_damaged_share: float = 0.01
    unlabelled_share: float = 0.0
    unlabelled_instruction: str = "interact with the objects"
    success_only: bool = True
    image_size: tuple[int, int] | None = None
