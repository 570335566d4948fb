"""Answers that a policy learns from directly (method dpo): a person's, or a simulated one's of rollouts made here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pathlib
from typing import Any

import numpy as np

from robovlms_jax import schema
from robovlms_jax.labeling import answers
from robovlms_jax.rl import direct, progress, segments, starts
from robovlms_jax.rl import tables as playing
from robovlms_jax.rl.config import BehaviourConfig, ReinforceConfig
from robovlms_jax.schema import require
from robovlms_jax.training import checkpoints, seals

log = logging.getLogger(__name__)


def identity(labels: str) -> str:
    """Checksum of a folder of experiments.label: its rollouts and answers. Raises FileNotFoundError."""
    path = pathlib.Path(labels) / answers.FILE
    given = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "none"
    return f"{segments.identity(labels)}-{given}"


def resolved(config: ReinforceConfig) -> ReinforceConfig:
    """With the behaviour by which rollouts with a person's answers were made.

    Raises ValueError for rollouts that were made with another behaviour or pictures than are asked for, for answers
    that cannot be used, and for tasks that the simulated person does not know.
    """
    if config.update.method != "dpo":
        return config
    if not config.labels:
        path = pathlib.Path(config.out) / segments.FILE
        require(
            config.resume or not path.exists(),
            f"{path} is there: pass --resume to go on with the run that made it. Another program's would be learned "
            f"from as if each {config.group} were from one start: choose another --out, or, with a person's answers "
            "about them, pass --labels.",
        )
        unknown = sorted({*config.tasks} - {*progress.MOVES})
        require(
            not unknown,
            f"the simulated person knows tasks that move a mechanism by its handle ({', '.join(progress.MOVES)}), not "
            f"{unknown}; leave these out of --tasks, or ask a person (experiments.label, then --labels).",
        )
        return config
    path = segments.locate(config.labels)
    found = segments.load(path)
    require(
        found.decided is not None and found.made != "",
        f"{path} was written by a version that did not keep what was drawn, and by what behaviour; record rollouts and "
        "answer questions about them anew (experiments.label, another --out).",
    )
    behaviour, sizes, maker = _making(path, found)
    require(
        config.behaviour in (BehaviourConfig(), behaviour),
        f"{path} was made with behaviour {schema.to_dict(behaviour)}; leave --behaviour out, that one is taken.",
    )
    require(
        sizes == tuple(config.image_size),
        f"{path} was made by a policy that saw pictures of {list(sizes)} px, and reinforce.image_size is "
        f"{list(config.image_size)}; pass --image_size {' '.join(map(str, sizes))}.",
    )
    now = seals.identity(checkpoints.locate(config.checkpoint)).label
    if maker != now:
        log.warning(
            "%s are rollouts of another policy (%s) than the one that is improved (%s): it learns what it would "
            "rather have done in that one's place",
            *(path, maker, now),
        )
    pieces = _answered(config, found)
    _require_enough(pieces, _held_out(pieces, config), config)
    return dataclasses.replace(config, behaviour=behaviour)


def _making(path: pathlib.Path, found: segments.Rollouts) -> tuple[BehaviourConfig, tuple[int, ...], str]:
    """By what behaviour rollouts were made, of what pixels, and by which policy. Raises ValueError."""
    try:
        made = json.loads(found.made)
        behaviour = schema.from_dict(BehaviourConfig, made["behaviour"])
        return behaviour, tuple(made["image_size"]), made["checkpoint"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not say how its rollouts were made ({type(error).__name__}: {error}); record rollouts and "
            "answer questions about them anew (experiments.label, another --out)."
        ) from error


def require_readable(config: ReinforceConfig, learner: direct.DirectPreferences) -> None:
    """Raise ValueError for rollouts, with a person's answers, whose draws are not of this policy's kind."""
    if config.labels:
        direct.draws(segments.load(config.labels), learner.learner)


def compared(
    config: ReinforceConfig,
    output: pathlib.Path,
    learner: direct.DirectPreferences,
    encode: playing.EncodeText,
) -> direct.Comparisons:
    """What is learned from. Rollouts made here are kept in `output`, and read again when a stopped run goes on.

    Raises ValueError that says what is wrong with answers or rollouts.
    """
    sizes = tuple(zip(("static", "wrist"), config.image_size, strict=True))
    if config.labels:
        found = segments.load(config.labels)
        pieces = _answered(config, found)
    else:
        found = _made(config, output, learner, encode, sizes)
        pieces = _simulated(config, found)
    held_out = _held_out(pieces, config)
    _require_enough(pieces, held_out, config)
    log.info("%d answers to learn from, %d more are held out", (~held_out).sum(), held_out.sum())
    every = found.decided.every
    how = playing.Play(sizes, every, config.max_steps)
    known = learner.known(found, encode, how, min(config.tables, len(found)))
    steps = int(found.offsets[-1]) - len(found)
    return direct.Comparisons(pieces, known, found.decisions(every), every, steps, held_out)


def _held_out(pieces: direct.Pieces, config: ReinforceConfig) -> np.ndarray:
    """bool[N], pairs that measure and do not teach. Of rollouts made here, all pairs from some starts, so that no
    rollout is on both sides. A person's rollouts are joined by chains of pairs: none could be held out whole without
    giving up many answers: there, some of the answers that prefer one."""
    clear = np.flatnonzero(pieces.first_better != 0.5)
    unit = np.arange(len(pieces.first_better)) if config.labels else pieces.rollout[:, 0] // config.group
    units = np.random.default_rng([config.seed, 4]).permutation(np.unique(unit[clear]))
    return np.isin(unit, units[: config.held_out_of(len(units))])


def _require_enough(pieces: direct.Pieces, held_out: np.ndarray, config: ReinforceConfig) -> None:
    clear = pieces.first_better != 0.5
    require(
        clear.any(),
        f"{config.labels}: all of {len(pieces.first_better)} answers say that both are as good, from which nothing is "
        "learned; give some that prefer one (experiments.label)."
        if config.labels
        else f"the simulated person can tell no two rollouts from the same start apart, of which {config.pool} starts "
        f"have {config.group} each; begin another run (--out) with a larger --pool, --group or --behaviour.spread.",
    )
    count, teaching = config.update.minibatches * config.shards, ~held_out
    require(
        teaching.sum() >= count and clear[teaching].any(),
        f"{teaching.sum()} answers to learn from, of which {clear[teaching].sum()} prefer one, are too few for "
        f"update.minibatches={config.update.minibatches} over {config.shards} device(s) ({held_out.sum()} more are "
        "held out); give more answers, or lower these (--update.minibatches 1, --devices 1, --held_out 0).",
    )


def _answered(config: ReinforceConfig, found: segments.Rollouts) -> direct.Pieces:
    """A person's, about the tasks that are trained."""
    head, told = answers.of(config.labels, found, "leave --labels out for a simulated person's")
    about = [found.tasks[each.pair.left.rollout] for each in told]
    given = [each for each, task in zip(told, about, strict=True) if task in config.tasks]
    further, unknown = sorted({*about} - {*config.tasks}), sorted({*config.tasks} - {*about})
    require(
        len(given) > 0,
        f"{config.labels} has no answers about {', '.join(config.tasks)}, only about {', '.join(further)}; name these "
        "in --tasks, or answer questions about the others.",
    )
    if further:
        log.warning("%d answers teach nothing: %s is not among reinforce.tasks", len(told) - len(given), further)
    if unknown:
        log.warning("no answer is about %s, which are measured all the same", ", ".join(unknown))
    places = np.array([each.pair for each in given])  # [N, 2, (rollout, start)]
    better = np.array([answers.FIRST_BETTER[each.answer] for each in given], np.float32)
    return direct.Pieces(places[..., 0], places[..., 1], np.full(places.shape[:2], head["steps"]), better)


