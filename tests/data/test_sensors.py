"""Data halves of sensors: windows and masks against a loop, mixtures of unlike datasets, what LeRobot stores."""

from __future__ import annotations

import dataclasses
import math
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from experiments import convert_data, pack_calvin
from robovlms_jax.data import (
    base,
    calvin,
    cutting,
    excerpts,
    lerobot,
    mixing,
    packed,
    packing,
    rlds,
    samples,
    sensors,
    statistics,
)
from robovlms_jax.data.registry.entry import Entry
from robovlms_jax.inputs.sensors import Reading
from tests.data import toy_rlds
from tests.data.test_rlds import TOY

FRAMES = 24


class Recorded(base.Dataset):
    """Frame i reads [i, i + 0.5], except for what is changed; two episodes."""

    def __init__(self, spans=((0, 11), (12, 23)), values=None, field="force"):
        self.name, self.image_sizes, self._field = "recorded", {"static": (1, 1)}, field
        self.episodes = tuple(base.Episode(start, end, "push", "push") for start, end in spans)
        self.values = np.arange(FRAMES)[:, None] + np.array([0, 0.5]) if values is None else values
        self.num_frame_ids, self.statistics = FRAMES, statistics.compute(np.ones((9, 7)), np.zeros((9, 0)), 1)

    def images(self, frame_ids, cameras, out=None):
        out = self.allocate(len(frame_ids), cameras) if out is None else out
        for camera in cameras:
            for image in out[camera]:
                image[:] = 0
        return out

    def array(self, name, frame_ids):
        if name == "rel_actions":
            return np.ones((len(frame_ids), 7), np.float32)
        if name != self._field:
            raise ValueError(f"{self.name} stores no {name!r}; it has {self._field!r}.")
        return self.values[np.asarray(frame_ids)]


def source_of(dataset, *readings, left_pad=False, window=3, windows_per_segment=2):
    cut = cutting.Cut(window, 2, windows_per_segment, left_pad=left_pad)
    encode = lambda text: (np.ones(2, np.int32), np.ones(2, bool))  # noqa: E731
    halves = [sensors.make(reading) for reading in readings]
    return samples.SegmentSource(dataset, cut, cameras=("static",), encode_text=encode, sensors=halves)


