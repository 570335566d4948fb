"""Checkpoints: parameters, optimizer, PRNG, step, data position and what serving needs, written asynchronously by
Orbax.

    <run>/checkpoints/<step>/params    nested parameters
                             train     optimizer state and PRNG; the parameters themselves where `params` are
                               their moving average
                             data      JSON: position in the data stream and its fingerprint, batches skipped
                             serving   JSON: full config and the backbone's small files (config.json, tokenizer,
                               preprocessing)
                             seal.json  bytes and checksum of every file (`seals`); written last, when all of them are
                               on the disk itself
    <run>/damaged/<step>     what a resumed run found incomplete
    <run>/best/<step>        the same of the step with the best score, where a run keeps scores; score.json beside it

A checkpoint directory alone is enough to serve; `items` reads its parts.
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
from etils import epath
from flax.traverse_util import flatten_dict

from robovlms_jax import atomic, hub
from robovlms_jax.parallel import distributed
from robovlms_jax.training import items, seals
from robovlms_jax.training.state import TrainState

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
BEST = "best"
DAMAGED = "damaged"
SHARED = (f"{FOLDER}/*", "README.md")
"""Patterns of the files of a policy on the hub (`runs.sharing`)."""

read_params = items.read_params


class UnwrittenError(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpointer:
    """Writes and restores the checkpoints of one run directory.

    keep: how many of the newest stay. always: steps whose checkpoints stay besides, such as the last ones of stages.
    """

    def __init__(self, run: str | pathlib.Path, *, keep: int, serving: Mapping[str, Any], always: Sequence[int] = ()):
        import orbax.checkpoint as ocp  # as in items.py
        from orbax.checkpoint import checkpoint_managers as policies

        self._serving = dict(serving)
        self._begun: int | None = None  # the step of the newest `save`
        self._failed = False
        folder = pathlib.Path(run).resolve() / FOLDER
        self._manager = ocp.CheckpointManager(
            folder,
            item_names=seals.ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), policies.CustomSteps(tuple(always))]
                ),
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
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step == self.latest:
            return
        self.wait()
        self._begun = step
        with self._written():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.served),
                    train=ocp.args.StandardSave(_train_item(state)),
                    data=ocp.args.JsonSave({**data, "skipped": int(state.skipped), "begun": int(state.begun)}),
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
            steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit() and seals.damage(path) is None]
            before = f"That of step {max(steps)} is complete: go on from there" if steps else "None is complete: begin"
            raise UnwrittenError(
                f"the checkpoint of step {self._begun} could not be written to {folder}: {reason}\n{before} with "
                f"{'--resume' if steps else 'another --out'} once there is room, or whatever else it "
                "lacked."
            ) from error

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest complete checkpoint in the shapes and shardings of `state`, and its data position. Newer ones that
        are not complete are moved to damaged/, out of the way of those to come.

        Args:
          state: arrays, or jax.ShapeDtypeStruct leaves with shardings (`state.abstract`).
        Raises:
          FileNotFoundError: no checkpoint is complete; says what is wrong with the newest.
          ValueError: the checkpoint's parameters differ from `state`'s; names what is missing, extra or differently
            shaped. Or a file is damaged; names it.
        """
        import orbax.checkpoint as ocp

        step = self._newest_complete()
        directory = pathlib.Path(self._manager.directory) / str(step)
        items.compare_shapes(
            directory, {path: tuple(x.shape) for path, x in flatten_dict(state.params, sep="/").items()}
        )
        seals.verify(directory, "train", "data")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        with items.reading(directory):
            out = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    train=ocp.args.StandardRestore(_train_item(abstract)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        flat = flatten_dict(out.params, sep="/")
        restored = state.replace(
            step=jax.device_put(jax.numpy.int32(step), state.step.sharding),
            skipped=jax.device_put(jax.numpy.int32(out.data.get("skipped", 0)), state.skipped.sharding),
            begun=jax.device_put(jax.numpy.int32(out.data.get("begun", 0)), state.begun.sharding),
            halted=jax.device_put(jax.numpy.bool_(False), state.halted.sharding),
            trainable=out.train.get("trainable") or {path: flat[path] for path in state.trainable},
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
        return state.serving(items.read_params(locate(self._manager.directory.parent), abstract))

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
        atomic.write_text(new.parent / "score.json", json.dumps({"step": step, "score": score}) + "\n")
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


def _train_item(state: TrainState) -> dict[str, Any]:
    item = {"opt_state": state.opt_state, "rng": state.rng}
    return item | {"trainable": state.trainable} if state.averages else item


def _seal_new(folder: pathlib.Path) -> None:
    """Seal what is about to become a step. On one process; all others have written their part by then."""
    if jax.process_index() == 0:
        for directory in folder.glob("*.orbax-checkpoint-tmp"):
            seals.seal(directory)


def _first_complete(steps: Sequence[pathlib.Path]) -> tuple[pathlib.Path | None, dict[pathlib.Path, str]]:
    """The first step directory that is whole, None if none is, and what is wrong with those before it."""
    damages = {}
    for step in steps:
        reason = seals.damage(step)
        if reason is None:
            return step, damages
        damages[step] = reason
    return None, damages


def best_score(directory: str | os.PathLike[str]) -> float:
    """The score of what a best/ folder holds; -inf when it holds nothing."""
    path = pathlib.Path(directory) / "score.json"
    try:
        record = json.loads(path.read_text())
        if (pathlib.Path(directory) / str(record["step"])).is_dir():
            return float(record["score"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s says nothing about the best checkpoint (%r); it is passed over", path, error)
    return -math.inf


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def locate(path: str | pathlib.Path, *, strict: bool = False) -> pathlib.Path:
    """A step directory for `path`: a run directory (its best checkpoint where it keeps one, else its newest complete
    one), its checkpoints folder (the newest complete one), or a step directory itself. hf://OWNER/NAME is downloaded.

    Damaged ones are named in the log and passed over; with `strict`, for what acts or is passed on, they are refused.

    Raises:
      FileNotFoundError: nothing there is a checkpoint, or a complete one; says what was looked for and what is there.
      ValueError: an empty path, which would be the working directory, or something that is no path; strict: damage.
    """
    if not isinstance(path, str | os.PathLike) or not str(path).strip():
        raise ValueError(
            f"checkpoint={path!r} names no path; pass a run directory or one of its {FOLDER}/<step> folders."
        )
    if hub.is_name(path):
        path = hub.snapshot(path, SHARED)
    given, path = path, pathlib.Path(path).expanduser().resolve()
    if not path.is_dir():
        raise FileNotFoundError(
            f"checkpoint {path} is not a directory ({'a file' if path.exists() else 'nothing is there'}); pass a run "
            f"directory, as a training run writes it (runs/PRESET unless --out says another), or one of its "
            f"{FOLDER}/<step> folders.{_beside(path) or hub.hint(given)}"
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
    if strict and damages and complete:
        raise ValueError(f"{'; '.join(damages.values())}. {complete} is whole, and another policy: name it to take it.")
    for step, reason in damages.items():
        instead = f"; {complete} is taken, another policy" if complete else ""
        logger.warning("checkpoint %s is passed over: %s%s", step, reason, instead)
    if complete is None:
        raise FileNotFoundError(
            f"no complete checkpoint in {path}: {'; '.join(damages.values())}. Name another run or step."
        )
    return complete


def _beside(path: pathlib.Path) -> str:
    """How a message goes on about a path where nothing is: the runs beside it, by name; "" where there are none."""
    parent = path.parent
    # `glob` passes over what may not be read, as in / of somebody who is not root.
    runs = sorted({x.parent.name for x in parent.glob(f"*/{FOLDER}/")})
    more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
    return f" Runs in {parent}: {', '.join(runs[:8])}{more}." if runs else ""


def run_of(directory: pathlib.Path) -> pathlib.Path:
    """The run that a step directory belongs to; a checkpoint that was copied alone is its own."""
    return directory.parent.parent if directory.parent.name in (FOLDER, BEST) else directory


def begun(run: pathlib.Path) -> bool:
    """Whether a run has a checkpoint to go on from. What a killed one was writing (<step>.orbax-checkpoint-tmp) is
    none."""
    folder = run / FOLDER
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def require_free(run: pathlib.Path, *, resume: bool) -> None:
    """A run never writes into another's checkpoints by accident, and never silently starts anew.

    Raises ValueError: there are checkpoints without `resume`, or none with it."""
    has = begun(run)
    if has and not resume:
        raise ValueError(
            f"{run} already holds checkpoints; pass --train.resume to go on with it or choose another --out."
        )
    if resume and not has:
        raise ValueError(
            f"nothing to resume: {run / FOLDER} holds no checkpoint; leave out --train.resume or correct --out."
        )


def resume_point(run: str | pathlib.Path) -> pathlib.Path:
    """The step directory that a run goes on from: its newest complete one.

    Raises FileNotFoundError: none is; says what is wrong with the newest.
    """
    folder = pathlib.Path(run).expanduser().resolve() / FOLDER
    steps = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name), reverse=True)
    found, damages = _first_complete(steps)
    if found is None:
        raise FileNotFoundError(f"no complete checkpoint in {folder}: {next(iter(damages.values()), 'none is')}.")
    return found


def write_policy(run: str | pathlib.Path, params: Any, serving: Mapping[str, Any]) -> pathlib.Path:
    """Write a checkpoint that can be served but not resumed, as step 0 of `run`; returns its directory.

    Raises FileExistsError when `run` holds checkpoints already.
    """
    import orbax.checkpoint as ocp

    folder = pathlib.Path(run).expanduser().resolve() / FOLDER
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds checkpoints already; choose another directory.")
    step = folder / "0"
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(step / "serving", dict(serving))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:  # last: `locate` looks for it
        writer.save(step / "params", args=ocp.args.StandardSave(params))
    seals.seal(step)
    return step
