"""Paths that name a repository on the Hugging Face hub: hf://OWNER/NAME, or hf://OWNER/NAME@REVISION (a branch, tag or
commit). Whoever writes one asks for the download; it goes to Hugging Face's own cache and happens once."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

PREFIX = "hf://"


def as_written(path: str | os.PathLike[str]) -> str:
    """A path's text. A name that went through pathlib, which makes one slash of two, has both again."""
    text, one = str(path), PREFIX.removesuffix("/")
    lost = isinstance(path, pathlib.PurePath) and text.startswith(one) and not text.startswith(PREFIX)
    return PREFIX + text.removeprefix(one) if lost else text


def is_name(path: object) -> bool:
    """Whether a path is one of these."""
    return isinstance(path, str | os.PathLike) and as_written(path).startswith(PREFIX)


def parse(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """(OWNER/NAME, revision). Raises ValueError where it names none."""
    path = as_written(path)
    repository, at, revision = path.removeprefix(PREFIX).partition("@")
    if repository.count("/") > 1 or (at and not revision):
        raise ValueError(
            f"{path} is no repository; expected {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION (a branch, tag or "
            "commit). A folder inside a repository is not read: download it, and pass its directory."
        )
    return repository, revision or None


def snapshot(path: str | os.PathLike[str], patterns: Sequence[str], target: str | None = None) -> pathlib.Path:
    """The directory that holds a repository's files of some patterns, downloaded where they are not there yet.

    Args:
      target: a directory for them instead of the cache.
    Raises:
      ValueError: no name of a repository. FileNotFoundError: it can neither be downloaded nor found in the cache.
    """
    import huggingface_hub

    repository, revision = parse(path)
    options = {} if target is None else {"local_dir": target}
    with errors(as_written(path)):
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), **options
        )
    return pathlib.Path(found)


@contextlib.contextmanager
def errors(
    path: object,
    doing: str = "download",
    instead: str = "Without network, copy it by other means and pass its directory.",
) -> Iterator[None]:
    """Errors of the hub's library as FileNotFoundError with what to do instead."""
    from huggingface_hub import errors as known

    # No network, repository or access; a bad name. HTTPError is the base of the HTTP library's errors, whichever of
    # httpx and httpx2 this version of the hub's library asks by; downloads come with OSError instead.
    try:
        yield
    except (OSError, known.HTTPError, known.HFValidationError) as error:
        raise FileNotFoundError(f"cannot {doing} {path}: {error}\n{instead}") from error


def hint(path: object) -> str:
    """How a message goes on about a path where nothing is, if it could be a repository's name; else nothing."""
    is_repository = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?", str(path))
    return f" Of the Hugging Face hub? Then write {PREFIX}{path}." if is_repository else ""
