"""Which frames, actions and masks a training sample has. Pure NumPy, closed form, one place.

An episode is annotated from frame `start` to frame `end`, both inclusive; L = end - start steps can be learned from,
because frame `end` itself is masked out, as RoboVLMs does. A window is W frames and, at each of them, a chunk of C
actions that begins with the frame's own. Window k begins at frame start + k, for k = 0 ... L - W, so an episode carries
L + 1 - W windows and none if it is shorter. Step i of a sample that begins at frame s refers to frame min(s + i, end)
and is real where s + i < end: chunks that reach past the end repeat the values of frame `end` under a False mask.

A segment is G = W + K - 1 consecutive frames and carries the K windows that begin at its first K frames. Window starts
are tiled in groups of K, so each window belongs to exactly one segment; the last segment of an episode may carry fewer.
K = 1 gives RoboVLMs' samples one by one.

With left padding windows begin up to W - 1 steps before their episode, so that every frame is once the newest of a
window, as at the start of control: L windows, k = -(W - 1) ... L - W. Steps before `start` repeat its values under
False masks.

Of an episode some windows alone may be wanted (`starts`), such as those whose frames have pictures; each is then a
segment of its own. Chunks go on as above.

Of the steps of an episode some alone may be what chunks are made of (`acting`): the C next ones of them, from the
frame's own step on. What is not one of them is left out as if it had not been.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Segment:
    """Frames shared by up to K windows. Of several (`Segments.take`) every field has a leading axis n.

    episode: index of its episode.
    step_ids: int64[G + C - 1], frame id of every step; the first G are those whose images are seen.
    action_ids: int64[G + C - 1], frame id of every step's action: that of the step, but where steps are left out.
    step_mask: bool[G + C - 1], True = an action to learn from.
    seen_mask: bool[G], True = a real frame; False = padding before the episode.
    window_mask: bool[K], True = the window that begins at this frame belongs to the segment.
    num_frames: the first G steps are distinct up to this one, padding before the episode aside; the rest repeat it.
    """

    episode: int | np.ndarray
    step_ids: np.ndarray
    action_ids: np.ndarray
    step_mask: np.ndarray
    seen_mask: np.ndarray
    window_mask: np.ndarray
    num_frames: int | np.ndarray


class Segments(Sequence[Segment]):
    """All segments of a list of episodes, in order, each computed when asked for.

    Args:
      spans: int[E, 2], first and last frame id of each episode, both inclusive.
      window, chunk, windows_per_segment: W, C, K.
      left_pad: whether windows may begin before their episode.
      starts: of each episode the numbers of the windows that there are, int[n], rising; None: all.
      acting: of each episode the numbers of the steps that chunks are made of, int[m], rising; None: all. Windows of
        one frame alone, one per segment; those with none of them left are no windows.
    """

    def __init__(
        self,
        spans: np.ndarray,
        *,
        window: int,
        chunk: int,
        windows_per_segment: int,
        left_pad: bool = False,
        starts: Sequence[np.ndarray] | None = None,
        acting: Sequence[np.ndarray] | None = None,
    ):
        if min(window, chunk, windows_per_segment) < 1:
            raise ValueError(
                f"window={window}, chunk={chunk} and windows_per_segment={windows_per_segment} must be at least 1."
            )
        if acting is not None and (window, windows_per_segment) != (1, 1):
            raise ValueError(f"steps are left out of chunks of windows of 1 only, not of {window}.")
        self.window, self.chunk, self.windows_per_segment = window, chunk, windows_per_segment
        self._spans = np.asarray(spans, np.int64).reshape(-1, 2)
        lengths = self._spans[:, 1] - self._spans[:, 0]
        self.left_pad = left_pad
        self._before = window - 1 if left_pad else 0  # steps before its episode at which the first window begins
        windows = np.maximum(lengths + 1 - window + self._before, 0)
        # Runs of windows: the episode, its first window's number there, how many.
        self._episode, self._first, self._count = np.arange(len(windows)), np.zeros(len(windows), np.int64), windows
        self._acting = None
        if acting is not None:
            every = starts if starts is not None else [np.arange(count) for count in windows]
            starts = [np.asarray(own)[: _until(own, steps)] for own, steps in zip(every, acting, strict=True)]
            self._acting = np.concatenate([np.zeros(0, np.int64), *acting])  # step numbers, episode by episode
            self._acts = np.concatenate([[0], np.cumsum([len(steps) for steps in acting])]).astype(np.int64)
        self._chosen = starts is not None
        if starts is not None:
            starts = [np.asarray(own, np.int64)[np.asarray(own) < count] for own, count in zip(starts, windows)]
            self._episode = np.repeat(np.arange(len(windows)), [len(own) for own in starts])
            self._first = np.concatenate([np.zeros(0, np.int64), *starts])
            self._count = np.ones(len(self._first), np.int64)
        # Number of each run's first segment, and of all; of each episode's first run, and of all.
        self._begins = np.concatenate([[0], np.cumsum(-(-self._count // windows_per_segment))])
        self._first_run = np.searchsorted(self._episode, np.arange(len(windows) + 1))

    def __len__(self) -> int:
        return int(self._begins[-1])

    @property
    def num_windows(self) -> int:
        """Windows of all episodes, what one epoch sees."""
        return int(self._count.sum())

    @property
    def runs(self) -> np.ndarray:
        """int64[runs, 3] of each run of windows: its episode, its first window's number there, its length."""
        return np.stack([self._episode, self._first, self._count], axis=1).astype(np.int64)

    @property
    def num_frames(self) -> int:
        """G = W + K - 1."""
        return self.window + self.windows_per_segment - 1

    def groups(self, num_episodes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Segments and windows int64[groups] of consecutive groups of episodes."""
        last = self._first_run[np.cumsum(np.asarray(num_episodes, np.int64))]
        counts = [self._begins[last], np.concatenate([[0], np.cumsum(self._count)])[last]]
        return tuple(np.diff(count, prepend=0) for count in counts)

    def episodes_of(self, indices: Sequence[int]) -> np.ndarray:
        """Index int64[n] of the episode that each segment belongs to. Raises IndexError."""
        return self._episode[self._run_of(np.asarray(indices, np.int64))]

    def _run_of(self, indices: np.ndarray) -> np.ndarray:
        outside = (indices < 0) | (indices >= len(self))
        if outside.any():
            raise IndexError(f"segment {indices[outside][0]} is out of range; there are {len(self)}.")
        return np.searchsorted(self._begins, indices, side="right") - 1

    def span(self, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last frame id, int64[n] each, of episodes int[n]."""
        return self._spans[episodes, 0], self._spans[episodes, 1]

    def take(self, indices: Sequence[int]) -> Segment:
        """Segments int[n], each field with a leading axis n. Raises IndexError."""
        indices = np.asarray(indices, np.int64)
        run = self._run_of(indices)
        episode, ends = self._episode[run], self._first[run] + self._count[run]
        start, end = self.span(episode)
        # First window's number in its episode.
        first = self._first[run] + (indices - self._begins[run]) * self.windows_per_segment
        steps = (start - self._before + first)[:, None] + np.arange(self.num_frames + self.chunk - 1)
        start, end = start[:, None], end[:, None]
        step_ids = np.clip(steps, start, end)
        actions, mask = self._chunks(episode, steps, step_ids, (start <= steps) & (steps < end))
        return Segment(
            episode=episode,
            step_ids=step_ids,
            action_ids=actions,
            step_mask=mask,
            seen_mask=steps[:, : self.num_frames] >= start,
            window_mask=first[:, None] + np.arange(self.windows_per_segment) < ends[:, None],
            num_frames=np.minimum(self.num_frames, ends - first + self.window),
        )

    def _chunks(
        self, episode: np.ndarray, steps: np.ndarray, step_ids: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and masks [n, G + C - 1] of actions: of all steps, or of those that chunks are made of."""
        if self._acting is None:
            return step_ids, mask
        begin, end = self._acts[episode], self._acts[episode + 1]
        own = steps[:, 0] - self._spans[episode, 0]
        first = [b + np.searchsorted(self._acting[b:e], step) for b, e, step in zip(begin, end, own, strict=True)]
        places = np.array(first, np.int64).reshape(-1, 1) + np.arange(self.chunk)
        mask = places < end[:, None]
        ids = self._spans[episode, :1] + self._acting[np.minimum(places, end[:, None] - 1)]
        return np.where(mask, ids, self._spans[episode, 1:]), mask

    @property
    def content(self) -> dict[str, Any]:
        """How windows differ from all that there are, as JSON values; empty: not at all."""
        found: dict[str, Any] = {"left_pad": True} if self.left_pad else {}
        if self._chosen:
            found["windows"] = _digest(self.runs)
        if self._acting is not None:
            found["acting"] = _digest(self._acting, self._acts)
        return found

    def __getitem__(self, index: int) -> Segment:
        every = self.take([index])
        values = {field.name: getattr(every, field.name)[0] for field in dataclasses.fields(Segment)}
        return Segment(**values | {name: int(values[name]) for name in ("episode", "num_frames")})


def _until(starts: np.ndarray, acting: np.ndarray) -> int:
    """How many of rising window numbers come before or at the last step of `acting`."""
    return int(np.searchsorted(starts, acting[-1], side="right")) if len(acting) else 0


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.asarray(array, np.int64).tobytes() for array in arrays)).hexdigest()[:16]
