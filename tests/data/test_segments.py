"""Segment arithmetic against loops that follow RoboVLMs' own steps. Its numbers are compared in test_loading.py."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.data import segments

SIZES = {"window": st.integers(1, 9), "chunk": st.integers(1, 6), "windows_per_segment": st.integers(1, 9)}
SPANS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)).map(lambda x: (x[0], x[0] + x[1])), max_size=5)


def windows_by_loop(spans, window, chunk):
    """RoboVLMs' sampling, as it is written: every window start, then pad on the right by repeating frame ids.

    Yields (episode, ids[W + C - 1], mask[W + C - 1]).
    """
    for episode, (start, end) in enumerate(spans):
        for first in range(start, end + 1 - window):
            ids = list(range(first, first + window + chunk))
            mask = [True] * len(ids)
            right_pad = min(0, end - first - chunk - window)
            if right_pad < 0:
                keep = len(ids) + right_pad
                ids[keep:] = [ids[keep]] * -right_pad
                mask[keep:] = [False] * -right_pad
            yield episode, tuple(ids[:-1]), tuple(mask[:-1])


@given(SPANS, st.fixed_dictionaries(SIZES))
@settings(deadline=None, max_examples=200)
def test_every_window_of_upstream_occurs_exactly_once(spans, sizes):
    window, chunk = sizes["window"], sizes["chunk"]
    all_segments = segments.Segments(spans, **sizes)
    expected = collections.Counter(windows_by_loop(spans, window, chunk))
    found = collections.Counter()
    for segment in all_segments:
        for k in np.flatnonzero(segment.window_mask):
            steps = slice(k, k + window + chunk - 1)
            found[
                segment.episode, tuple(segment.step_ids[steps].tolist()), tuple(segment.step_mask[steps].tolist())
            ] += 1
    assert found == expected
    assert all_segments.num_windows == sum(expected.values())


@given(SPANS, st.fixed_dictionaries(SIZES))
@settings(deadline=None, max_examples=100)
def test_shapes_and_what_needs_reading(spans, sizes):
    all_segments = segments.Segments(spans, **sizes)
    frames = sizes["window"] + sizes["windows_per_segment"] - 1
    for index, segment in enumerate(all_segments):
        start, end = spans[segment.episode]
        assert all_segments.episodes_of([index]) == [segment.episode]
        assert segment.step_ids.shape == segment.step_mask.shape == (frames + sizes["chunk"] - 1,)
        assert segment.window_mask.shape == (sizes["windows_per_segment"],)
        assert segment.window_mask[0]
        assert segment.step_ids.min() >= start
        assert segment.step_ids.max() <= end
        seen = segment.step_ids[:frames]
        assert len(set(seen.tolist())) == segment.num_frames
        assert len(set(seen[: segment.num_frames].tolist())) == segment.num_frames
        # No frame of a window that counts is padding.
        last = np.flatnonzero(segment.window_mask)[-1]
        assert segment.step_mask[: last + sizes["window"]].all()


@given(st.data(), SPANS, st.fixed_dictionaries(SIZES), st.booleans())
@settings(deadline=None, max_examples=200)
def test_of_an_episode_some_windows_alone_may_be_wanted(data, spans, sizes, left_pad):
    """Fails if a window is lost, comes twice, is another one, or has a chunk that is cut short."""
    lengths = [end - start + 1 for start, end in spans]
    wanted = [data.draw(st.sets(st.integers(0, n - 1))) for n in lengths]
    every = segments.Segments(spans, **sizes, left_pad=left_pad)
    some = segments.Segments(spans, **sizes, left_pad=left_pad, starts=[np.array(sorted(own), int) for own in wanted])

    def windows(found):
        for segment in found:
            for k in np.flatnonzero(segment.window_mask):
                seen, steps = slice(k, k + sizes["window"]), slice(k, k + sizes["window"] + sizes["chunk"] - 1)
                masks = segment.step_mask[steps], segment.seen_mask[seen]
                assert k + sizes["window"] <= segment.num_frames
                yield segment.episode, tuple(segment.step_ids[steps]), tuple(np.concatenate(masks))

    numbered = collections.defaultdict(list)
    for window in windows(every):
        numbered[window[0]].append(window)
    expected = [numbered[e][k] for e, own in enumerate(wanted) for k in sorted(own) if k < len(numbered[e])]
    assert list(windows(some)) == expected and some.num_windows == len(some) == len(expected)
    assert some.groups([1] * len(spans))[1].tolist() == [sum(w[0] == e for w in expected) for e in range(len(spans))]
    assert [some.episodes_of([index])[0] for index in range(len(some))] == [window[0] for window in expected]


def test_known_counts():
    # A CALVIN span of 64 frames: 56 windows of 8 steps (frame `end` is never learned from), 7 segments of 8.
    assert segments.Segments([(0, 63)], window=8, chunk=10, windows_per_segment=1).num_windows == 56
    assert len(segments.Segments([(0, 63)], window=8, chunk=10, windows_per_segment=8)) == 7


def test_an_index_out_of_range_is_an_error():
    all_segments = segments.Segments([(0, 20)], window=8, chunk=2, windows_per_segment=4)
    with pytest.raises(IndexError, match=r"segment 4 is out of range; there are 4"):
        all_segments[len(all_segments)]
