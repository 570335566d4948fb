"""Read the parts of a checkpoint's step directory, verified by its seal. What is missing, damaged or another model's is
told in a few lines that name the file."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.training import seals

_JSON = "metadata"  # the file that Orbax writes JSON items to
_WHOLE = "Copy the whole step directory again, or name another step."


def read_serving(directory: pathlib.Path) -> dict[str, Any]:
    """The `serving` item of a step directory: "config", as `schema.to_dict` makes it, and "assets", name -> text.

    Raises FileNotFoundError, ValueError: there is none, it is damaged, or it lacks one of the two; names the file.
    """
    values, path = _read_json(directory, "serving"), directory / "serving" / _JSON
    for name, what in (("config", "the configuration"), ("assets", "the backbone's small files")):
        if not isinstance(values.get(name), dict):
            raise ValueError(
                f"{path} has no {name!r} ({what}; expected an object with 'config' and 'assets', found "
                f"{sorted(values)}). {_WHOLE}"
            )
    wrong = sorted(name for name, text in values["assets"].items() if not isinstance(text, str))
    if wrong:
        raise ValueError(f"{path}: assets {wrong} are no text. {_WHOLE}")
    return values


def read_position(directory: pathlib.Path) -> dict[str, Any]:
    """The `data` item of a step directory: "next_step" and "order", what determines the batches to come.

    Raises FileNotFoundError, ValueError that name the file.
    """
    values, path = _read_json(directory, "data"), directory / "data" / _JSON
    if not isinstance(values.get("order"), dict):
        raise ValueError(f"{path} has no 'order' (what determines the batches to come), so nothing can be resumed.")
    return values


def _read_json(directory: pathlib.Path, item: str) -> dict[str, Any]:
    path = directory / item / _JSON
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a checkpoint holds {', '.join(seals.ITEMS)}. {_WHOLE}")
    seals.verify(directory, item)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). {_WHOLE}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object. {_WHOLE}")
    return values


@contextlib.contextmanager
def reading(directory: pathlib.Path) -> Iterator[None]:
    """Orbax and TensorStore tell of a missing or damaged file on pages that do not name the checkpoint."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        reason = str(error).partition(" [")[0].strip().partition("\n")[0][:300]
        raise ValueError(
            f"{directory} cannot be read: {type(error).__name__}: {reason}\nIts files are incomplete or damaged (half "
            f"copied?). {_WHOLE}"
        ) from None


def read_params(directory: pathlib.Path, abstract: Any) -> Any:
    """The parameters of a step directory in the given jax.ShapeDtypeStruct tree (with shardings).

    Raises ValueError: another model's, or a file is missing or damaged; names it.
    """
    import orbax.checkpoint as ocp  # what only asks where checkpoints lie, --help before all, need not wait for it

    compare_shapes(directory, {path: tuple(x.shape) for path, x in flatten_dict(abstract, sep="/").items()})
    with reading(directory / "params"), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(directory / "params", args=ocp.args.StandardRestore(abstract))


def shapes(directory: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of a step directory, once their files are verified."""
    return {path: tuple(x.shape) for path, x in _metadata(directory).items()}


def read_some(directory: pathlib.Path, wanted: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Some parameters of a step directory, in the types and shardings of `wanted`; the others are not read.

    Raises ValueError: a file is missing or damaged; names it.
    """
    import orbax.checkpoint as ocp

    abstract = {
        path: jax.ShapeDtypeStruct(wanted[path].shape, wanted[path].dtype, sharding=wanted[path].sharding)
        if path in wanted
        else ocp.PLACEHOLDER
        for path in _metadata(directory)
    }
    arguments = {path: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype) for path, x in wanted.items()}
    nested = unflatten_dict(abstract, sep="/")
    restore_args = unflatten_dict({path: arguments.get(path, ocp.RestoreArgs()) for path in abstract}, sep="/")
    with reading(directory / "params"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(directory / "params", args=ocp.args.PyTreeRestore(item=nested, restore_args=restore_args))
    return {path: x for path, x in flatten_dict(tree, sep="/").items() if path in wanted}


def _metadata(directory: pathlib.Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    seals.verify(directory, "params")  # what is looked at first is read, too
    # The handler itself: asked through a Checkpointer, it warns that an item has no step metadata of its own.
    with reading(directory / "params"):
        handler = ocp.StandardCheckpointHandler()
        tree = handler.metadata(epath.Path(directory / "params"))
        handler.close()
        tree = getattr(tree, "item_metadata", tree)
        return flatten_dict(getattr(tree, "tree", tree), sep="/")


def compare_shapes(directory: pathlib.Path, expect: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError listing every parameter in which the checkpoint and `expect` differ."""
    found = shapes(directory)
    problems = [f"missing in the checkpoint: {path} {expect[path]}" for path in sorted(set(expect) - set(found))]
    problems += [f"unknown to this model: {path} {found[path]}" for path in sorted(set(found) - set(expect))]
    problems += [
        f"{path}: checkpoint {found[path]}, model {expect[path]}"
        for path in sorted(set(found) & set(expect))
        if found[path] != expect[path]
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(
            f"checkpoint {directory} holds another model:\n  {shown}\n"
            "Run with the backbone and policy settings in its config.json, or choose another train.output."
        )
