"""Batches: what is in them, in which order they come, and what happens when a frame cannot be read."""

from __future__ import annotations

import contextlib
import itertools
import json
import time

import jax
import numpy as np
import pytest
from PIL import Image

from robovlms_jax import types
from robovlms_jax.data import base, calvin, cutting, excerpts, loading, samples, sensors
from robovlms_jax.inputs.sensors import Reading

STATE = sensors.make(Reading("proprio", "proprio", "robot_obs", (7,)))
PAST = sensors.make(Reading("action_history", "action_history", "rel_actions", (7,), past=1))
SPANS = [(100, 122), (110, 130), (140, 146), (150, 162)]
W, C, K = 8, 4, 3
CAMERAS = ("wrist", "static")


def encode_text(text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.frombuffer(text.encode()[:24].ljust(24, b"\0"), np.uint8).astype(np.int32)
    return ids, ids > 0


def make_source(dataset: base.Dataset, *, window=W, chunk=C, windows_per_segment=K, **options) -> samples.SegmentSource:
    options = {"cameras": CAMERAS, "encode_text": encode_text, **options}
    more = {name: options.pop(name) for name in {*options} & {*cutting.Cut.__dataclass_fields__}}
    return samples.SegmentSource(dataset, cutting.Cut(window, chunk, windows_per_segment, **more), **options)


def take(batches, count: int | None = None) -> list[types.Batch]:
    with contextlib.closing(batches):
        return list(itertools.islice(batches, count))


def train(source: samples.SegmentSource, count: int, **options) -> list[types.Batch]:
    options = {"segments_per_batch": 4, "seed": 3, "num_threads": 2, "prefetch": 2, **options}
    return take(loading.train_batches(source, **options), count)


def assert_same(a: types.Batch, b: types.Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def join(parts: list[types.Batch]) -> types.Batch:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def windows_of(batch: types.Batch) -> list[tuple[int, float]]:
    """(episode, first action value) of each window that counts; the value tells frames apart."""
    return [
        (int(batch.episode[row]), float(batch.actions[row, k, 0])) for row, k in np.argwhere(batch.window_mask).tolist()
    ]


@pytest.fixture
def dataset(write_calvin) -> base.Dataset:
    return calvin.open_dataset(write_calvin(SPANS), "training")


def test_a_sample_is_frames_raw_actions_and_masks(dataset, frame_content):
    source = make_source(dataset)
    # Episode 0: 23 frames, 22 steps, 15 windows, 5 segments of 3. Episode 1: 13 windows, the last segment carries one.
    assert len(source) == 5 + 5 + 0 + 2
    assert source.num_windows == 15 + 13 + 0 + 5
    sample = source[9]
    steps = np.minimum(122 + np.arange(W + K - 1 + C - 1), 130)
    for camera, key in (("static", "rgb_static"), ("wrist", "rgb_gripper")):
        frames = np.stack([frame_content(frame_id)[key] for frame_id in steps[: W + K - 1]])
        np.testing.assert_array_equal(sample.inputs.images[camera], frames)
    actions = np.stack([frame_content(frame_id)["rel_actions"] for frame_id in steps])
    np.testing.assert_array_equal(sample.actions, actions.astype(np.float32))
    np.testing.assert_array_equal(sample.action_mask, 122 + np.arange(W + K - 1 + C - 1) < 130)
    np.testing.assert_array_equal(sample.window_mask, [True, False, False])
    np.testing.assert_array_equal(sample.inputs.text_ids, encode_text("turn on led")[0])
    np.testing.assert_array_equal(sample.inputs.text_mask, encode_text("turn on led")[1])
    assert sample.inputs.step_mask.all()
    assert (sample.episode, sample.corrupt) == (1, -1)


def test_batches_have_the_documented_shapes_and_types(dataset):
    (batch,) = train(make_source(dataset), 1)
    frames = W + K - 1
    expected = types.Batch(
        inputs=types.Inputs(
            images={"static": ((4, frames, 40, 40, 3), np.uint8), "wrist": ((4, frames, 32, 32, 3), np.uint8)},
            text_ids=((4, 24), np.int32),
            text_mask=((4, 24), bool),
            step_mask=((4, frames), bool),
        ),
        actions=((4, frames + C - 1, 7), np.float32),
        action_mask=((4, frames + C - 1), bool),
        window_mask=((4, K), bool),
        episode=((4,), np.int32),
        corrupt=((4,), np.int32),
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch) == expected
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch))


