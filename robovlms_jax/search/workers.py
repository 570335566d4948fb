"""What a process of a search does: it takes trials from the queue until none is left."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import pathlib
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from robovlms_jax import ending, extras
from robovlms_jax.search import queue, space, trials
from robovlms_jax.search.config import SearchConfig

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

_SHARED = ("experiment", "start", "fixed", "space", "objective", "direction", "seeds", "sampler", "prune")
"""What all processes of a search must agree on."""


def work(config: SearchConfig) -> None:
    """Run trials until all have ended or are somebody else's.

    Raises:
      ValueError: the settings do not fit the search that is in `out` already; names what differs.
      ImportError: Optuna is needed and missing.
    """
    fields = space.read(config.space)
    out = pathlib.Path(config.out)
    queue.agree(out, "search.json", {name: getattr(config, name) for name in _SHARED})
    if config.sampler == "grid":
        _work_through(config, space.grid(fields))
    else:
        with _storage_is_named(config):
            _ask(config, fields)


def _work_through(config: SearchConfig, settings: list[space.Setting]) -> None:
    """All settings with all seeds, the seeds of a setting far apart: the first seed of each comes first. Once more for
    what others had begun and were stopped or died of, until all that is left is at work elsewhere."""
    out = pathlib.Path(config.out)
    pairs = itertools.product(range(config.seeds), settings)
    asked = [queue.Trial(number, setting, seed) for number, (seed, setting) in enumerate(pairs)]
    while True:
        asked = [_take(config, out, trial) if trial.status == "open" else trial for trial in asked]
        if not queue.left_behind(out, [trial.number for trial in asked if trial.status == "open"]):
            return


def _take(config: SearchConfig, out: pathlib.Path, trial: queue.Trial, look: trials.Look | None = None) -> queue.Trial:
    """Run a trial unless it has ended or another process runs it; as it is afterwards. KeyboardInterrupt when the run
    was stopped."""
    with queue.claimed(out, trial.number) as ours:
        if not ours:
            return trial
        path = queue.folder(out, trial.number) / "trial.json"
        if path.exists():
            trial = queue.read_one(path)
        if trial.status != "open":
            return trial
        queue.write(out, trial)
        logger.info("trial %d: %s, seed %d", trial.number, trial.setting, trial.seed)
        trial = trials.run(config, trial, look) if look else trials.run(config, trial)
        if trial.status == "open":
            raise ending.Terminated  # somebody ended the run itself
        said = trial.reason if trial.status == "failed" else f"{config.objective} {trial.value:.5g}"
        logger.info("trial %d: %s, %s (%.0f s)", trial.number, trial.status, said, trial.seconds)
        return trial


def _ask(config: SearchConfig, fields: list[space.Values | space.Range]) -> None:
    """Settings that Optuna proposes after what was seen so far."""
    study, out = _study(config), pathlib.Path(config.out)
    _finish_others(config, study, fields, out)
    while len(study.get_trials(deepcopy=False)) < config.trials:
        _finish(config, study, study.ask(), fields, out)
    while queue.left_behind(out, _finish_others(config, study, fields, out)):
        pass


def _finish_others(config: SearchConfig, study: optuna.Study, fields: list[Any], out: pathlib.Path) -> list[int]:
    """Go on with trials of processes that were stopped or died: each keeps its number. Returns those that a live
    process holds."""
    optuna, held = _optuna(), []
    for frozen in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        age = (datetime.datetime.now() - frozen.datetime_start).total_seconds()
        if len(frozen.params) < len(fields) and age < queue.SILENCE:
            continue  # somebody is choosing its values just now
        trial = optuna.trial.Trial(study, frozen._trial_id)
        held += [number for number in [_finish(config, study, trial, fields, out)] if number is not None]
    return held


def _finish(config: SearchConfig, study: optuna.Study, asked: Any, fields: list[Any], out: pathlib.Path) -> int | None:
    """Run a proposed setting with all seeds and tell the study. Returns the trial that somebody else holds, if so."""
    states = _optuna().trial.TrialState
    setting = {field.name: _suggest(asked, field) for field in fields}

    def look(step: int, value: float) -> bool:
        asked.report(value, step)
        return not (config.prune and asked.should_prune())

    values = []
    for seed in range(config.seeds):
        trial = queue.Trial(asked.number * config.seeds + seed, setting, seed)
        ended = _take(config, out, trial, look if config.seeds == 1 else None)
        if ended.status == "open":
            return trial.number
        if ended.status == "failed":
            study.tell(asked.number, state=states.FAIL, skip_if_finished=True)
            return None
        if ended.status == "pruned":
            study.tell(asked.number, state=states.PRUNED, skip_if_finished=True)
            return None
        values.append(ended.value)
    study.tell(asked.number, sum(values) / len(values), skip_if_finished=True)
    return None


def _suggest(trial: Any, field: space.Values | space.Range) -> str:
    if isinstance(field, space.Values):
        return trial.suggest_categorical(field.name, field.values)
    if field.whole:
        return str(trial.suggest_int(field.name, int(field.low), int(field.high)))
    return repr(trial.suggest_float(field.name, field.low, field.high, log=field.log))


@contextlib.contextmanager
def _storage_is_named(config: SearchConfig, *more: type[Exception]) -> Iterator[None]:
    """Raises ValueError that names the storage where it, or the database below it, fails; more: errors that mean this,
    too."""
    optuna = _optuna()
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.OptunaError, *more) as error:
        where = config.storage or pathlib.Path(config.out) / "optuna.log"
        raise ValueError(
            f"Optuna's storage {where} does not work: {queue.reason(str(error))} What has ended is kept in "
            f"{config.out}; mend the storage and start the command again, or name another one "
            "(--storage sqlite:///FILE.db, or none for a file of the search's own)."
        ) from error


def _study(config: SearchConfig) -> optuna.Study:
    """Raises ValueError that names the storage: it cannot be opened, or belongs to another search."""
    with _storage_is_named(config, ImportError, LookupError, ValueError):
        study = _opened(config)
    _require_ours(study, pathlib.Path(config.out), config.storage)
    return study


def _opened(config: SearchConfig) -> optuna.Study:
    optuna = _optuna()
    out = pathlib.Path(config.out)
    storage: Any = config.storage
    if not storage:
        from optuna.storages.journal import JournalFileBackend

        storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / "optuna.log")))
    samplers = {
        "random": optuna.samplers.RandomSampler,
        # Processes that search side by side shall not propose what others are trying.
        "tpe": lambda: optuna.samplers.TPESampler(constant_liar=True),
        "gp": optuna.samplers.GPSampler,
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=out.name,
        storage=storage,
        sampler=samplers[config.sampler](),
        pruner=optuna.pruners.SuccessiveHalvingPruner() if config.prune else optuna.pruners.NopPruner(),
        direction=config.direction,
        load_if_exists=True,
    )


def _require_ours(study: optuna.Study, out: pathlib.Path, storage: str) -> None:
    """Folders of one name, in different places, would answer for each other's trials in a storage that they share."""
    mark = out / "study.txt"
    new = out / f"study.{uuid.uuid4().hex}.tmp"
    new.write_text(uuid.uuid4().hex)
    with contextlib.suppress(FileExistsError):
        mark.hardlink_to(new)  # whole, and the first of several processes' alone
    new.unlink()
    ours = mark.read_text()
    theirs = study.user_attrs.get("search")
    if theirs is None:
        study.set_user_attr("search", ours)
    elif theirs != ours:
        raise ValueError(
            f"{storage} has a study {study.study_name!r} by a search in another folder than {out.resolve()}; give "
            "--out another last name, or this search a storage of its own."
        )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"a sampler other than grid is Optuna's: {extras.install('search')}") from error
    return optuna
