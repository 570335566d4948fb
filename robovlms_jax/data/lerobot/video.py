"""Videos of a LeRobotDataset: what a file says about itself, and its frames by number."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from robovlms_jax import json_files
from robovlms_jax.data import base
from robovlms_jax.data.lerobot import meta, tables

_SEEK_S = 1.0  # of video that is rather skipped than decoded
_OPEN_VIDEOS = 4
"""Kept open per thread; each holds a decoder with its reference frames."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a file's header says.

    rate: frames per second. frames: how many; `is_exact`: counted by the file rather than taken from its duration.
    uneven: which frame comes at another time than its number says (a variable frame rate), "" where none does.
    """

    height: int
    width: int
    rate: float
    frames: int
    is_exact: bool
    uneven: str = ""


def probe(path: pathlib.Path) -> Facts:
    """Read a header; nothing is decoded. Raises ValueError saying what is wrong."""
    av = meta.library("av")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = _rate_of(stream)
            frames, is_exact = stream.frames, stream.frames > 0
            if not is_exact:
                if stream.duration is not None:
                    seconds = float(stream.duration * stream.time_base)
                else:
                    seconds = (container.duration or 0) / av.time_base
                frames = round(seconds * rate)
            return Facts(stream.height, stream.width, rate, frames, is_exact, _uneven(stream, rate))
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"cannot be read: {error}.{json_files.pointer_hint(path)}") from error


def _rate_of(stream: Any) -> float:
    """Frames per second; 0 = the file does not say. From the first to the last frame where the file lists them: how
    long the last one stays says nothing about the others."""
    entries = stream.index_entries
    if 1 < len(entries) == stream.frames:
        lasts = (entries[-1].timestamp - entries[0].timestamp) * stream.time_base
        return float((len(entries) - 1) / lasts) if lasts > 0 else 0.0
    return float(stream.average_rate or stream.guessed_rate or 0)


def _uneven(stream: Any, rate: float) -> str:
    """The first frame that lies half a frame or more from number / rate, where `VideoReader` would take it for another;
    "" where there is none, or the file does not list its frames."""
    if not 1 < len(stream.index_entries) == stream.frames:
        return ""
    ticks = np.sort([entry.timestamp for entry in stream.index_entries])
    seconds = (ticks - ticks[0]) * float(stream.time_base)
    wrong = np.abs(seconds * rate - np.arange(len(seconds))) >= 0.5
    if not wrong.any():
        return ""
    number = int(np.argmax(wrong))
    return f"frame {number} comes {seconds[number]:.3f} s after the first, expected {number / rate:.3f} s"


class VideoReader:
    """Frames of many files by number. Threads have decoders of their own; a pickled copy starts with none."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self):
        return VideoReader, ()

    def read(
        self,
        path: pathlib.Path,
        numbers: Sequence[int],
        out: Sequence[np.ndarray],
        places: Sequence[int],
        *,
        scale: bool,
    ) -> None:
        """Decode frame numbers[i] of a file into out[places[i]]; near ones in one pass from the key frame before the
        first. Other sizes are scaled where `scale`. Raises CorruptFrameError naming the file and the time."""
        rate = _rate_of(self._container(path).streams.video[0])
        half = 0.5 / rate
        times = sorted((number / rate, place) for number, place in zip(numbers, places, strict=True))
        apart = np.flatnonzero(np.diff([time for time, _ in times]) > _SEEK_S) + 1
        for first, last in zip([0, *apart.tolist()], [*apart.tolist(), len(times)], strict=True):
            remaining = collections.deque(times[first:last])
            for time, image in self.frames(path, remaining[0][0] - half):
                while remaining and abs(time - remaining[0][0]) <= half:
                    wanted, place = remaining.popleft()
                    tables.fit(image.to_ndarray(format="rgb24"), out[place], f"{path} at {wanted:.3f} s", scale=scale)
                if not remaining or time > remaining[-1][0] + half:
                    break
            if remaining:
                raise base.CorruptFrameError(f"{path} has no frame at {remaining[0][0]:.3f} s.")

    def frames(self, path: pathlib.Path, start: float) -> Iterator[tuple[float, Any]]:
        """(time in s since the first frame, frame) from the key frame at or before `start` on; those before `start`
        are decoded and not given. Raises CorruptFrameError."""
        av = meta.library("av")
        container = self._container(path)
        try:
            stream = container.streams.video[0]
            begin = float((stream.start_time or 0) * stream.time_base)
            container.seek(max(int((start + begin) / stream.time_base), 0), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time - begin >= start:
                    yield float(frame.time) - begin, frame
        except (av.error.FFmpegError, OSError) as error:
            self._opened().pop(path, None)
            raise base.CorruptFrameError(f"{path} cannot be decoded: {error}") from error

    def _opened(self) -> collections.OrderedDict[pathlib.Path, Any]:
        return self._local.__dict__.setdefault("opened", collections.OrderedDict())

    def _container(self, path: pathlib.Path) -> Any:
        """This thread's, opened where it is not. Raises CorruptFrameError."""
        av, opened = meta.library("av"), self._opened()
        if path not in opened:
            try:
                container = av.open(str(path))
                container.streams.video[0].thread_type = "NONE"  # threads read batches already
            except (av.error.FFmpegError, OSError, IndexError) as error:
                raise base.CorruptFrameError(f"{path} cannot be decoded: {error}") from error
            opened[path] = container
            if len(opened) > _OPEN_VIDEOS:
                opened.popitem(last=False)[1].close()
        opened.move_to_end(path)
        return opened[path]