def test_robot_states_come_with_their_frames_when_asked_for(dataset, frame_content):
    assert make_source(dataset)[9].inputs.sensors == {}
    source = make_source(dataset, sensors=[STATE])
    columns = [0, 1, 2, 3, 4, 5, 14]  # pose and last gripper command
    steps = np.minimum(122 + np.arange(W + K - 1), 130)  # the last segment: one window, then repeats
    expected = np.stack([frame_content(frame_id)["robot_obs"][columns] for frame_id in steps])
    np.testing.assert_array_equal(source[9].inputs.sensors["proprio"], expected.astype(np.float32))
    arrays = excerpts.episode_arrays(dataset, dataset.episodes[1], (), [STATE, PAST])
    assert list(arrays.sensors) == ["proprio"]  # what a policy did, it knows itself
    states, present = arrays.sensors["proprio"]
    np.testing.assert_array_equal(states[12:], expected[: len(states) - 12].astype(np.float32))
    assert present.all() and len(present) == len(states)
    (batch,) = take(loading.evaluation_batches(source, segments_per_batch=16, num_threads=1, prefetch=1))
    assert batch.inputs.sensors["proprio"].shape == (16, W + K - 1, 7)


def test_past_actions_future_frames_and_sentences_when_asked_for(dataset, frame_content):
    sentences = {"open drawer": np.float32([1, 0]), "turn on led": np.float32([0, 1])}
    source = make_source(
        dataset, sensors=[PAST], future_frames=4, embed_sentence=lambda text: sentences.get(text, np.zeros(2, "f4"))
    )
    # Episode 1, frames 110 ... 130. Segment 5 begins with it, segment 9 near its end (frame 122, G = 10).
    for index, begin in ((5, 110), (9, 122)):
        sample, frames = source[index], W + K - 1
        steps = np.minimum(begin - 2 + np.arange(frames + 1), 130)
        past = [np.full(7, np.nan) if step < 110 else frame_content(step)["rel_actions"] for step in steps]
        np.testing.assert_array_equal(sample.inputs.sensors["action_history"], np.float32(past))
        after = begin + frames + np.arange(4)
        np.testing.assert_array_equal(sample.future_mask, after <= 130)
        for camera, key in (("static", "rgb_static"), ("wrist", "rgb_gripper")):
            expected = np.stack([frame_content(min(step, 130))[key] for step in after])
            np.testing.assert_array_equal(sample.future[camera], expected)
        np.testing.assert_array_equal(sample.sentence, [0, 1])
    (batch,) = take(loading.evaluation_batches(source, segments_per_batch=16, num_threads=1, prefetch=1))
    assert batch.future["static"].shape == (16, 4, 40, 40, 3)


def test_batches_of_one_segment(dataset):
    batches = train(make_source(dataset), 3, segments_per_batch=1)
    assert [batch.actions.shape[0] for batch in batches] == [1, 1, 1]


def test_an_action_sample_is_spread_over_learned_frames(write_calvin, frame_content):
    dataset = calvin.open_dataset(write_calvin(SPANS[:1]), "training")
    actions, openings = excerpts.action_sample(dataset, 3)
    expected = [frame_content(frame_id) for frame_id in (100, 110, 121)]  # frame 122, the last, is not learned from
    np.testing.assert_array_equal(actions, np.float32([content["rel_actions"] for content in expected]))
    np.testing.assert_array_equal(openings, np.float32([content["robot_obs"][6] for content in expected]))
    np.savez(dataset.path(105), **{**frame_content(105), "rel_actions": np.full(7, np.nan)})
    actions, openings = excerpts.action_sample(dataset, 100)
    assert openings is None
    np.testing.assert_array_equal(actions[4:6, 0], np.float32([frame_content(i)["rel_actions"][0] for i in (104, 106)]))


def test_windows_of_a_segment_equal_windows_alone(dataset):
    """Slicing window k out of a segment gives upstream's sample of that window."""
    alone = {
        windows_of(jax.tree.map(lambda x: x[None], sample))[0]: sample
        for sample in make_source(dataset, windows_per_segment=1)
    }
    shared = make_source(dataset)
    seen = 0
    for sample in shared:
        for k in np.flatnonzero(sample.window_mask):
            other = alone[int(sample.episode), float(sample.actions[k, 0])]
            for camera in CAMERAS:
                np.testing.assert_array_equal(sample.inputs.images[camera][k : k + W], other.inputs.images[camera])
            np.testing.assert_array_equal(sample.actions[k : k + W + C - 1], other.actions)
            np.testing.assert_array_equal(sample.action_mask[k : k + W + C - 1], other.action_mask)
            seen += 1
    assert seen == len(alone) == shared.num_windows


