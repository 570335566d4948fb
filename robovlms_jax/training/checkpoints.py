"""Checkpoints: parameters, optimizer, PRNG, step, data position and what serving needs, written asynchronously by
Orbax.

    <run>/checkpoints/<step>/params    nested parameters
                             train     optimizer state and PRNG
                             data      JSON: position in the data stream and its fingerprint, batches skipped
                             serving   JSON: full config and the backbone's small files (config.json, tokenizer,
                               preprocessing)
                             seal.json  bytes of every file; written last, when all of them are on the disk itself
    <run>/damaged/<step>     what a resumed run found incomplete
    <run>/best/<step>        the same of the step with the best score, where a run keeps scores; score.json beside it

A checkpoint directory alone is enough to serve.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from robovlms_jax.parallel import distributed
from robovlms_jax.training.state import TrainState

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
BEST = "best"
DAMAGED = "damaged"
SEAL = "seal.json"

_ITEMS = ("params", "train", "data", "serving")


class UnwrittenError(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpointer:
    """Writes and restores the checkpoints of one run directory."""

    def __init__(self, run: str | pathlib.Path, *, keep: int, serving: Mapping[str, Any]):
        self._serving = dict(serving)
        self._begun: int | None = None  # the step of the newest `save`
        self._failed = False
        folder = pathlib.Path(run).resolve() / FOLDER
        self._manager = ocp.CheckpointManager(
            folder,
            item_names=_ITEMS,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # of a run that was killed while it saved
                # Called by the thread that saves, when all is written and before the step gets its name.
                async_options=ocp.AsyncOptions(post_finalization_callback=lambda: _seal_new(folder)),
            ),
        )

    @property
    def latest(self) -> int | None:
        """Newest step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Start writing; returns once the arrays are copied from the device.

        Raises UnwrittenError, as all that follow here: this one, or the one before it, could not be written."""
        step = int(state.step)
        if step == self.latest:
            return
        self.wait()
        self._begun = step
        with self._written():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    train=ocp.args.StandardSave({"opt_state": state.opt_state, "rng": state.rng}),
                    data=ocp.args.JsonSave({**data, "skipped": int(state.skipped)}),
                    serving=ocp.args.JsonSave(self._serving),
                ),
            )

    def check(self) -> None:
        """Raise if what is being written beside the training has failed by now."""
        with self._written():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the disk's errors come as OSError, TensorStore's ValueError and others
            self._failed = True
            reason = str(error).partition(" [tensorstore_spec=")[0]
            folder = pathlib.Path(self._manager.directory)
            steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit() and damage(path) is None]
            before = f"That of step {max(steps)} is complete: go on from there" if steps else "None is complete: begin"
            raise UnwrittenError(
                f"the checkpoint of step {self._begun} could not be written to {folder}: {reason}\n{before} with "
                f"{'--train.resume' if steps else 'another --train.output'} once there is room, or whatever else it "
                "lacked."
            ) from error

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest complete checkpoint in the shapes and shardings of `state`, and its data position. Newer ones that
        are not complete are moved to damaged/, out of the way of those to come.

        Raises:
          FileNotFoundError: no checkpoint is complete; says what is wrong with the newest.
          ValueError: the checkpoint's parameters differ from `state`'s; names what is missing, extra or differently
            shaped.
        """
        step = self._newest_complete()
        expect = {path: tuple(x.shape) for path, x in flatten_dict(state.params, sep="/").items()}
        compare_shapes(self._manager.directory / str(step), expect)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        out = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                train=ocp.args.StandardRestore({"opt_state": abstract.opt_state, "rng": abstract.rng}),
                data=ocp.args.JsonRestore(),
            ),
        )
        flat = flatten_dict(out.params, sep="/")
        restored = state.replace(
            step=jax.device_put(jax.numpy.int32(step), state.step.sharding),
            skipped=jax.device_put(jax.numpy.int32(out.data.get("skipped", 0)), state.skipped.sharding),
            trainable={path: flat[path] for path in state.trainable},
            frozen={path: flat[path] for path in state.frozen},
            opt_state=out.train["opt_state"],
            rng=out.train["rng"],
        )
        return restored, out.data

    def _newest_complete(self) -> int:
        folder = pathlib.Path(self._manager.directory)
        newest, damages = None, {}
        if jax.process_index() == 0:  # others may see a shared file system a moment later
            newest, damages = _first_complete(
                [folder / str(step) for step in sorted(self._manager.all_steps(), reverse=True)]
            )
        found = int(distributed.from_first(float(newest.name if newest else -1)))
        if found < 0:
            raise FileNotFoundError(f"no complete checkpoint in {folder}: {next(iter(damages.values()), 'none is')}.")
        for step, reason in damages.items():
            logger.warning("checkpoint %s is set aside: %s", step.name, reason)
            aside = folder.parent / DAMAGED / step.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            step.rename(aside)
        distributed.barrier("damaged checkpoints set aside")
        self._manager.reload()
        return found

    def restore_best(self, state: TrainState) -> TrainState:
        """`state` with the parameters kept in best/."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
        flat = flatten_dict(read_params(locate(self._manager.directory.parent), abstract), sep="/")
        return state.replace(
            trainable={path: flat[path] for path in state.trainable},
            frozen={path: flat[path] for path in state.frozen},
        )

    def offer_best(self, state: TrainState, data: Mapping[str, Any], score: float) -> bool:
        """Keep this step in best/ if no earlier one scored higher (of equals the later). Returns whether it is kept.

        The files are shared with checkpoints/<step> as hard links where the file system has them, so keeping costs no
        space while both exist.
        """
        best = self._manager.directory.parent / BEST
        # Decided by one process, as where to resume: saving takes all of them, or none.
        if distributed.from_first(float(score < best_score(best))):
            return False
        self.save(state, data)
        self.wait()
        if jax.process_index() == 0:
            self._keep_best(best, int(state.step), score)
        distributed.barrier("best")  # before anybody looks for it
        return True

    def _keep_best(self, best: epath.Path, step: int, score: float) -> None:
        new = pathlib.Path(best) / f"{step}.tmp"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(self._manager.directory / str(step), new, copy_function=_link)
        old = [path for path in pathlib.Path(best).iterdir() if path.name.isdigit() and int(path.name) != step]
        shutil.rmtree(new.with_suffix(""), ignore_errors=True)
        new.rename(new.with_suffix(""))
        (new.parent / "score.json").write_text(json.dumps({"step": step, "score": score}) + "\n")
        for path in old:
            shutil.rmtree(path)

    def wait(self) -> None:
        """Block until everything started is on disk."""
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is being written. Raises UnwrittenError, unless it was raised before."""
        with contextlib.suppress(Exception) if self._failed else self._written():
            self._manager.close()


