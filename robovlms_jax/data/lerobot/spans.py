"""Where episodes lie in videos: what meta/episodes says, compared with lengths and with what the files say."""

from __future__ import annotations

import collections
import itertools
import pathlib
from collections.abc import Mapping, Sequence

from robovlms_jax.data.lerobot import faults as left_out
from robovlms_jax.data.lerobot import meta, video

_SHOWN = 3
_RATE_TOLERANCE = 0.01
"""A stream may be called by a rounded rate (29.97 as 30); beyond that, pictures and rows are of different times."""


def compare(
    info: meta.Info,
    episodes: Mapping[int, meta.EpisodeRow],
    lengths: Mapping[int, int],
    faults: left_out.Faults,
    notes: meta.Notes,
) -> dict[int, dict[str, tuple[pathlib.Path, int]]]:
    """Episode -> feature key -> file and first frame. Every file is opened, none decoded."""
    files: dict[tuple[str, int, int], list[int]] = collections.defaultdict(list)
    for episode in episodes.values():
        for key, span in episode.videos.items():
            files[key, span.chunk, span.file].append(episode.number)
    places: dict[int, dict[str, tuple[pathlib.Path, int]]] = {number: {} for number in episodes}
    for (key, chunk, file), numbers in sorted(files.items()):
        name = info.file("video_path", chunk, file, key)
        path = info.root / name
        spans = {number: episodes[number].videos[key] for number in numbers}
        what, rate = "whose video does not fit", info.fps
        try:
            if not path.exists():
                what = "whose video is missing"
                raise ValueError("does not exist")
            rate = _rate(info, key, path, spans, lengths, set(episodes), notes)
        except ValueError as error:
            for number in numbers:
                faults.add(number, what, f"{name} {error}")
        for number, span in spans.items():
            places[number][key] = path, round(span.begin * rate)
    return places


def _rate(
    info: meta.Info,
    key: str,
    path: pathlib.Path,
    spans: Mapping[int, meta.VideoSpan],
    lengths: Mapping[int, int],
    listed: set[int],
    notes: meta.Notes,
) -> float:
    """Frames per second that from_timestamp is given in. Raises ValueError saying why the spans cannot be trusted."""
    facts = video.probe(path)
    size = image_size(info, key)
    if (facts.height, facts.width) != size:
        raise ValueError(f"has {facts.height} x {facts.width} pixels, info.json says {size[0]} x {size[1]} for {key}")
    if facts.uneven:
        raise ValueError(
            f"has frames at uneven times ({facts.uneven}), by which none can be found by its number; write it again "
            f"with even ones: ffmpeg -i OLD -vf setpts=N/({info.fps:g}*TB) -r {info.fps:g} NEW"
        )
    if not abs(facts.rate / info.fps - 1) < _RATE_TOLERANCE:
        raise ValueError(f"has {facts.rate:.4g} frames per second, info.json says fps {info.fps:g}")
    name = path.relative_to(info.root)
    rates = [info.fps]
    if abs(facts.rate / info.fps - 1) > 1e-4:  # as 29.97 is called 30: times may be given in either
        rates.append(facts.rate)
        notes.guess(
            f"{name} has {facts.rate:.4g} frames per second, info.json says fps {info.fps:g}; frames are counted."
        )
    problems = []
    for rate in rates:
        problem, remark = account(spans, lengths, facts, rate, listed, info.total_episodes or 0)
        if not problem:
            if remark:
                notes.guess(f"{name}: {remark}")
            _say_of_order(name, spans, notes)
            return rate
        problems.append(problem)
    raise ValueError(problems[0])


def _say_of_order(name: pathlib.Path, spans: Mapping[int, meta.VideoSpan], notes: meta.Notes) -> None:
    """Recorders write episodes one after the other. Two of one length whose places were exchanged fit all the same."""
    order = sorted(spans, key=lambda number: (spans[number].begin, number))
    for former, latter in itertools.pairwise(order):
        if former > latter:
            notes.warn(
                f"{name}: episode {former} lies before episode {latter}. Lengths fit, and nothing else tells whether "
                "these are their pictures: compare them with their instructions (python -m experiments.inspect_data)."
            )
            return


def account(
    spans: Mapping[int, meta.VideoSpan],
    lengths: Mapping[int, int],
    facts: video.Facts,
    fps: float,
    listed: set[int],
    total: int,
) -> tuple[str, str]:
    """Compare where episodes begin in a file with their lengths and with the number of frames that the file has.

    Spans that follow each other without gap, from the first frame to the last, are proven right. Frames between them
    are accepted where they belong to episodes that meta/episodes does not list (part of a larger dataset), or where all
    else fits: every to_timestamp, and the last frame of the file.

    Args:
      listed: all episodes of meta/episodes. total: how many info.json says there are.
    Returns:
      (what is wrong or "", what is worth saying or "").
    """
    position, previous = 0, -1
    gaps, loose, misfit = [], 0, []
    for number, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[0])):
        start, length = round(span.begin * fps), lengths[number]
        if span.end is None or not abs((span.end - span.begin) * fps - length) < 0.5:
            end = "none" if span.end is None else f"{span.end:.3f}"
            misfit.append(
                f"episode {number} has {length} frames, from_timestamp {span.begin:.3f} and to_timestamp {end}"
            )
        if start < position:
            return f"episodes {previous} and {number} overlap by {position - start} frames", ""
        if start > position:
            gap = (
                f"{start - position} frames between episodes {previous} and {number}"
                if previous >= 0
                else (f"{start} frames before episode {number}")
            )
            gaps.append(gap)
            loose += all(other in listed for other in range(previous + 1, number))
        position, previous = start + length, number
    left = facts.frames - position
    seconds = facts.frames / fps
    if left < 0 and (facts.is_exact or left < -1):
        return f"episode {previous} ends at {position / fps:.3f} s, the video lasts {seconds:.3f} s", ""
    if left > 0 and (facts.is_exact or left > 1):
        if not gaps and all(other in listed for other in range(previous + 1, total)):
            return f"it has {facts.frames} frames, its {len(spans)} episodes have {position}", ""
        loose += all(other in listed for other in range(previous + 1, total))
        gaps.append(f"{left} frames after episode {previous}")
    if not gaps:
        return "", f"{'; '.join(misfit[:_SHOWN])}; lengths decide, they fit the video" if _ended(spans, misfit) else ""
    if misfit:
        return f"{'; '.join(gaps[:_SHOWN])} belong to no episode; {misfit[0]}", ""
    if loose and left != 0:
        return f"{'; '.join(gaps[:_SHOWN])} belong to no episode", ""
    return "", f"{'; '.join(gaps[:_SHOWN])} belong to no episode that is listed"


def _ended(spans: Mapping[int, meta.VideoSpan], misfit: Sequence[str]) -> bool:
    """Whether a to_timestamp that is there is wrong, rather than none being given."""
    return bool(misfit) and any(span.end is not None for span in spans.values())


def image_size(info: meta.Info, key: str) -> tuple[int, int]:
    """(height, width) of a camera as info.json gives it. Raises ValueError."""
    shape, names = info.features[key]["shape"], info.features[key].get("names")
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) != 3:
        raise ValueError(f"{info.path}: camera {key!r} has shape {shape}, expected [height, width, channels].")
    if isinstance(names, list) and {"height", "width"} <= set(names) and len(names) == 3:
        return shape[names.index("height")], shape[names.index("width")]
    first = shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
    return (shape[1], shape[2]) if first else (shape[0], shape[1])