@pytest.mark.parametrize("windows_per_segment", [1, 3])
def test_a_batch_is_its_segments_side_by_side(dataset, windows_per_segment):
    # Segments that begin before their episode, end after it, or share frames with others of the batch.
    source = make_source(
        dataset,
        windows_per_segment=windows_per_segment,
        left_pad=True,
        sensors=[STATE, PAST],
        future_frames=3,
        embed_sentence=lambda text: np.full(2, len(text), np.float32),
    )
    order = np.random.default_rng(0).permutation(len(source))
    alone = jax.tree.map(lambda *leaves: np.stack(leaves), *[source[index] for index in order.tolist()])
    assert_same(source.training_batch(order, np.zeros(len(order), np.uint32)), alone)
    assert_same(source.evaluation_batch(order), alone)


def test_no_frame_is_read_twice_or_ahead(dataset, monkeypatch):
    read = {"images": [], "rel_actions": []}
    images, array = calvin.NpzDataset.images, calvin.NpzDataset.array
    monkeypatch.setattr(
        calvin.NpzDataset, "images", lambda self, ids, *rest: read["images"].extend(ids) or images(self, ids, *rest)
    )
    monkeypatch.setattr(
        calvin.NpzDataset, "array", lambda self, name, ids: read[name].extend(ids) or array(self, name, ids)
    )
    source = make_source(dataset)
    source[0]
    assert read == {
        "images": list(range(100, 100 + W + K - 1)),
        "rel_actions": list(range(100, 100 + W + K - 1 + C - 1)),
    }
    read["images"].clear()
    read["rel_actions"].clear()
    source[9]
    assert read == {"images": list(range(122, 131)), "rel_actions": list(range(122, 131))}


def test_text_is_encoded_once_per_sentence(write_calvin):
    calls = []
    root = write_calvin([(0, 20), (5, 25), (20, 40)], tasks=["open_drawer", "turn_on_led", "open_drawer"])
    source = make_source(
        calvin.open_dataset(root, "training"), encode_text=lambda text: calls.append(text) or encode_text(text)
    )
    train(source, 3)
    assert calls == ["open drawer", "turn on led"]


