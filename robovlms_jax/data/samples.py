"""Segments of a dataset as training samples: what of it a policy reads, in arrays of fixed shapes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from robovlms_jax import types
from robovlms_jax.data import base, cutting, language, mirror, order, segments, sensors

logger = logging.getLogger(__name__)

EncodeText = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""Instruction -> (ids int32[T], mask bool[T], True = real token), the same T for every instruction."""

PADDING = -1
"""Segment number that stands for an empty row."""

_MAX_REPLACEMENTS = 16


class SegmentSource(Sequence[types.Batch]):
    """Segments of a dataset as training samples. Reads may come from many threads.

    `source[i]` is segment i without batch axis: images uint8[G, height, width, 3] per camera, raw actions, masks (see
    `types.Batch` and `segments.Segments`).

    Args:
      cameras: which to load.
      encode_text: called once per distinct sentence.
      sensors: what to read beside pictures and actions (see `data.sensors`).
      embed_sentence: instruction -> float32[E], for `Batch.sentence`; called once per distinct instruction.
      variation: other sentences that training draws from; None keeps to the recorded ones.
    Raises:
      ValueError: as `cutting.segments_of`; an unknown camera or sensor, or prompts of unequal length.
    """

    def __init__(
        self,
        dataset: base.Dataset,
        cut: cutting.Cut,
        *,
        cameras: Sequence[str],
        encode_text: EncodeText,
        sensors: Sequence[sensors.Readings] = (),
        embed_sentence: Callable[[str], np.ndarray] | None = None,
        variation: language.Variation | None = None,
        mirrored: mirror.Mirror | None = None,
    ):
        self.dataset = dataset
        self.cameras, self.sensors = tuple(cameras), tuple(sensors)
        self._future, self._goal_relabelling = cut.future_frames, cut.goal_relabelling
        self._ahead, self._moving = np.array(cut.ahead, np.int64), np.array(cut.moving, np.int64)
        self._scene = cut.scene
        self._moving_units = cutting.moving_units(dataset, cut)
        self._masks_images = dataset.may_lack_images
        self._reported: set[str] = set()
        self.segments = cutting.segments_of(dataset, cut)
        dataset.allocate(0, self.cameras)  # an unknown camera or sensor is an error now, not in the first batch
        for sensor in self.sensors:
            sensor.require(dataset)
        if cut.scene:
            cutting.require_scene(dataset, *cut.scene)
        self._mirror = mirrored
        sentences, self._text_rows = language.numbered(dataset.episodes, variation)
        self._sentences_content = language.content(sentences, variation)
        said = sentences if mirrored is None else [*sentences, *map(mirror.words, sentences)]
        self._text_ids, self._text_mask = _encode_all(said, encode_text)
        self._unmirrored, self._said = len(sentences), said
        self._group_ends = np.cumsum(self.segments.groups([g.num_episodes for g in dataset.groups])[0])
        self._sentences = None
        if embed_sentence is not None:
            known = {text: embed_sentence(text) for text in {episode.instruction for episode in dataset.episodes}}
            self._sentences = np.stack([known[episode.instruction] for episode in dataset.episodes])

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def num_windows(self) -> int:
        """Windows one epoch sees."""
        return self.segments.num_windows

    @property
    def num_sentences(self) -> int:
        """Distinct sentences that training may see."""
        return self._unmirrored

    def parts(self) -> list[order.Part]:
        """Segments of each dataset of a mixture; see `order.Source`. Raises ValueError: one has none."""
        groups = self.dataset.groups
        counts, windows = self.segments.groups([group.num_episodes for group in groups])
        for group, count in zip(groups, counts, strict=True):
            if count == 0:
                raise ValueError(
                    f"{self.dataset.name}: no episode of {group.name} is long enough for policy.window="
                    f"{self.segments.window}; leave it out of the mixture or shorten the window."
                )
        # Weights are of windows; segments are drawn, and those of short episodes carry fewer windows.
        return [
            order.Part(int(count), group.weight * count / own)
            for group, count, own in zip(groups, counts, windows, strict=True)
        ]

    def content(self) -> dict[str, Any]:
        """What, with the order, determines its batches, as JSON values; the same for either layout of a dataset."""
        episodes = self.dataset.episodes
        digest = hashlib.sha256(repr([(e.start, e.end, e.instruction, e.task) for e in episodes]).encode())
        more: dict[str, Any] = {}
        if self.dataset.groups:
            more["mixture"] = {group.name: [group.num_episodes, group.weight] for group in self.dataset.groups}
        if self.num_sentences != len({episode.instruction for episode in episodes}):
            more["sentences"] = self._sentences_content
        if self._mirror is not None:
            more["mirrored"] = self._mirror.share
        return {
            **more,
            **self.segments.content,
            "episodes": f"{len(episodes)} with sha256 {digest.hexdigest()[:16]}",
            "window": self.segments.window,
            "chunk": self.segments.chunk,
            "windows_per_segment": self.segments.windows_per_segment,
        }

    def describe(self, index: int) -> str:
        """An episode, by its number."""
        episode = self.dataset.episodes[index]
        return f"{self.dataset.name} episode {index} ({episode.task}, frames {episode.start} to {episode.end})"

    def __getitem__(self, index: int) -> types.Batch:
        """Segment `index`. Raises CorruptFrameError when one of its frames cannot be used."""
        out = self._allocate(1)
        self._fill(out, 0, np.array([index]))
        return jax.tree.map(lambda leaf: leaf[0], out)

    def training_batch(self, indices: np.ndarray, draws: np.ndarray) -> types.Batch:
        """Segments int[B] as one batch. One that cannot be read is replaced by another and reported in `corrupt`.

        The replacement depends on the segment alone, and is of the same dataset. Raises CorruptFrameError when 16
        replacements fail as well.

        Args:
          draws: uint32[B], random numbers that choose the sentences.
        """
        out = self._allocate(len(indices))
        try:
            self._fill(out, 0, indices, draws)
        except base.CorruptFrameError:
            for row, (index, draw) in enumerate(zip(indices.tolist(), draws, strict=True)):
                self._fill_or_replace(out, row, index, draw)
        return out

    def evaluation_batch(self, indices: np.ndarray) -> types.Batch:
        """Segments int[B] as one batch. One that cannot be read, and PADDING, becomes a row that masks exclude."""
        out = self._allocate(len(indices))
        if PADDING not in indices:
            with contextlib.suppress(base.CorruptFrameError):
                self._fill(out, 0, indices)
                return out
        for row, index in enumerate(indices.tolist()):
            if index == PADDING:
                self._blank(out, row)
                continue
            try:
                self._fill(out, row, np.array([index]))
            except base.CorruptFrameError as error:
                self._blank(out, row)
                out.corrupt[row] = self.segments.episodes_of([index])[0]
                self._report("left out of the evaluation", error)
        return out

    def _allocate(self, size: int) -> types.Batch:
        frames, steps = self.segments.num_frames, self.segments.num_frames + self.segments.chunk - 1
        images = self.dataset.allocate(size * frames, self.cameras)
        readings = {sensor.name: sensor.allocate(size, frames) for sensor in self.sensors}
        return types.Batch(
            inputs=types.Inputs(
                images={camera: array.reshape(size, frames, *array.shape[1:]) for camera, array in images.items()},
                text_ids=np.zeros((size, *self._text_ids.shape[1:]), np.int32),
                text_mask=np.zeros((size, *self._text_mask.shape[1:]), bool),
                step_mask=np.ones((size, frames), bool),
                image_mask=(
                    {camera: np.ones((size, frames), bool) for camera in self.cameras} if self._masks_images else None
                ),
                sensors={name: values for name, (values, _) in readings.items()},
                sensor_mask={name: mask for name, (_, mask) in readings.items() if mask is not None},
            ),
            actions=np.zeros((size, steps, len(self.dataset.robot.action)), np.float32),
            action_mask=np.zeros((size, steps), bool),
            window_mask=np.zeros((size, self.segments.windows_per_segment), bool),
            episode=np.zeros(size, np.int32),
            corrupt=np.full(size, -1, np.int32),
            future=self._future_frames(size),
            future_mask=np.zeros((size, self._future), bool) if self._future else None,
            sentence=None if self._sentences is None else np.zeros((size, self._sentences.shape[1]), np.float32),
            ahead=self._movements(size),
            scene=self._numbers(size),
        )

    def _numbers(self, size: int) -> np.ndarray | None:
        if self._scene is None:
            return None
        return np.zeros((size, self.segments.windows_per_segment, len(self._scene[1])), np.float32)

    def _movements(self, size: int) -> np.ndarray | None:
        shape = (size, self.segments.windows_per_segment, len(self._ahead), len(self._moving))
        return np.zeros(shape, np.float32) if len(self._ahead) else None

    def _future_frames(self, size: int) -> dict[str, np.ndarray] | None:
        if not self._future:
            return None
        images = self.dataset.allocate(size * self._future, self.cameras)
        return {camera: array.reshape(size, self._future, *array.shape[1:]) for camera, array in images.items()}

    def _fill(self, out: types.Batch, row: int, indices: np.ndarray, draws: np.ndarray | None = None) -> None:
        """Write segments int[n] into the rows from `row` on; `draws` makes training's random choices.

        Raises CorruptFrameError when a frame of any of them cannot be used.
        """
        segment = self.segments.take(indices)
        out = jax.tree.map(lambda array: array[row : row + len(indices)], out)
        out.actions[:] = _each_once(self.dataset.actions, segment.action_ids)
        self._fill_frames(out.inputs, segment)
        self._fill_extras(out, segment)
        text, turned = self._drawn(segment.episode, draws)
        if turned.any():
            self._turn(out, np.flatnonzero(turned))
        out.inputs.text_ids[:], out.inputs.text_mask[:] = self._text_ids[text], self._text_mask[text]
        out.inputs.step_mask[:] = segment.seen_mask
        out.action_mask[:] = segment.step_mask
        if self._goal_relabelling and draws is not None:
            self._end_at_goals(out, segment, draws)
        out.window_mask[:] = segment.window_mask
        out.episode[:] = segment.episode

    def _drawn(self, episodes: np.ndarray, draws: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows int[n] of the sentences of samples of these episodes, and which samples are mirrored."""
        choices = [self._text_rows[episode] for episode in episodes.tolist()]
        turned = np.zeros(len(choices), bool)
        if draws is None:
            return np.array([rows[0] for rows in choices]), turned
        text = np.array([rows[draw % len(rows)] for rows, draw in zip(choices, draws.tolist(), strict=True)])
        if self._mirror is not None:
            turned = self._mirror.chosen(draws)
        return text + self._unmirrored * turned, turned

    def sentences(self, indices: np.ndarray, draws: np.ndarray | None = None) -> list[str]:
        """What the samples int[n] are told: in training with these random numbers uint32[n], or in evaluation."""
        text, _ = self._drawn(self.segments.episodes_of(indices), draws)
        return [self._said[row] for row in text.tolist()]

    def _turn(self, out: types.Batch, rows: np.ndarray) -> None:
        """Mirror samples int[n] of a batch: pictures, actions and what is told of the robot."""
        for pictures in (*out.inputs.images.values(), *(out.future or {}).values()):
            pictures[rows] = pictures[rows, ..., ::-1, :]
        out.actions[rows] *= self._mirror.action
        for name, signs in (("proprio", self._mirror.state), ("action_history", self._mirror.action)):
            if name in out.inputs.sensors:
                out.inputs.sensors[name][rows] *= signs
        if out.ahead is not None:
            out.ahead[rows] *= self._mirror.state[self._moving]

    def _fill_frames(self, inputs: types.Inputs, segment: segments.Segment) -> None:
        """The images. Steps outside the episode repeat its first or last frame, read once."""
        ids = segment.step_ids[:, : self.segments.num_frames]
        step, first = np.arange(ids.shape[1]), np.argmax(segment.seen_mask, axis=1)[:, None]
        last = segment.num_frames[:, None] - 1
        rows, steps = np.nonzero((first <= step) & (step <= last))
        ids = ids[rows, steps]
        images = inputs.images
        places = list(zip(rows.tolist(), steps.tolist(), strict=True))
        self.dataset.images(
            ids, self.cameras, {camera: tuple(images[camera][place] for place in places) for camera in self.cameras}
        )
        filled = list(images.values())
        if inputs.image_mask is not None:
            for camera, mask in inputs.image_mask.items():
                filled.append(mask)
                mask[rows, steps] = self._has_images(ids, camera)
        rows, steps = np.nonzero((step < first) | (step > last))
        original = np.clip(steps, first[rows, 0], last[rows, 0])
        for array in filled:
            array[rows, steps] = array[rows, original]

    def _fill_extras(self, out: types.Batch, segment: segments.Segment) -> None:
        """What some policies see, or learn from, beyond a segment's own frames and actions."""
        start, end = (bound[:, None] for bound in self.segments.span(segment.episode))
        seen = np.argmax(segment.seen_mask, axis=1)  # steps before it are padding
        begin = (segment.step_ids[np.arange(len(seen)), seen] - seen)[:, None]
        for sensor in self.sensors:
            sensor.fill(*_arrays(out.inputs, sensor), self.dataset, sensors.Span(begin, start, end))
        if out.future is not None:
            ids = begin + self.segments.num_frames + np.arange(self._future)
            distinct, places = np.unique(np.minimum(ids, end), return_inverse=True)
            images = self.dataset.images(distinct, self.cameras)
            for camera, array in out.future.items():
                array[:] = images[camera][places.reshape(ids.shape)]
            out.future_mask[:] = ids <= end
        if out.sentence is not None:
            out.sentence[:] = self._sentences[segment.episode]
        if out.scene is None and out.ahead is None:
            return
        newest = begin + self.segments.window - 1 + np.arange(self.segments.windows_per_segment)
        if out.scene is not None:
            read = functools.partial(cutting.scene, self.dataset, *self._scene)
            out.scene[:] = _each_once(read, np.minimum(newest, end))
        if out.ahead is not None:
            ids = np.minimum(newest[..., None] + np.append(0, self._ahead), end[..., None])
            states = _each_once(self.dataset.proprio, ids)[..., self._moving]
            out.ahead[:] = (states[..., 1:, :] - states[..., :1, :]) * self._moving_units

    def _end_at_goals(self, out: types.Batch, segment: segments.Segment, draws: np.ndarray) -> None:
        """Mask what comes after a random step later than the newest frame, as if that were the goal."""
        newest = self.segments.window - 1
        _, end = self.segments.span(segment.episode)
        for row, draw in enumerate(draws.tolist()):
            later = int(end[row] - segment.step_ids[row, newest] - 1)
            if later > 0:
                goal = newest + 1 + int(np.random.default_rng(draw).integers(later))
                out.action_mask[row, goal + 1 :] = False

    def _has_images(self, frame_ids: np.ndarray, camera: str) -> np.ndarray:
        has = self.dataset.has_images(frame_ids, camera)
        if not has.all():
            self._report_once(f"{self.dataset.name}: some frames have no {camera} image; they are black and masked")
        return has

    def _fill_or_replace(self, out: types.Batch, row: int, index: int, draw: np.uint32) -> None:
        # Substitutes follow from the bad segment alone, so other rows and a resumed run do not notice.
        group = int(np.searchsorted(self._group_ends, index, side="right"))
        bounds = [0, *self._group_ends.tolist()] if len(self._group_ends) else [0, len(self)]
        low, high = bounds[group], bounds[group + 1]
        substitutes = np.random.default_rng(index).integers(low, high, size=_MAX_REPLACEMENTS).tolist()
        for candidate in [index, *substitutes]:
            try:
                return self._fill(out, row, np.array([candidate]), np.array([draw]))
            except base.CorruptFrameError as error:
                out.corrupt[row] = self.segments.episodes_of([index])[0]
                failure = error
                self._report("a segment was replaced by another", error)
        raise base.CorruptFrameError(
            f"{self.dataset.name}: {_MAX_REPLACEMENTS + 1} segments in a row cannot be read, the last one: {failure}"
        ) from failure

    def _report(self, consequence: str, error: base.CorruptFrameError) -> None:
        """Name each bad frame once, although segments that overlap and later epochs meet it again."""
        self._report_once(f"{consequence}: {error}")

    def _report_once(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            logger.warning("%s", message)

    def _blank(self, out: types.Batch, row: int) -> None:
        """A row that no mask counts; its prompt is a real one, so that no computation meets an empty sequence."""
        for array in out.inputs.images.values():
            array[row] = 0
        out.inputs.step_mask[row] = True
        for sensor in self.sensors:
            sensor.blank(*(None if array is None else array[row] for array in _arrays(out.inputs, sensor)))
        for array in (out.future or {}).values():
            array[row] = 0
        if out.sentence is not None:
            out.sentence[row] = self._sentences[0]
        for numbers in (out.ahead, out.scene):
            if numbers is not None:
                numbers[row] = 0
        out.actions[row] = 0
        out.inputs.text_ids[row], out.inputs.text_mask[row] = self._text_ids[0], self._text_mask[0]


def _arrays(inputs: types.Inputs, sensor: sensors.Readings) -> tuple[np.ndarray, np.ndarray | None]:
    """A sensor's values and mask."""
    return inputs.sensors[sensor.name], inputs.sensor_mask.get(sensor.name)


def _each_once(read: Callable[[np.ndarray], np.ndarray], ids: np.ndarray) -> np.ndarray:
    """`read(ids)` of ids int[...] that repeat, each read once; further axes are read's own."""
    distinct, places = np.unique(ids, return_inverse=True)
    return read(distinct)[places.reshape(ids.shape)]


def _encode_all(sentences: Sequence[str], encode_text: EncodeText) -> tuple[np.ndarray, np.ndarray]:
    """ids int32[sentences, T], mask bool[sentences, T]."""
    encoded = [encode_text(sentence) for sentence in sentences]
    lengths = {len(ids): sentence for sentence, (ids, _) in zip(sentences, encoded, strict=True)}
    if len(lengths) > 1:
        raise ValueError(f"encode_text must pad every prompt to one length; lengths and an example of each: {lengths}.")
    ids, masks = zip(*encoded, strict=True)
    return np.stack(ids).astype(np.int32), np.stack(masks).astype(bool)