def _seal_new(folder: pathlib.Path) -> None:
    """Seal what is about to become a step. On one process; all others have written their part by then."""
    if jax.process_index() == 0:
        for directory in folder.glob("*.orbax-checkpoint-tmp"):
            seal(directory)


def seal(directory: pathlib.Path) -> None:
    """Bring every file of a step to the disk, then note their sizes: with a seal, a step survives a loss of power."""
    files = [path for item in _ITEMS for path in sorted((directory / item).rglob("*")) if path.is_file()]
    for path in files:
        _sync(path)
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    (directory / SEAL).write_text(json.dumps(sizes))
    _sync(directory / SEAL)
    _sync(directory)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(directory: pathlib.Path) -> str | None:
    """What is wrong with a step directory; None: it is complete, or it is from before there were seals."""
    try:
        sizes = json.loads((directory / SEAL).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{directory / SEAL} is cut off"
    for name, size in sizes.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{path} {'is missing' if found is None else f'has {found} bytes of {size}'}"
    return None


def _first_complete(steps: Sequence[pathlib.Path]) -> tuple[pathlib.Path | None, dict[pathlib.Path, str]]:
    """The first step directory that is whole, None if none is, and what is wrong with those before it."""
    damages = {}
    for step in steps:
        reason = damage(step)
        if reason is None:
            return step, damages
        damages[step] = reason
    return None, damages


def best_score(directory: str | os.PathLike[str]) -> float:
    """The score of what a best/ folder holds; -inf when it holds nothing."""
    with contextlib.suppress(FileNotFoundError):
        record = json.loads((pathlib.Path(directory) / "score.json").read_text())
        if (pathlib.Path(directory) / str(record["step"])).is_dir():
            return float(record["score"])
    return -math.inf


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def locate(path: str | pathlib.Path) -> pathlib.Path:
    """A step directory for `path`: a run directory (its best checkpoint where it keeps one, else its newest complete
    one), its checkpoints folder (the newest complete one), or a step directory itself.

    Damaged ones are named in the log and passed over.

    Raises:
      FileNotFoundError: nothing there is a checkpoint, or a complete one; says what was looked for and what is there.
    """
    path = pathlib.Path(path).expanduser().resolve()
    if not path.is_dir():
        raise FileNotFoundError(
            f"checkpoint {path} is not a directory; pass a run directory or one of its {FOLDER}/<step> folders."
        )
    if (path / "params").is_dir():
        steps = [path]
    else:
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        if best_score(path / BEST) > -math.inf:
            folder = path / BEST
        steps = [p for p in folder.iterdir() if p.name.isdigit() and (p / "params").is_dir()]
        steps.sort(key=lambda p: int(p.name), reverse=True)
    if not steps:
        found = sorted(p.name for p in path.iterdir())[:10]
        raise FileNotFoundError(
            f"no checkpoint in {path}: looked for {FOLDER}/<step>/params; found {found or 'an empty directory'}."
        )
    complete, damages = _first_complete(steps)
    for step, reason in damages.items():
        logger.warning("checkpoint %s is passed over: %s", step, reason)
    if complete is None:
        raise FileNotFoundError(
            f"no complete checkpoint in {path}: {'; '.join(damages.values())}. Name another run or step."
        )
    return complete


def write_policy(run: str | pathlib.Path, params: Any, serving: Mapping[str, Any]) -> pathlib.Path:
    """Write a checkpoint that can be served but not resumed, as step 0 of `run`; returns its directory.

    Raises FileExistsError when `run` holds checkpoints already.
    """
    folder = pathlib.Path(run).expanduser().resolve() / FOLDER
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds checkpoints already; choose another directory.")
    step = folder / "0"
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(step / "serving", dict(serving))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:  # last: `locate` looks for it
        writer.save(step / "params", args=ocp.args.StandardSave(params))
    return step


def read_serving(directory: pathlib.Path) -> dict[str, Any]:
    """The `serving` item of a step directory."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(directory / "serving")


def read_params(directory: pathlib.Path, abstract: Any) -> Any:
    """The parameters of a step directory in the given jax.ShapeDtypeStruct tree (with shardings)."""
    compare_shapes(directory, {path: tuple(x.shape) for path, x in flatten_dict(abstract, sep="/").items()})
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(directory / "params", args=ocp.args.StandardRestore(abstract))


def shapes(directory: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of a step directory."""
    return {path: tuple(x.shape) for path, x in _metadata(directory).items()}


def read_some(directory: pathlib.Path, wanted: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Some parameters of a step directory, in the types and shardings of `wanted`; the others are not read."""
    abstract = {
        path: jax.ShapeDtypeStruct(wanted[path].shape, wanted[path].dtype, sharding=wanted[path].sharding)
        if path in wanted
        else ocp.PLACEHOLDER
        for path in _metadata(directory)
    }
    arguments = {path: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype) for path, x in wanted.items()}
    nested = unflatten_dict(abstract, sep="/")
    restore_args = unflatten_dict({path: arguments.get(path, ocp.RestoreArgs()) for path in abstract}, sep="/")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(directory / "params", args=ocp.args.PyTreeRestore(item=nested, restore_args=restore_args))
    return {path: x for path, x in flatten_dict(tree, sep="/").items() if path in wanted}


def _metadata(directory: pathlib.Path) -> dict[str, Any]:
    # The handler itself: asked through a Checkpointer, it warns that an item has no step metadata of its own.
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


def differing_fields(saved: Any, current: Any, prefix: str = "") -> list[str]:
    """Dotted paths, with both values, at which two configuration dictionaries differ."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        return [
            line
            for name in sorted(set(saved) | set(current))
            for line in differing_fields(saved.get(name), current.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if saved == current else [f"{prefix}: checkpoint {saved!r}, now {current!r}"]
