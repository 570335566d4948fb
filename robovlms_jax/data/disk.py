"""Disks that are full or cannot be written, while a dataset is."""

from __future__ import annotations

import contextlib
import errno
import pathlib
import shutil
from collections.abc import Iterator


def require(directory: pathlib.Path, need: float) -> None:
    """Raise OSError when the disk of a directory has fewer bytes left."""
    free = shutil.disk_usage(directory).free
    if need > free:
        raise OSError(
            errno.ENOSPC, f"about {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free", str(directory)
        )


@contextlib.contextmanager
def explained(directory: pathlib.Path) -> Iterator[None]:
    """Say what an operating system error while packing means for the user."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free space and repeat the command; finished shards are kept"
        else:
            advice = "choose a directory that can be written"
        raise OSError(error.errno, f"packing into {directory} failed: {reason}; {advice}.") from error
