"""Which of the weight files in a directory make up the model: the ones that transformers' `from_pretrained` opens."""

from __future__ import annotations

import functools
import logging
import pathlib
import re
from collections.abc import Iterable

from robovlms_jax import json_files

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
ORDER = (SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX)
"""As transformers looks for them: a single file goes before shards, safetensors before PyTorch."""

_WEIGHTS = re.compile(
    r".*\.(safetensors|safetensors\.index(\.\w+)?\.json|gguf|h5|msgpack)|pytorch_model.*\.bin(\.index\.json)?"
)
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_VARIANT = re.compile(r"(model|pytorch_model)\.([\w-]+)\.(safetensors|bin)")

logger = logging.getLogger(__name__)


def find(directory: pathlib.Path) -> pathlib.Path | None:
    """The weight file of a directory, or the index of its shards; None where it holds neither.

    Raises:
      FileNotFoundError: the file is a link to nothing, or config.json names another that is not there.
      ValueError: a LoRA adapter lies there, too, so that it is not clear which weights are meant.
    """
    present = [name for name in ORDER if _is_there(directory / name)]
    chosen = _named_by_config(directory) or (directory / present[0] if present else None)
    adapter = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (directory / name).is_file()]
    if adapter and (directory / "adapter_config.json").is_file():
        beside = f" beside {chosen.name}, which it changes" if chosen else ""
        raise ValueError(
            f"{directory} holds a LoRA adapter ({adapter[0]}){beside}. Merge it first (peft: "
            "merge_and_unload().save_pretrained(NEW_DIR)), or move the adapter's files to a folder of their own, which "
            "backbone.adapter may name."
        )
    return chosen


def tell_unread(chosen: pathlib.Path, files: Iterable[pathlib.Path]) -> None:
    """Log once which other weight files a directory holds; `files`: those that are read, besides `chosen`."""
    read = {chosen.name, *(file.name for file in files)}
    others = [name for name in weight_files(chosen.parent) if name not in read]
    if others:
        _say_once(
            f"{chosen.parent} holds several sets of weights: {chosen.name} is read, as transformers' from_pretrained "
            f"does; not read: {', '.join(others[:10])}{' ...' if len(others) > 10 else ''}."
        )


def weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor name -> name of its shard. Raises ValueError where a file is no such index."""
    values = json_files.read(index)
    found = values.get("weight_map") if isinstance(values, dict) else None
    is_map = isinstance(found, dict) and bool(found)
    wrong = [x for x in found.values() if not isinstance(x, str) or pathlib.PurePath(x).name != x] if is_map else []
    if not is_map or wrong:
        holds = f"names {wrong[0]!r}, which is no file beside it" if wrong else f"has weight_map={str(found)[:80]}"
        raise ValueError(
            f"{index} is no index of shards: it {holds}; expected tensor name -> shard's name. Download it again."
        )
    return found


def weight_files(directory: pathlib.Path) -> list[str]:
    """Names of all files that look like weights, whoever wrote them."""
    names = sorted(path.name for path in directory.iterdir())
    return [name for name in names if _WEIGHTS.fullmatch(name)]


def advice(directory: pathlib.Path) -> str:
    """What to do with a directory in which `find` finds nothing; names what is there instead."""
    files = weight_files(directory)
    if not files:
        return f"it holds {sorted(path.name for path in directory.iterdir())[:10]}."
    for name in files:
        if _SHARD.fullmatch(name):
            index = INDEX if name.endswith(".safetensors") else TORCH_INDEX
            return f"it holds shards such as {name} without their index; download {index}, too."
        variant = _VARIANT.fullmatch(name)
        if variant and not name.endswith("index.json"):
            return (
                f"it holds {files}. from_pretrained opens {name} only as variant={variant[2]!r}; to use it here, "
                f"rename it to {variant[1]}.{variant[3]}."
            )
    return f"it holds {files}, which are not in the layout that transformers' from_pretrained opens."


def _is_there(path: pathlib.Path) -> bool:
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which is missing; download it again.")
    return path.is_file()


def _named_by_config(directory: pathlib.Path) -> pathlib.Path | None:
    """The file that config.json names in `transformers_weights`, if it does."""
    config = directory / "config.json"
    values = json_files.read(config) if config.is_file() else {}
    name = values.get("transformers_weights") if isinstance(values, dict) else None
    if not name:
        return None
    if pathlib.PurePath(str(name)).name != name or not _is_there(directory / name):
        raise FileNotFoundError(f"{config} names transformers_weights={name!r}, which is no file beside it.")
    return directory / name


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