def test_every_epoch_sees_every_window_once_in_a_new_order(dataset):
    source = make_source(dataset)
    epochs = [
        [window for batch in train(source, 3, start_step=3 * epoch) for window in windows_of(batch)] for epoch in (0, 1)
    ]
    every = [window for sample in source for window in windows_of(jax.tree.map(lambda x: x[None], sample))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(every)
    assert len(set(every)) == source.num_windows
    assert epochs[0] != epochs[1] != every


def test_the_seed_alone_decides_the_order(dataset):
    source = make_source(dataset)
    first = join(train(source, 4))
    assert_same(first, join(train(source, 4, num_threads=5, prefetch=1)))
    assert not np.array_equal(first.actions, join(train(source, 4, seed=4)).actions)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(dataset, processes):
    source = make_source(dataset)
    parts = [train(source, 5, process=(index, processes)) for index in range(processes)]
    for whole, *shares in zip(train(source, 5), *parts, strict=True):
        assert all(len(share.episode) == 4 // processes for share in shares)
        assert_same(whole, join(shares))


@pytest.mark.parametrize("step", [1, 7])
def test_starting_at_a_step_continues_exactly(dataset, step):
    source = make_source(dataset)
    whole = train(source, step + 3)
    for a, b in zip(whole[step:], train(source, 3, start_step=step), strict=True):
        assert_same(a, b)


def test_more_threads_than_batches_kept_ready_are_no_reason_to_warn(dataset, caplog):
    source, options = make_source(dataset), {"segments_per_batch": 4, "num_threads": 8, "prefetch": 2}
    assert train(source, 1, **options) and take(loading.evaluation_batches(source, **options)) and not caplog.records


def test_a_batch_larger_than_an_epoch_is_filled_from_the_next(dataset):
    source = make_source(dataset)
    (batch,) = train(source, 1, segments_per_batch=2 * len(source))
    counts = np.unique(windows_of(batch), axis=0, return_counts=True)[1]
    assert set(counts.tolist()) == {2}


def test_a_batch_that_does_not_divide_over_processes_is_refused(dataset):
    with pytest.raises(ValueError, match="6 segments per batch do not divide over 4 processes; try 4"):
        loading.train_batches(make_source(dataset), segments_per_batch=6, seed=0, process=(0, 4))


# Evaluation.


def evaluate(source: samples.SegmentSource, **options) -> list[types.Batch]:
    options = {"segments_per_batch": 8, "num_threads": 2, "prefetch": 2, **options}
    return take(loading.evaluation_batches(source, **options))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_sees_everything_once_and_pads_the_last_batch(dataset, processes):
    source = make_source(dataset)
    parts = [evaluate(source, process=(index, processes)) for index in range(processes)]
    assert all(len(part) == 2 for part in parts)
    whole = [join(list(shares)) for shares in zip(*parts, strict=True)]
    for a, b in zip(whole, evaluate(source), strict=True):
        assert_same(a, b)
    found = sorted(window for batch in whole for window in windows_of(batch))
    every = sorted(window for sample in source for window in windows_of(jax.tree.map(lambda x: x[None], sample)))
    assert found == every
    padding = ~whole[1].window_mask.any(axis=1)
    assert padding.tolist() == [False] * 4 + [True] * 4
    assert not whole[1].action_mask[padding].any()
    assert whole[1].inputs.step_mask.all()
    assert whole[1].inputs.text_mask.any(axis=1).all()
    assert not whole[1].inputs.images["static"][padding].any()


def test_few_evaluation_batches_come_from_many_episodes(dataset):
    (batch,) = evaluate(make_source(dataset), num_batches=1)
    assert set(batch.episode.tolist()) == {0, 1, 3}


# What is refused on construction.


def test_an_unknown_camera_is_refused(dataset):
    with pytest.raises(ValueError, match=r"has no camera \['overhead'\]"):
        make_source(dataset, cameras=("static", "overhead"))


def test_episodes_too_short_for_the_window_are_refused(dataset):
    with pytest.raises(
        ValueError, match=r"none of 4 episodes is long enough for policy\.window=40; the longest has 22"
    ):
        make_source(dataset, window=40)


def test_prompts_of_unequal_length_are_refused(dataset):
    with pytest.raises(ValueError, match=r"pad every prompt to one length.*11: 'turn on led', 20: 'push blue"):
        make_source(dataset, encode_text=lambda text: (np.zeros(len(text), np.int32), np.ones(len(text), bool)))


# Around the batches.


def test_measure_counts_windows_per_second():
    def slow():
        while True:
            time.sleep(0.01)
            yield None

    assert 40 < loading.measure(slow(), windows_per_batch=1, seconds=0.2) <= 100


def test_an_episode_in_one_piece(dataset, frame_content):
    episode = dataset.episodes[3]
    arrays = excerpts.episode_arrays(dataset, episode, ("static",))
    assert set(arrays.images) == {"static"}
    assert len(arrays.actions) == len(arrays.images["static"]) == 12
    np.testing.assert_array_equal(arrays.images["static"][-1], frame_content(161)["rgb_static"])
    np.testing.assert_array_equal(arrays.actions[0], frame_content(150)["rel_actions"].astype(np.float32))


# RoboVLMs' own numbers.

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def upstream(golden, shared_data, tmp_path) -> tuple[base.Dataset, dict[str, np.ndarray], list[str]]:
    """The fabricated folder that RoboVLMs read, and what its dataset gave at window 8, chunk 10."""
    tiny = shared_data / "golden" / "calvin_tiny"
    folder = tmp_path / "training"
    folder.mkdir()
    for path in (tiny / "training").iterdir():
        (folder / path.name).symlink_to(path)
    np.save(folder / "auto_lang_ann.npy", json.loads((tiny / "lang_ann.json").read_text()))
    meta = json.loads((shared_data / "golden" / "calvin" / "meta.json").read_text())
    return calvin.open_dataset(tmp_path, "training"), golden("calvin/w8c10.npz"), meta["variants"]["w8c10"]["raw_text"]


@pytest.mark.parametrize("windows_per_segment", [1, 8])
def test_windows_equal_those_of_upstream(upstream, windows_per_segment):
    dataset, expected, sentences = upstream
    source = make_source(dataset, window=8, chunk=10, windows_per_segment=windows_per_segment)
    assert source.num_windows == len(expected["action"]) == 68
    number = 0
    for sample in source:
        for k in np.flatnonzero(sample.window_mask):
            actions = sample.actions[k : k + 17].copy()
            actions[:, 6] = (
                actions[:, 6] + 1
            ) // 2  # upstream maps the gripper to {0, 1} in the loader, we on the device
            np.testing.assert_array_equal(actions, expected["action"][number])
            chunks = np.stack([actions[step : step + 10] for step in range(8)])
            np.testing.assert_array_equal(chunks, expected["action_chunck"][number])
            mask = sample.action_mask[k : k + 17]
            chunk_mask = np.stack([mask[step : step + 10] for step in range(8)])
            np.testing.assert_array_equal(chunk_mask, expected["chunck_mask"][number].astype(bool))
            assert dataset.episodes[sample.episode].instruction == sentences[number]
            for camera, name in (("static", "rgb_mean"), ("wrist", "hand_rgb_mean")):
                means = [upstream_mean(frame) for frame in sample.inputs.images[camera][k : k + 8]]
                np.testing.assert_allclose(means, expected[name][number], atol=2e-3)
            number += 1
    assert number == 68


def upstream_mean(frame: np.ndarray) -> float:
    """Mean of a frame after upstream's image processing: bicubic to 28 x 28, CLIP's normalisation."""
    small = np.asarray(Image.fromarray(frame).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    return float(((small - CLIP_MEAN) / CLIP_STD).mean())
