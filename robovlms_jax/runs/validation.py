"""Evaluation on the validation split, without a simulator: numbers for the logs, and what the report at the end of a
run compares."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from robovlms_jax.control.interface import Observation
from robovlms_jax.data import base, excerpts, language, loading, opening, represented, samples
from robovlms_jax.data.config import DataConfig
from robovlms_jax.evaluation import offline
from robovlms_jax.evaluation.report import films, player
from robovlms_jax.evaluation.report import offline as offline_report
from robovlms_jax.inputs.config import AugmentConfig
from robovlms_jax.parallel import cpu
from robovlms_jax.parallel import mesh as meshes
from robovlms_jax.policies import objective
from robovlms_jax.policies.serving import BatchedVLAPolicy, EncodeText
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import ahead
from robovlms_jax.runs.config import ExperimentConfig
from robovlms_jax.training import step
from robovlms_jax.training.state import TrainState
from robovlms_jax.types import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_PICTURES = 32
"""Of each camera and episode on the report's page."""


def open_split(config: DataConfig) -> base.Dataset | None:
    """The validation split; None, with a warning, where no episode of it is annotated: training does not need it.

    Raises as `opening.open_split` does for everything else."""
    try:
        return opening.open_split(config, "validation")
    except base.NotAnnotatedError as error:
        logger.warning(
            "training goes on without a validation split, which only offline evaluation and its part of the report "
            "need. To have them, add what is missing: %s",
            error,
        )
        return None


def sentences(split: base.Dataset | None) -> list[str]:
    """Every instruction of the split."""
    return [] if split is None else language.every(split.episodes, None)


def evaluator(
    model: VLA,
    mesh: Mesh,
    config: ExperimentConfig,
    source: samples.SegmentSource | None,
    encode: EncodeText,
    training: samples.SegmentSource | None = None,
) -> Evaluator | Unevaluated:
    """What evaluates on the split, if there is one; `training` is drawn in the report as it is changed, if given."""
    return Unevaluated() if source is None else Evaluator(model, mesh, config, source, encode, training)


class Unevaluated:
    """In place of an `Evaluator` where no validation episode is annotated: no numbers, and nothing to compare."""

    def prepare(self, beside: ahead.Beside, abstract: TrainState) -> None:
        """Nothing to compile."""

    def numbers(self, state: TrainState) -> dict[str, float]:
        """None."""
        return {}

    def compare(self, state: TrainState) -> tuple[dict[str, float], offline_report.Compared]:
        """As `Evaluator.compare`: no numbers, and a comparison of which the report says that there is none."""
        return {}, offline_report.Compared()


