"""From a dataset to batches on the host: a Grain graph over segment numbers, each batch decoded into one buffer.

    numbers 0 ... N-1 -> shuffle -> repeat -> batch -> this process's part -> read, decode

Everything before the read works on integers, so shuffling is global and the data's position is the number of the step:
a run resumes by starting at that step, on any number of processes. Images stay uint8; what depends on the model happens
on the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from robovlms_jax import interface, types
from robovlms_jax.data import base, segments
from robovlms_jax.inputs import proprio as states

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
      window, chunk, windows_per_segment: W, C, K.
      cameras: which to load.
      encode_text: called once per distinct instruction.
      proprio: read the robot's state of every frame, too.
      past_actions: H, actions before each frame to read; 0: none.
      future_frames: F, frames after the segment's last one to read; 0: none.
      embed_sentence: instruction -> float32[E], for `Batch.sentence`; called once per distinct instruction.
    Raises:
      ValueError: no episode is long enough for one window, an unknown camera, or prompts of unequal length.
    """

    def __init__(
        self,
        dataset: base.Dataset,
        *,
        window: int,
        chunk: int,
        windows_per_segment: int,
        cameras: Sequence[str],
        encode_text: EncodeText,
        proprio: bool = False,
        past_actions: int = 0,
        future_frames: int = 0,
        embed_sentence: Callable[[str], np.ndarray] | None = None,
    ):
        self.dataset = dataset
        self.cameras = tuple(cameras)
        self._proprio, self._past, self._future = proprio, past_actions, future_frames
        self._reported: set[str] = set()
        spans = np.array([(episode.start, episode.end) for episode in dataset.episodes])
        self.segments = segments.Segments(spans, window=window, chunk=chunk, windows_per_segment=windows_per_segment)
        if len(self.segments) == 0:
            longest = max((episode.end - episode.start for episode in dataset.episodes), default=0)
            raise ValueError(
                f"{dataset.name}: none of {len(dataset.episodes)} episodes is long enough for policy.window={window}; "
                f"the longest has {longest} steps to learn from."
            )
        dataset.allocate(0, self.cameras)  # an unknown camera is an error now, not in the first batch
        self._text_ids, self._text_mask, self._text_row = _encode_all(dataset.episodes, encode_text)
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

    def __getitem__(self, index: int) -> types.Batch:
        """Segment `index`. Raises CorruptFrameError when one of its frames cannot be used."""
        out = self._allocate(1)
        self._fill(out, 0, index)
        return jax.tree.map(lambda leaf: leaf[0], out)

    def training_batch(self, indices: np.ndarray) -> types.Batch:
        """Segments int[B] as one batch. One that cannot be read is replaced by another and reported in `corrupt`.

        The replacement depends on the segment alone. Raises CorruptFrameError when 16 replacements fail as well.
        """
        out = self._allocate(len(indices))
        for row, index in enumerate(indices.tolist()):
            self._fill_or_replace(out, row, index)
        return out

    def evaluation_batch(self, indices: np.ndarray) -> types.Batch:
        """Segments int[B] as one batch. One that cannot be read, and PADDING, becomes a row that masks exclude."""
        out = self._allocate(len(indices))
        for row, index in enumerate(indices.tolist()):
            if index == PADDING:
                self._blank(out, row)
                continue
            try:
                self._fill(out, row, index)
            except base.CorruptFrameError as error:
                self._blank(out, row)
                out.corrupt[row] = self.segments.episode_of(index)
                self._report("left out of the evaluation", error)
        return out

    def _allocate(self, size: int) -> types.Batch:
        frames, steps = self.segments.num_frames, self.segments.num_frames + self.segments.chunk - 1
        images = self.dataset.allocate(size * frames, self.cameras)
        return types.Batch(
            inputs=types.Inputs(
                images={camera: array.reshape(size, frames, *array.shape[1:]) for camera, array in images.items()},
                text_ids=np.zeros((size, *self._text_ids.shape[1:]), np.int32),
                text_mask=np.zeros((size, *self._text_mask.shape[1:]), bool),
                step_mask=np.ones((size, frames), bool),  # windows never begin before their episode
                proprio=np.zeros((size, frames, states.DIM), np.float32) if self._proprio else None,
                past_actions=self._past_zeros(size),
            ),
            actions=np.zeros((size, steps, interface.ACTION_DIM), np.float32),
            action_mask=np.zeros((size, steps), bool),
            window_mask=np.zeros((size, self.segments.windows_per_segment), bool),
            episode=np.zeros(size, np.int32),
            corrupt=np.full(size, -1, np.int32),
            future=self._future_frames(size),
            future_mask=np.zeros((size, self._future), bool) if self._future else None,
            sentence=None if self._sentences is None else np.zeros((size, self._sentences.shape[1]), np.float32),
        )

    def _past_zeros(self, size: int) -> np.ndarray | None:
        steps = self._past + self.segments.num_frames - 1
        return np.zeros((size, steps, interface.ACTION_DIM), np.float32) if self._past else None

    def _future_frames(self, size: int) -> dict[str, np.ndarray] | None:
        if not self._future:
            return None
        images = self.dataset.allocate(size * self._future, self.cameras)
        return {camera: array.reshape(size, self._future, *array.shape[1:]) for camera, array in images.items()}

    def _fill(self, out: types.Batch, row: int, index: int) -> None:
        """Write one segment into one row. Raises CorruptFrameError."""
        segment = self.segments[index]
        distinct = np.unique(segment.step_ids)  # steps beyond the episode repeat its last frame: read it once
        out.actions[row, : len(distinct)] = self.dataset.actions(distinct)
        out.actions[row, len(distinct) :] = out.actions[row, len(distinct) - 1]
        seen = segment.num_frames
        images = {camera: array[row] for camera, array in out.inputs.images.items()}
        self.dataset.images(
            segment.step_ids[:seen], self.cameras, {camera: array[:seen] for camera, array in images.items()}
        )
        for array in images.values():
            array[seen:] = array[seen - 1]
        if out.inputs.proprio is not None:
            out.inputs.proprio[row, :seen] = self.dataset.proprio(segment.step_ids[:seen])
            out.inputs.proprio[row, seen:] = out.inputs.proprio[row, seen - 1]
        self._fill_extras(out, row, segment)
        out.inputs.text_ids[row] = self._text_ids[self._text_row[segment.episode]]
        out.inputs.text_mask[row] = self._text_mask[self._text_row[segment.episode]]
        out.action_mask[row] = segment.step_mask
        out.window_mask[row] = segment.window_mask
        out.episode[row] = segment.episode

    def _fill_extras(self, out: types.Batch, row: int, segment: segments.Segment) -> None:
        """What some policies see, or learn from, beyond a segment's own frames and actions."""
        episode = self.dataset.episodes[segment.episode]
        begin = int(segment.step_ids[0])
        if out.inputs.past_actions is not None:
            ids = begin - self._past + np.arange(out.inputs.past_actions.shape[1])
            known = np.clip(ids, episode.start, episode.end)
            distinct, places = np.unique(known, return_inverse=True)
            past = self.dataset.actions(distinct)[places]
            out.inputs.past_actions[row] = np.where((ids >= episode.start)[:, None], past, 0)
        if out.future is not None:
            ids = begin + self.segments.num_frames + np.arange(self._future)
            distinct, places = np.unique(np.minimum(ids, episode.end), return_inverse=True)
            images = self.dataset.images(distinct, self.cameras)
            for camera, array in out.future.items():
                array[row] = images[camera][places]
            out.future_mask[row] = ids <= episode.end
        if out.sentence is not None:
            out.sentence[row] = self._sentences[segment.episode]

    def _fill_or_replace(self, out: types.Batch, row: int, index: int) -> None:
        # Substitutes follow from the bad segment alone, so other rows and a resumed run do not notice.
        substitutes = np.random.default_rng(index).integers(len(self), size=_MAX_REPLACEMENTS).tolist()
        for candidate in [index, *substitutes]:
            try:
                return self._fill(out, row, candidate)
            except base.CorruptFrameError as error:
                out.corrupt[row] = self.segments.episode_of(index)
                failure = error
                self._report("a segment was replaced by another", error)
        raise base.CorruptFrameError(
            f"{self.dataset.name}: {_MAX_REPLACEMENTS + 1} segments in a row cannot be read, the last one: {failure}"
        ) from failure

    def _report(self, consequence: str, error: base.CorruptFrameError) -> None:
        """Name each bad frame once, although segments that overlap and later epochs meet it again."""
        message = f"{consequence}: {error}"
        if message not in self._reported:
            self._reported.add(message)
            logger.warning("%s", message)

    def _blank(self, out: types.Batch, row: int) -> None:
        """A row that no mask counts; its prompt is a real one, so that no computation meets an empty sequence."""
        for array in out.inputs.images.values():
            array[row] = 0
        if out.inputs.proprio is not None:
            out.inputs.proprio[row] = 0
        if out.inputs.past_actions is not None:
            out.inputs.past_actions[row] = 0
        for array in (out.future or {}).values():
            array[row] = 0
        if out.sentence is not None:
            out.sentence[row] = self._sentences[0]
        out.actions[row] = 0
        out.inputs.text_ids[row], out.inputs.text_mask[row] = self._text_ids[0], self._text_mask[0]