@hypothesis.given(
    past=st.integers(0, 5),
    left_pad=st.booleans(),
    window=st.integers(1, 4),
    per_segment=st.integers(1, 3),
    silent=st.sets(st.integers(0, FRAMES - 1), max_size=8),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_readings_come_with_their_frames_those_before_and_a_mask(past, left_pad, window, per_segment, silent):
    dataset = Recorded()
    dataset.values[sorted(silent)] = np.nan
    reading = Reading("wrist_force", "vector", "force", (2,), past=past)
    source = source_of(dataset, reading, left_pad=left_pad, window=window, windows_per_segment=per_segment)
    for index in range(len(source)):
        sample, segment = source[index], source.segments[index]
        episode = dataset.episodes[sample.episode]
        padding = int(np.argmax(segment.seen_mask))
        first = int(segment.step_ids[padding]) - padding
        for row, frame in enumerate(range(first - past, first + source.segments.num_frames)):
            frame = min(max(frame, episode.start), episode.end)
            there = frame not in silent
            assert sample.inputs.sensor_mask["wrist_force"][row] == there
            expected = [frame, frame + 0.5] if there else [0, 0]
            np.testing.assert_array_equal(sample.inputs.sensors["wrist_force"][row], expected)
    blank = source.evaluation_batch(np.array([samples.PADDING, 0]))
    assert not blank.inputs.sensors["wrist_force"][0].any() and not blank.inputs.sensor_mask["wrist_force"][0].any()
    np.testing.assert_array_equal(blank.inputs.sensors["wrist_force"][1], source[0].inputs.sensors["wrist_force"])


def test_values_that_are_not_finite_are_no_echo_or_make_a_frame_unusable(caplog):
    dataset = Recorded()
    dataset.values[5] = [np.inf, 1.0]
    scan = Reading("lidar", "lidar", "force", (2,), no_return=8.0)
    np.testing.assert_array_equal(source_of(dataset, scan)[1].inputs.sensors["lidar"][3], [8.0, 1.0])
    strict = source_of(dataset, Reading("force", "vector", "force", (2,)))
    with pytest.raises(base.CorruptFrameError, match="recorded: frame 5 has values of force that are not finite"):
        strict[1]
    batch = strict.training_batch(np.array([1]), np.zeros(1, np.uint32))
    assert batch.corrupt[0] == 0 and np.isfinite(batch.inputs.sensors["force"]).all()


@hypothesis.given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_cloud_keeps_at_most_so_many_points_and_says_which_are_missing(wanted, stored, missing):
    reading = Reading("cloud", "pointcloud", "cloud", (wanted, 3), no_return=math.nan, any_rows=True)
    points = np.arange(stored * 3, dtype=np.float32).reshape(1, stored, 3) + 1
    points[:, stored - min(missing, stored - 1) :] = np.nan
    values, present, bad = reading.convert(points.reshape(1, -1))
    assert values.shape == (1, wanted, 3) and present.all() and not bad.any()
    kept = values[np.isfinite(values).all(axis=-1)]
    assert len(kept) <= min(wanted, stored) and {tuple(p) for p in kept} <= {tuple(p) for p in points[0]}
    if stored <= wanted:
        np.testing.assert_array_equal(kept, points[0][np.isfinite(points[0]).all(axis=-1)])


def test_a_field_that_is_not_there_or_has_another_size_is_refused_before_the_first_batch():
    with pytest.raises(ValueError, match="stores no 'torque'; it has 'force'"):
        source_of(Recorded(), Reading("torque", "vector", "torque", (2,)))
    message = r"'force', which the sensor 'f' of policy.sensors reads: it has 2 numbers per frame; expected 3"
    with pytest.raises(ValueError, match=message):
        source_of(Recorded(), Reading("f", "vector", "force", (3,)))


def test_in_a_mixture_datasets_without_the_sensor_are_masked(caplog):
    parts = [
        mixing.Part(name, Recorded(field=field), 1.0, Recorded().statistics)
        for name, field in (("arm", "force"), ("crane", "load"))
    ]
    dataset = pickle.loads(pickle.dumps(mixing.MixtureDataset("both", parts, "arm")))
    source = source_of(dataset, Reading("force", "vector", "force", (2,)))
    assert "no 'force' in crane; there, the sensor 'force' is masked" in caplog.text
    masks = [source[index].inputs.sensor_mask["force"] for index in range(len(source))]
    episodes = [int(source[index].episode) for index in range(len(source))]
    assert {episode for episode, mask in zip(episodes, masks) if mask.all()} == {0, 1}
    assert {episode for episode, mask in zip(episodes, masks) if not mask.any()} == {2, 3}
    with pytest.raises(ValueError, match="no dataset of the mixture stores 'torque'"):
        source_of(dataset, Reading("torque", "vector", "torque", (2,)))


def test_an_episode_is_read_with_what_a_robot_would_report():
    half = sensors.make(Reading("force", "imu", "force", (1, 2), past=3))
    arrays = excerpts.episode_arrays(Recorded(), Recorded().episodes[1], ("static",), [half])
    values, present = arrays.sensors["force"]
    np.testing.assert_array_equal(values[:, 0, 0], np.arange(12, 23))
    assert present.all()


def test_every_numeric_feature_of_a_lerobot_dataset_is_read_by_name(tmp_path):
    toy = pytest.importorskip("tests.data.toy_lerobot")
    root = toy.write(tmp_path / "arm", names=["x", "y", "z", "roll", "pitch", "yaw", "gripper"], files=[(0, 1), (2, 3)])
    dataset = pickle.loads(pickle.dumps(lerobot.open_dataset(root, "training")))
    stored = [toy.parquet.read_table(toy.data_file(root, number)).to_pylist() for number in (0, 1)]
    for episode in dataset.episodes:
        ids = np.arange(episode.start, episode.end)
        rows = [row for table in stored for row in table if row["episode_index"] == dataset.episodes.index(episode)]
        expected = [row["observation.state"] for row in rows[: len(ids)]]
        for name in ("state", "observation.state"):
            np.testing.assert_allclose(dataset.array(name, ids), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"stores no 'effort'; it has \['rel_actions'.*'observation.state'"):
        dataset.array("effort", [0])


def test_sensors_survive_packing_and_conversion_missing_values_included(write_calvin, tmp_path):
    torque = {frame: np.full(5, np.nan) if frame == 12 else np.arange(5.0) + frame for frame in range(10, 20)}
    change = {frame: {"torque": values} for frame, values in torque.items()}
    (root,) = {write_calvin([(10, 19)], split=split, change=change) for split in ("training", "validation")}
    ids, expected = np.arange(10, 20), np.float32(list(torque.values()))
    pack_calvin.main(pack_calvin.Args((root,), tmp_path / "packed", sensors=("torque",), workers=1))
    stored = calvin.open_dataset(tmp_path / "packed", "training")
    np.testing.assert_array_equal(stored.array("torque", ids), expected)
    values, present = sensors.make(Reading("torque", "vector", "torque", (5,))).read(stored, ids)
    assert present.tolist() == [frame != 12 for frame in range(10, 20)] and values[1].tolist() == expected[1].tolist()
    with pytest.raises(ValueError, match=r"stores no 'torqe'; its frames have .*'torque'"):
        packing.WithSensors(calvin.open_npz(root, "training"), ["torqe"])

    convert_data.main(convert_data.Args("calvin", tmp_path / "packed", tmp_path, "arm", sensors=("torque",)))
    entry = Entry("arm", wrist="wrist_image", sensors={"torque": "observation/torque"})
    read = rlds.open_dataset(tmp_path, entry, "training", options=rlds.Options(workers=1))
    np.testing.assert_array_equal(read.array("torque", np.arange(9)), expected[:9])


def test_a_lerobot_datasets_sensors_survive_packing(tmp_path):
    toy = pytest.importorskip("tests.data.toy_lerobot")
    root = toy.write(tmp_path / "arm", names=["x", "y", "z", "roll", "pitch", "yaw", "gripper"], files=[(0, 1), (2, 3)])
    arguments = convert_data.Args("lerobot", root, tmp_path / "packed", sensors=("observation.state",), workers=1)
    convert_data.main(arguments)
    stored, source = packed.PackedDataset(tmp_path / "packed" / "training"), lerobot.open_dataset(root, "training")
    ids = stored.frame_ids
    np.testing.assert_array_equal(*(x.array("observation.state", ids) for x in (stored, source)))


def test_every_numeric_array_of_calvins_frames_is_read_by_name(write_calvin):
    depth = {frame: {"depth_static": np.full((4, 6), frame, np.float64)} for frame in range(10, 30)}
    dataset = calvin.open_dataset(write_calvin([(10, 29)], change=depth), "training")
    source = source_of(dataset, Reading("depth", "depth", "depth_static", (4, 6), no_return=0.0))
    np.testing.assert_array_equal(source[0].inputs.sensors["depth"][:, 0, 0], [10, 11, 12, 13])
    with pytest.raises(ValueError, match=r"stores no 'depth_wrist'; its frames have \['actions', 'depth_static'"):
        dataset.array("depth_wrist", [10])
    with pytest.raises(ValueError, match="it has 24 numbers per frame; expected 25"):
        source_of(dataset, Reading("depth", "depth", "depth_static", (5, 5), no_return=0.0))


def test_an_rlds_description_names_the_fields_that_sensors_read(tmp_path):
    root = toy_rlds.write(tmp_path)
    entry = dataclasses.replace(TOY, sensors={"force": "observation/packed", "codes": "codes"})
    dataset = pickle.loads(pickle.dumps(rlds.open_dataset(root, entry, "training", options=rlds.Options(workers=1))))
    for seed, episode in enumerate(dataset.episodes):
        recorded = toy_rlds.episode(seed, episode.end - episode.start)
        ids = np.arange(episode.start, episode.end)
        np.testing.assert_array_equal(dataset.array("force", ids), recorded["steps/observation/packed"])
        np.testing.assert_array_equal(dataset.array("codes", ids), recorded["steps/codes"])
    sample = source_of(dataset, Reading("force", "vector", "force", (3,)))[0]
    np.testing.assert_array_equal(sample.inputs.sensors["force"], dataset.array("force", np.arange(4)))
    with pytest.raises(ValueError, match=r"stores no 'torque'.*under sensors: \['codes', 'force'\]"):
        dataset.array("torque", [0])
    for field, what in (
        ("observation/torque", "observation/torque"),
        ("observation/depth", r"81 numbers per step in \[9, 9\]; only vectors of up to 4096"),
    ):
        wrong = dataclasses.replace(TOY, sensors={"force": field})
        with pytest.raises(ValueError, match=what):
            rlds.open_dataset(root, wrong, "training", options=rlds.Options(workers=1))
