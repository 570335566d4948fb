"""From a dataset to batches on the host: a Grain graph over segment numbers, each batch decoded into one buffer.

    numbers 0 ... N-1 -> shuffle -> repeat -> mix -> batch -> this process's part -> read, decode

Everything before the read works on integers, so shuffling is global and the data's position is the number of the step:
a run resumes by starting at that step, on any number of processes and of workers that read. Images stay uint8; what
depends on the model happens on the device.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from robovlms_jax import types
from robovlms_jax.control import interface
from robovlms_jax.data import base, language, segments
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
      encode_text: called once per distinct sentence.
      proprio: read the robot's state of every frame, too.
      past_actions: H, actions before each frame to read; 0: none.
      future_frames: F, frames after the segment's last one to read; 0: none.
      embed_sentence: instruction -> float32[E], for `Batch.sentence`; called once per distinct instruction.
      left_pad: whether windows may begin before their episode (see `segments`).
      variation: other sentences that training draws from; None keeps to the recorded ones.
      goal_relabelling: mask what comes after a random later step, as upstream does; needs windows_per_segment 1.
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
        left_pad: bool = False,
        variation: language.Variation | None = None,
        goal_relabelling: bool = False,
    ):
        self.dataset = dataset
        self.cameras = tuple(cameras)
        self._proprio, self._past, self._future = proprio, past_actions, future_frames
        self._goal_relabelling = goal_relabelling
        self._masks_images = dataset.may_lack_images
        self._reported: set[str] = set()
        spans = np.array([(episode.start, episode.end) for episode in dataset.episodes])
        self.segments = segments.Segments(
            spans, window=window, chunk=chunk, windows_per_segment=windows_per_segment, left_pad=left_pad
        )
        if len(self.segments) == 0:
            longest = max((episode.end - episode.start for episode in dataset.episodes), default=0)
            raise ValueError(
                f"{dataset.name}: none of {len(dataset.episodes)} episodes is long enough for policy.window={window}; "
                f"the longest has {longest} steps to learn from."
            )
        dataset.allocate(0, self.cameras)  # an unknown camera is an error now, not in the first batch
        self._text_ids, self._text_mask, self._text_rows = _encode_all(dataset.episodes, encode_text, variation)
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
        return len(self._text_ids)

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
        return types.Batch(
            inputs=types.Inputs(
                images={camera: array.reshape(size, frames, *array.shape[1:]) for camera, array in images.items()},
                text_ids=np.zeros((size, *self._text_ids.shape[1:]), np.int32),
                text_mask=np.zeros((size, *self._text_mask.shape[1:]), bool),
                step_mask=np.ones((size, frames), bool),
                image_mask=(
                    {camera: np.ones((size, frames), bool) for camera in self.cameras} if self._masks_images else None
                ),
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

    def _fill(self, out: types.Batch, row: int, indices: np.ndarray, draws: np.ndarray | None = None) -> None:
        """Write segments int[n] into the rows from `row` on; `draws` makes training's random choices.

        Raises CorruptFrameError when a frame of any of them cannot be used.
        """
        segment = self.segments.take(indices)
        out = jax.tree.map(lambda array: array[row : row + len(indices)], out)
        out.actions[:] = _each_once(self.dataset.actions, segment.step_ids)
        self._fill_frames(out.inputs, segment)
        self._fill_extras(out, segment)
        choices = [self._text_rows[episode] for episode in segment.episode.tolist()]
        draws_or_first = np.zeros(len(indices), np.int64) if draws is None else draws
        text = [rows[draw % len(rows)] for rows, draw in zip(choices, draws_or_first.tolist(), strict=True)]
        out.inputs.text_ids[:], out.inputs.text_mask[:] = self._text_ids[text], self._text_mask[text]
        out.inputs.step_mask[:] = segment.seen_mask
        out.action_mask[:] = segment.step_mask
        if self._goal_relabelling and draws is not None:
            self._end_at_goals(out, segment, draws)
        out.window_mask[:] = segment.window_mask
        out.episode[:] = segment.episode

    def _fill_frames(self, inputs: types.Inputs, segment: segments.Segment) -> None:
        """What was seen: images and state. Steps outside the episode repeat its first or last frame, read once."""
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
        if inputs.proprio is not None:
            filled.append(inputs.proprio)
            inputs.proprio[rows, steps] = self.dataset.proprio(ids)
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
        if out.inputs.past_actions is not None:
            ids = begin - self._past + np.arange(out.inputs.past_actions.shape[1])
            past = _each_once(self.dataset.actions, np.clip(ids, start, end))
            out.inputs.past_actions[:] = np.where((ids >= start)[..., None], past, 0)
        if out.future is not None:
            ids = begin + self.segments.num_frames + np.arange(self._future)
            distinct, places = np.unique(np.minimum(ids, end), return_inverse=True)
            images = self.dataset.images(distinct, self.cameras)
            for camera, array in out.future.items():
                array[:] = images[camera][places.reshape(ids.shape)]
            out.future_mask[:] = ids <= end
        if out.sentence is not None:
            out.sentence[:] = self._sentences[segment.episode]

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
    num_workers: int = 0,
) -> grain.DatasetIterator[types.Batch]:
    """Endless shuffled batches with NumPy leaves and leading axis segments_per_batch / process_count.

    Every epoch is a new permutation of all segments; of a mixture, of each dataset's segments, and every batch has
    windows of them in proportion to the weights. The batches of all processes, joined in order of `process_index`, are
    the batch that a single process would see, row by row. Call the iterator's `close()` after use.

    Args:
      segments_per_batch: over all processes.
      seed: order of the segments, in [0, 2**32).
      start_step: batches to skip, at no cost.
      num_threads: batches being read at a time, by each worker.
      prefetch: batches kept ready, by each worker.
      num_workers: processes that read; 0: threads of this one do. Batches are the same for any number.
    """
    rows = _rows_of(process_index, process_count, segments_per_batch)
    order = _order(source, seed).batch(segments_per_batch, drop_remainder=True)  # endless; without it one overflows
    order = order.map_with_index(functools.partial(_draw, seed))
    batches = order[start_step:].map(functools.partial(_read_drawn, source.training_batch, rows))
    reading = batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read an absl flag, which programs without absl never parse
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        reading = reading.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(reading)


def choose_workers(
    make: Callable[[int], grain.DatasetIterator[types.Batch]],
    windows_per_batch: int,
    *,
    candidates: Sequence[int] | None = None,
    seconds: float = 2.0,
) -> tuple[int, dict[int, float]]:
    """The number of worker processes that reads fastest here, by trying, and windows/s of each one tried.

    Threads of this process (0 workers) win ties: they need no copy of a batch and no start-up.

    Args:
      make: number of workers -> a fresh iterator.
      candidates: increasing; by default 0 and powers of two up to half the cores.
    """
    if candidates is None:
        candidates = [0, *(2**power for power in range(8) if 2**power <= (os.cpu_count() or 1) // 2)]
    rates: dict[int, float] = {}
    for count in candidates:
        batches = make(count)
        try:
            rates[count] = measure(batches, windows_per_batch, seconds)
        finally:
            batches.close()
    best = max(rates, key=lambda count: (rates[count] * (1.05 if count == 0 else 1.0), -count))
    return best, rates


def _start_worker(index: int, count: int) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends Ctrl-C to all; the training loop decides what follows
    # Grain imports jax in its workers; they must not take an accelerator.
    jax.config.update("jax_platforms", "cpu")


def _order(source: SegmentSource, seed: int) -> grain.MapDataset[int]:
    """Endless segment numbers. Of a mixture, each dataset's come in an order of its own, mixed by weight."""
    groups = source.dataset.groups
    if not groups:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    counts, windows = source.segments.groups([group.num_episodes for group in groups])
    ends = np.cumsum(counts)
    parts, weights = [], []
    for number, group in enumerate(groups):
        if counts[number] == 0:
            raise ValueError(
                f"{source.dataset.name}: no episode of {group.name} is long enough for policy.window="
                f"{source.segments.window}; leave it out of the mixture or shorten the window."
            )
        numbers = grain.MapDataset.range(int(ends[number] - counts[number]), int(ends[number]))
        parts.append(numbers.seed((seed + number) % 2**32).shuffle().repeat())
        # Weights are of windows; segments are drawn, and those of short episodes carry fewer windows.
        weights.append(group.weight * counts[number] / windows[number])
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def _draw(seed: int, index: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segment numbers of batch `index` with a random number for each, the same wherever and whenever it is read."""
    return numbers, np.random.default_rng([seed, index]).integers(2**32, size=len(numbers), dtype=np.uint32)


def _read_drawn(
    read: Callable[[np.ndarray, np.ndarray], types.Batch], rows: slice, drawn: tuple[np.ndarray, np.ndarray]
) -> types.Batch:
    numbers, draws = drawn
    return read(numbers[rows], draws[rows])


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
    episodes = source.dataset.episodes
    digest = hashlib.sha256(repr([(e.start, e.end, e.instruction, e.task) for e in episodes]).encode())
    more: dict[str, Any] = {}
    if source.dataset.groups:
        more["mixture"] = {group.name: [group.num_episodes, group.weight] for group in source.dataset.groups}
    if source.num_sentences != len({episode.instruction for episode in episodes}):
        more["sentences"] = source.num_sentences
    if source.segments.left_pad:
        more["left_pad"] = True
    return {
        **more,
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
            "dataset it was made with, give up going on bit for bit with --train.allow_new_order, or start a new run "
            "in another train.output."
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
    """Actions of up to `limit` frames, evenly spaced over those that are learned from, and the openings there.

    Returns:
      float32[n, 7] actions and float32[n], see `Dataset.gripper_opening`, or None where the dataset has none. Where a
      frame cannot be read, it is left out, and there are no openings.
    """
    frame_ids = np.unique(np.concatenate([np.arange(episode.start, episode.end) for episode in dataset.episodes]))
    chosen = frame_ids[np.linspace(0, len(frame_ids) - 1, min(len(frame_ids), limit)).astype(int)]
    try:
        return dataset.actions(chosen), dataset.gripper_opening(chosen)
    except base.CorruptFrameError:
        readable = []
        for frame_id in chosen:
            with contextlib.suppress(base.CorruptFrameError):
                readable.append(dataset.actions([frame_id]))
        return np.concatenate(readable or [np.zeros((0, interface.ACTION_DIM), np.float32)]), None


def episode_arrays(
    dataset: base.Dataset, episode: base.Episode, cameras: Sequence[str], *, proprio: bool = False
) -> EpisodeArrays:
    """A whole episode, for action curves and for feeding a policy frame by frame. Raises CorruptFrameError."""
    frame_ids = np.arange(episode.start, episode.end)
    state = dataset.proprio(frame_ids) if proprio else None
    return EpisodeArrays(dataset.images(frame_ids, cameras), dataset.actions(frame_ids), state)


def _each_once(read: Callable[[np.ndarray], np.ndarray], ids: np.ndarray) -> np.ndarray:
    """`read(ids)` of ids int[...] that repeat, each read once; further axes are read's own."""
    distinct, places = np.unique(ids, return_inverse=True)
    return read(distinct)[places.reshape(ids.shape)]


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


def _encode_all(
    episodes: Sequence[base.Episode], encode_text: EncodeText, variation: language.Variation | None
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """(ids int32[sentences, T], mask bool[sentences, T], rows of each episode's sentences, the recorded one first)."""
    rows: dict[str, int] = {}
    known: dict[tuple[str, ...], np.ndarray] = {}  # episodes with the same sentences share an array
    per_episode = []
    for episode in episodes:
        said = (episode.instruction,) if variation is None else variation.of(episode)
        if said not in known:
            known[said] = np.array([rows.setdefault(sentence, len(rows)) for sentence in said])
        per_episode.append(known[said])
    encoded = [encode_text(sentence) for sentence in rows]
    lengths = {len(ids): sentence for sentence, (ids, _) in zip(rows, encoded, strict=True)}
    if len(lengths) > 1:
        raise ValueError(f"encode_text must pad every prompt to one length; lengths and an example of each: {lengths}.")
    ids, masks = zip(*encoded, strict=True)
    return np.stack(ids).astype(np.int32), np.stack(masks).astype(bool), per_episode