def train_batches(
    source: SegmentSource,
    *,
    segments_per_batch: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    prefetch: int = 16,
) -> grain.DatasetIterator[types.Batch]:
    """Endless shuffled batches with NumPy leaves and leading axis segments_per_batch / process_count.

    Every epoch is a new permutation of all segments. The batches of all processes, joined in order of `process_index`,
    are the batch that a single process would see, row by row. Call the iterator's `close()` after use.

    Args:
      segments_per_batch: over all processes.
      seed: order of the segments, in [0, 2**32).
      start_step: batches to skip, at no cost.
      num_threads: batches being read at a time.
      prefetch: batches kept ready.
    """
    rows = _rows_of(process_index, process_count, segments_per_batch)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    order = order.batch(segments_per_batch, drop_remainder=True)  # endless; without it batches of one overflow
    batches = order[start_step:].map(functools.partial(_read_rows, source.training_batch, rows))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))


def evaluation_batches(
    source: SegmentSource,
    *,
    segments_per_batch: int,
    num_batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    prefetch: int = 16,
) -> grain.DatasetIterator[types.Batch]:
    """The first `num_batches` batches (0: all) of a fixed permutation of the segments, so that few cover many episodes.

    Each segment comes once. The last batch is filled up with rows whose `window_mask` and `action_mask` are False, so
    every process sees the same number of batches of one size. Other arguments as for `train_batches`.
    """
    rows = _rows_of(process_index, process_count, segments_per_batch)
    order = np.random.default_rng(0).permutation(len(source))
    order = np.append(order, np.full(-len(order) % segments_per_batch, PADDING)).reshape(-1, segments_per_batch)
    batches = grain.MapDataset.source(order[: num_batches or None])
    batches = batches.map(functools.partial(_read_rows, source.evaluation_batch, rows))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))