class Evaluator:
    """Holds what does not change between evaluations: the split and the compiled step."""

    def __init__(
        self,
        model: VLA,
        mesh: Mesh,
        config: ExperimentConfig,
        source: samples.SegmentSource,
        encode: EncodeText,
        training: samples.SegmentSource | None = None,
    ):
        self._model, self._mesh, self._config, self._source, self._encode = model, mesh, config, source, encode
        self._training = training
        self._step = step.make_eval_step(objective.RobotLoss(model).predict, mesh)
        self._robot, units = config.policy.predicted, source.dataset.action_units
        self._units = units if len(units) == len(self._robot.scaled) else offline.units_of(self._robot)
        self._policy: BatchedVLAPolicy | None = None
        self._ready: ahead.Wait = ahead.nothing

    def prepare(self, beside: ahead.Beside, abstract: TrainState) -> None:
        """Compile what evaluation needs, beside other work. abstract: shapes and shardings of states."""
        self._ready = beside.start("evaluation", lambda: self._compile(abstract))

    def _compile(self, abstract: TrainState) -> None:
        rows = self._source.evaluation_batch(np.full(self._config.segments_per_batch, samples.PADDING))
        self._step.lower(abstract, ahead.placed(rows, meshes.batched(self._mesh))).compile()
        self._augmented  # noqa: B018, the same whatever is learned
        if self._config.evaluation.episodes:
            params = ahead.placed(abstract.served, SingleDeviceSharding(self._mesh.local_devices[0]))
            policy = BatchedVLAPolicy(self._model, params, self._encode, slots=1)
            policy.reset([0], [self._source.dataset.episodes[0].instruction])
            pictures = represented.own(self._source.dataset).allocate(1, self._config.policy.cameras)
            policy.compile({camera: array.shape[1:3] for camera, array in pictures.items()})
            self._policy = policy

    def numbers(self, state: TrainState) -> dict[str, float]:
        """Losses, errors in metres and radians, gripper accuracy and F1, over evaluation.batches batches."""
        sums, losses = self._measure(state)
        return losses | self._named(sums)

    def _named(self, sums: offline.Sums) -> dict[str, float]:
        summary = offline.summarize(offline.over_chunk(sums), self._robot)
        return offline.scalars(summary) | offline.by_name(summary, self._robot)

    def compare(self, state: TrainState) -> tuple[dict[str, float], offline_report.Compared]:
        """The numbers, and what the report at the end of a run shows of the split. Every process has to call it."""
        sums, losses = self._measure(state)
        sensitivity, curves = self._language(state), self._curves(state)
        augmented = self._augmented if jax.process_index() == 0 else None
        found = offline_report.Compared(sums, sensitivity, curves, self._robot, augmented)
        return losses | self._named(sums), found

    def _measure(self, state: TrainState) -> tuple[offline.Sums, dict[str, float]]:
        self._ready()
        parts: list[offline.Sums] = []
        totals: dict[str, float] = {}
        for batch in self._batches(self._config.evaluation.batches):
            # The step's results are whole on every host, so every host sums the same numbers.
            predicted, recorded, mask, metrics = jax.device_get(self._step(state, meshes.put_batch(batch, self._mesh)))
            parts.append(offline.measure(predicted, recorded, mask, self._units, self._robot))
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        count = totals.pop("count")
        return offline.add(*parts), {name: value / max(count, 1.0) for name, value in totals.items()}

    def _language(self, state: TrainState) -> offline.Sensitivity | None:
        """The first batches again, each frame under the next other instruction of the split. None when there is only
        one."""
        episodes = self._source.dataset.episodes
        sentences = sorted({episode.instruction for episode in episodes})
        if len(sentences) < 2:
            return None
        following = dict(zip(sentences, sentences[1:] + sentences[:1], strict=True))
        texts = [self._encode(following[episode.instruction]) for episode in episodes]
        outcomes = []
        for batch in self._batches(min(self._config.evaluation.batches or 4, 4)):
            ids, mask = (np.stack([texts[episode][part] for episode in batch.episode]) for part in (0, 1))
            other = batch.replace(inputs=batch.inputs.replace(text_ids=ids, text_mask=mask))
            pair = [jax.device_get(self._step(state, meshes.put_batch(x, self._mesh))) for x in (batch, other)]
            outcomes.append((pair[0][0], pair[1][0], pair[0][2]))
        joined = (np.concatenate(x) for x in zip(*outcomes, strict=True))
        return offline.language_sensitivity(*joined, self._units, self._robot)

    def _curves(self, state: TrainState) -> list[offline_report.EpisodeCurves]:
        """The first action of every chunk along whole episodes, predicted frame by frame as a robot would be driven;
        by the first process, which writes them down."""
        count = self._config.evaluation.episodes
        episodes = self._source.dataset.episodes
        if count == 0:
            return []
        params = meshes.whole(state.served, self._mesh)
        if jax.process_index() != 0:
            return []
        policy = self._policy or BatchedVLAPolicy(self._model, params, self._encode, slots=1)
        policy.params, config = params, self._config.policy
        dataset, curves = represented.own(self._source.dataset), []
        units = self._units if dataset is self._source.dataset else offline.units_of(config.robot)
        for episode in episodes[:: math.ceil(len(episodes) / count)]:
            recorded = excerpts.episode_arrays(dataset, episode, config.cameras, self._source.sensors)
            states: Sequence[np.ndarray | None] = [None] * len(recorded.actions)
            if config.representation != "robot":
                states = list(dataset.proprio(np.arange(episode.start, episode.end)))
            policy.reset([0], [episode.instruction])
            seen = (_observation(recorded, t, state) for t, state in enumerate(states))
            predicted = np.stack([policy.act([observation], [0])[0].actions[0] for observation in seen])
            at = player.thinned(len(recorded.actions), _PICTURES)
            pictures = {camera: x[at] for camera, x in recorded.images.items()}
            curves.append(
                offline_report.EpisodeCurves(
                    episode.instruction, predicted, recorded.actions, units, config.robot, pictures, at
                )
            )
        return curves

    @functools.cached_property
    def _augmented(self) -> Image | None:
        """Samples as stored and as training changes them, with their sentences; None where it changes nothing."""
        data, cameras, source = self._config.data, self._config.policy.cameras, self._training
        changes = data.augment != AugmentConfig() or any(data.shifts.get(camera) for camera in cameras)
        if source is None or not (changes or data.vary_language):
            return None
        chosen = np.linspace(0, len(source) - 1, 5).astype(np.int64)
        draws = np.random.default_rng(self._config.train.seed).integers(2**32, size=len(chosen), dtype=np.uint32)
        batches = (source.evaluation_batch(chosen), source.training_batch(chosen, draws))
        stored, drawn = ({camera: x.inputs.images[camera][:, :1] for camera in cameras} for x in batches)
        spec = dataclasses.replace(self._model.vlm.image, mean=(0.0,) * 3, std=(1.0,) * 3)  # stays within 0 ... 1
        prepare = functools.partial(objective.prepare, spec=spec, cameras=cameras)
        changed = jax.jit(
            lambda x, key: prepare(x, key=key, shifts=data.shifts, augment=data.augment).images,
            compiler_options=cpu.options("run_once", cpu.default_platform()),
        )(batches[1].inputs.replace(images=drawn), jax.random.key(0))
        pairs = {camera: (stored[camera][:, 0], np.asarray(255 * changed[camera][:, 0])) for camera in cameras}
        said = list(zip(source.sentences(chosen), source.sentences(chosen, draws), strict=True))
        return films.draw_pairs({camera: (x, y.round().astype(np.uint8)) for camera, (x, y) in pairs.items()}, said)

    def _batches(self, num_batches: int) -> Iterator[Batch]:
        batches = loading.evaluation_batches(
            self._source,
            segments_per_batch=self._config.segments_per_batch,
            num_batches=num_batches,
            process=meshes.batch_share(self._mesh),
            num_threads=self._config.data.num_threads,
            prefetch=2,
        )
        try:
            yield from batches
        finally:
            batches.close()


def _observation(recorded: excerpts.EpisodeArrays, t: int, state: np.ndarray | None) -> Observation:
    """What a robot would have reported at step `t` of a recorded episode."""
    readings = {name: values[t] for name, (values, present) in recorded.sensors.items() if present[t]}
    images = {camera: x[t] for camera, x in recorded.images.items()}
    return Observation(images, state, executed=recorded.actions[max(t - 1, 0) : t], sensors=readings)