def _made(
    config: ReinforceConfig,
    output: pathlib.Path,
    learner: direct.DirectPreferences,
    encode: playing.EncodeText,
    sizes: tuple[tuple[str, int], ...],
) -> segments.Rollouts:
    """`group` rollouts from every start, made once."""
    path = output / segments.FILE
    if path.is_file():
        return segments.load(path)
    tables = config.tables_to_learn_on
    begins = starts.draw(config.tasks, tables, config.pool, config.seed, spread=config.start_spread)
    trials = [
        dataclasses.replace(trial, index=trial.index * config.group + turn)
        for trial in begins
        for turn in range(config.group)
    ]
    chunk = learner.model.config.chunk
    actions = min(config.horizon, chunk)
    how = segments.Trying(config.behaviour, min(config.tables, len(trials)), sizes, actions, config.max_steps)
    log.info("making %d rollouts from %d starts", len(trials), len(begins))
    found = segments.roll_out(learner.model, learner.policy(), encode, trials, how, config.seed)
    made = {name: schema.to_dict(config)[name] for name in ("behaviour", "image_size")}
    made["checkpoint"] = seals.identity(pathlib.Path(config.checkpoint)).label
    found = dataclasses.replace(found, made=json.dumps(made))
    found.save(path)
    log.info("%d of %d rollouts succeeded", found.success.sum(), len(found))
    return found


def _simulated(config: ReinforceConfig, found: segments.Rollouts) -> direct.Pieces:
    """A simulated person's: whole rollouts from the same start, those that it can tell apart, in an order by chance."""
    rng = np.random.default_rng([config.seed, 3])
    worth = progress.advance(found, [segments.Segment(number, 0) for number in range(len(found))], None)
    first, second = np.triu_indices(config.group, 1)
    begins = np.arange(0, len(found), config.group)[:, None]
    pairs = np.stack([(begins + first).ravel(), (begins + second).ravel()], axis=1)
    pairs = rng.permuted(pairs[rng.permutation(len(pairs))], axis=1)
    told = progress.answers(worth[pairs[:, 0]], worth[pairs[:, 1]], config.update.label_noise / 2, rng)
    clear = np.flatnonzero(told != 0.5)[: config.pairs]
    log.info("%d pairs of rollouts from the same start, %d told apart and asked about", len(pairs), len(clear))
    rollout, better = pairs[clear], told[clear]
    steps = np.diff(found.offsets)[rollout] - 1
    return direct.Pieces(rollout, np.zeros_like(rollout), steps, better)


def about(config: ReinforceConfig) -> dict[str, Any]:
    """What a stopped run must find unchanged, for its settings."""
    return {"labels_identity": identity(config.labels)} if config.labels else {}