def order_fingerprint(source: SegmentSource, *, segments_per_batch: int, seed: int) -> dict[str, Any]:
    """What, together with the step, determines every coming batch, as JSON values.

    The same on any number of processes, and for either layout of a dataset.
    """
    digest = hashlib.sha256(repr([dataclasses.astuple(episode) for episode in source.dataset.episodes]).encode())
    return {
        "episodes": f"{len(source.dataset.episodes)} with sha256 {digest.hexdigest()[:16]}",
        "window": source.segments.window,
        "chunk": source.segments.chunk,
        "windows_per_segment": source.segments.windows_per_segment,
        "segments_per_batch": segments_per_batch,
        "seed": seed,
    }


def require_same_order(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare two `order_fingerprint`s. Raises ValueError that names what changed."""
    changed = [
        f"{key} was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in {**saved, **current}
        if saved.get(key) != current.get(key)
    ]
    if changed:
        raise ValueError(
            f"the checkpoint's data order cannot be continued: {'; '.join(changed)}. Resume with the settings and the "
            "dataset it was made with, or start a new run in another train.output."
        )


def measure(batches: Iterator[types.Batch], windows_per_batch: int, seconds: float) -> float:
    """Windows per second that a fresh iterator delivers to a consumer that does nothing, start-up left out.

    Takes about `seconds`, or as long as two batches take.
    """
    next(batches)
    begin, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    return count * windows_per_batch / (time.perf_counter() - begin)


class EpisodeArrays(NamedTuple):
    """The L = end - start steps of an episode that training learns from, in order.

    images: camera -> uint8[L, height, width, 3].
    actions: float32[L, 7], dataset units.
    proprio: float32[L, 7] (see `inputs.proprio`), or None where it was not asked for.
    """

    images: Mapping[str, np.ndarray]
    actions: np.ndarray
    proprio: np.ndarray | None = None


def action_sample(dataset: base.Dataset, limit: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Actions of up to `limit` frames, evenly spaced over those that episodes learn from, and the robot's states there.

    Returns:
      float32[n, 7] actions and float32[n, 15] robot_obs, or None where the dataset has none. Where a frame cannot be
      read, it is left out, and there are no states.
    """
    frame_ids = np.unique(np.concatenate([np.arange(episode.start, episode.end) for episode in dataset.episodes]))
    chosen = frame_ids[np.linspace(0, len(frame_ids) - 1, min(len(frame_ids), limit)).astype(int)]
    try:
        return _numbers(dataset, chosen)
    except base.CorruptFrameError:
        readable = []
        for frame_id in chosen:
            with contextlib.suppress(base.CorruptFrameError):
                readable.append(dataset.actions([frame_id]))
        return np.concatenate(readable or [np.zeros((0, interface.ACTION_DIM), np.float32)]), None


def _numbers(dataset: base.Dataset, frame_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
    actions = dataset.actions(frame_ids)
    try:
        return actions, dataset.robot_obs(frame_ids)
    except base.CorruptFrameError:
        raise
    except ValueError:  # a dataset without robot states
        return actions, None


def episode_arrays(
    dataset: base.Dataset, episode: base.Episode, cameras: Sequence[str], *, proprio: bool = False
) -> EpisodeArrays:
    """A whole episode, for action curves and for feeding a policy frame by frame. Raises CorruptFrameError."""
    frame_ids = np.arange(episode.start, episode.end)
    state = dataset.proprio(frame_ids) if proprio else None
    return EpisodeArrays(dataset.images(frame_ids, cameras), dataset.actions(frame_ids), state)


def _read_rows(read: Callable[[np.ndarray], types.Batch], rows: slice, indices: np.ndarray) -> types.Batch:
    return read(indices[rows])


def _rows_of(process_index: int, process_count: int, segments_per_batch: int) -> slice:
    """The contiguous part of a batch that one process reads."""
    if segments_per_batch % process_count:
        raise ValueError(
            f"{segments_per_batch} segments per batch do not divide over {process_count} processes; "
            f"try {max(segments_per_batch // process_count, 1) * process_count}."
        )
    share = segments_per_batch // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _encode_all(episodes: Sequence[base.Episode], encode_text: EncodeText) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids int32[sentences, T], mask bool[sentences, T], row of each episode int[E])."""
    rows: dict[str, int] = {}
    for episode in episodes:
        rows.setdefault(episode.instruction, len(rows))
    encoded = [encode_text(instruction) for instruction in rows]
    lengths = {len(ids): instruction for instruction, (ids, _) in zip(rows, encoded, strict=True)}
    if len(lengths) > 1:
        raise ValueError(f"encode_text must pad every prompt to one length; lengths and an example of each: {lengths}.")
    ids, masks = zip(*encoded, strict=True)
    return (
        np.stack(ids).astype(np.int32),
        np.stack(masks).astype(bool),
        np.array([rows[episode.instruction] for episode in episodes]),
    )
