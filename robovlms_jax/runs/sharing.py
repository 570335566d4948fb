"""Policies on the Hugging Face hub: `push` with a card, `pull`, and `load_policy("hf://OWNER/NAME")`.

What is uploaded is what serving needs: parameters, configuration and the backbone's small files, calibration, the seal,
and the card. Optimizer, data position, logs and pictures stay. The configuration names paths of the machine that
trained. Who may write is decided by the hub's own login (`hf auth login`, or HF_TOKEN); nothing here reads a token.
"""

from __future__ import annotations

import difflib
import json
import logging
import pathlib
import re
from typing import Any

from robovlms_jax import atomic, hub
from robovlms_jax.runs import licences, model_card, saved
from robovlms_jax.training import checkpoints, seals

logger = logging.getLogger(__name__)

SERVED = ("params", "serving")
"""Parts of a step directory that a policy is opened from."""


def contents(step: pathlib.Path) -> dict[str, pathlib.Path | bytes]:
    """Path in the repository -> file, or its content: of a step directory what serving needs, under its step's number.

    The seal names these files alone, so that a downloaded checkpoint counts as complete; its identity is the same.
    """
    folder = f"{checkpoints.FOLDER}/{seals.identity(step).step}"
    files = [path for part in SERVED for path in sorted((step / part).rglob("*")) if path.is_file()]
    files += [path for path in [step / saved.CALIBRATION] if path.is_file()]
    found: dict[str, pathlib.Path | bytes] = {f"{folder}/{path.relative_to(step).as_posix()}": path for path in files}
    if (step / seals.SEAL).is_file():
        entries = json.loads((step / seals.SEAL).read_text())
        kept = {name: entry for name, entry in entries.items() if name.split("/")[0] in SERVED}
        found[f"{folder}/{seals.SEAL}"] = json.dumps(kept).encode()
    return found


def push(
    checkpoint: str, repository: str, words: model_card.Words, *, private: bool = True, api: Any | None = None
) -> str:
    """Upload a checkpoint in one commit, in place of the one that the repository held; returns its address.

    Args:
      checkpoint: a run directory or one of its step directories.
      repository: OWNER/NAME, made where there is none.
      api: a `huggingface_hub.HfApi`; None makes one.
    Raises:
      ValueError: a bad name or licence, a damaged checkpoint. FileNotFoundError: no checkpoint, or no access.
    """
    import huggingface_hub

    step, text = prepare(checkpoint, repository, words)
    files = contents(step) | {"README.md": text.encode()}
    api = huggingface_hub.HfApi() if api is None else api
    with hub.errors(repository, "upload to", "Try again with network, logged in (hf auth login)."):
        api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        before = [name for name in api.list_repo_files(repository) if name.startswith(f"{checkpoints.FOLDER}/")]
        operations = [huggingface_hub.CommitOperationDelete(name) for name in before if name not in files]
        operations += [
            huggingface_hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        api.create_commit(repository, operations, commit_message=f"{seals.identity(step).label} of robovlms_jax")
    return f"https://huggingface.co/{repository}"


def prepare(checkpoint: str, repository: str, words: model_card.Words) -> tuple[pathlib.Path, str]:
    """The step directory that `push` would upload, whole by its checksums, and the card. Raises as `push` does."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"repository={repository!r} is no OWNER/NAME.")
    if words.licence not in licences.KNOWN:
        near = difflib.get_close_matches(words.licence.lower(), licences.KNOWN, n=1)
        raise ValueError(
            f"licence={words.licence!r} is no identifier of the hub such as apache-2.0, mit, cc-by-4.0, gemma or "
            f"other{f'; did you mean {near[0]}?' if near else '.'} Which one is allowed depends on the "
            "backbone's weights and the data."
        )
    step = checkpoints.locate(checkpoint, strict=True)
    seals.verify(step, *SERVED)
    config, _ = saved.read_checkpoint(step)
    return step, model_card.card(step, config, repository, words)


def pull(name: str, out: str) -> pathlib.Path:
    """Download a policy into a directory of its own, which is then a run directory like others; returns it.

    Raises ValueError, FileNotFoundError: no name of a repository, nothing there, no access; or `out` is not empty.
    """
    target = pathlib.Path(out).expanduser().resolve()
    with atomic.becoming_folder(target) as folder:
        hub.snapshot(name if hub.is_name(name) else f"{hub.PREFIX}{name}", checkpoints.SHARED, str(folder))
        checkpoints.locate(folder)  # a repository that holds no policy leaves nothing behind
    return checkpoints.run_of(checkpoints.locate(target))
