"""LIBERO in the three forms that it is published in: the same demonstration gives the same numbers and pictures."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from experiments import inspect_data
from experiments import libero as presets
from robovlms_jax import cli
from robovlms_jax.data import calvin, libero_hdf5, opening, packing
from robovlms_jax.data.config import DataConfig
from robovlms_jax.data.registry import libero

T, SIZE = 8, (12, 16)
CAMERAS = {"static": "agentview_rgb", "wrist": "eye_in_hand_rgb"}


def numbers(seed):
    """Of a demonstration: actions, xyz and rotation vector, fingers. Step 3 moves nothing, step 5 the gripper alone."""
    rng = np.random.default_rng(seed)
    actions = np.c_[rng.uniform(0.1, 0.9, (T, 6)), np.where(np.arange(T) >= 5, 1.0, -1.0)]
    actions[3, :6] = actions[5, :6] = 0
    fingers = np.where(np.arange(T) > 5, 0.01, 0.04)
    return actions, rng.uniform(-1, 1, (T, 6)), np.c_[fingers, -fingers]


def picture(seed, step, camera):
    """As OpenGL stores it, every pixel another."""
    image = np.arange(np.prod(SIZE) * 3, dtype=np.uint8).reshape(*SIZE, 3)
    return image + np.uint8(40 * seed + step + 100 * (camera == "wrist"))


@pytest.fixture
def hdf5():
    return pytest.importorskip("h5py")


def write_hdf5(h5py, path, demos=3, change=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": ["turn on ", "the stove"]})
        for seed in range(demos):
            demo = data.create_group(f"demo_{seed}")
            actions, poses, fingers = numbers(seed)
            fields = {"actions": actions, "obs/ee_states": poses, "obs/gripper_states": fingers}
            for camera, key in CAMERAS.items():
                fields[f"obs/{key}"] = np.stack([picture(seed, step, camera) for step in range(T)])
            if change:
                change(fields)
            for name, values in fields.items():
                demo[name] = values
    return path


@pytest.mark.parametrize("dataset", ["", "libero_hdf5"])
def test_hdf5_files_are_looked_at_before_training(tmp_path, hdf5, dataset):
    write_hdf5(hdf5, tmp_path / "libero_goal" / "turn_on_the_stove_demo.hdf5")
    page, refusals = inspect_data.main(inspect_data.Args(str(tmp_path), dataset, str(tmp_path / "page")))
    text = (page.parent / "summary.md").read_text()
    assert not refusals and "LIBERO's HDF5 files" in text and "turn on the stove" in page.read_text()


def test_hdf5_files_are_read_upright_with_openvlas_conventions(tmp_path, hdf5):
    write_hdf5(hdf5, tmp_path / "libero_goal" / "turn_on_the_stove_demo.hdf5")
    settings = DataConfig(dataset="libero_hdf5", root=str(tmp_path))
    training, validation = (opening.open_split(settings, split) for split in ("training", "validation"))
    assert [len(split.episodes) for split in (training, validation)] == [2, 1]
    episode = training.episodes[1]
    assert (episode.instruction, episode.task) == ("turn on the stove", "turn_on_the_stove")
    ids = np.arange(episode.start, episode.end + 1)
    actions, poses, fingers = numbers(1)
    kept = np.array([0, 1, 2, 4, 5, 6, 7])  # step 3 moves nothing; step 5 closes the gripper
    assert len(ids) == len(kept) + 1
    np.testing.assert_allclose(training.actions(ids[:-1])[:, :6], actions[kept, :6], atol=1e-6)
    np.testing.assert_array_equal(training.actions(ids)[:, 6], [1, 1, 1, 1, -1, -1, -1, -1])  # +1 opens here
    assert not training.actions(ids[-1:])[0, :6].any()
    state = training.proprio(ids[:-1])
    np.testing.assert_allclose(state[:, :3], poses[kept, :3], atol=1e-6)
    np.testing.assert_allclose(state[:, 3:6], Rotation.from_rotvec(poses[kept, 3:]).as_euler("xyz"), atol=1e-5)
    np.testing.assert_allclose(training.gripper_opening(ids[:-1]), fingers[kept, 0], atol=1e-6)
    for camera in CAMERAS:
        found = training.images(ids[[2, 3, -1]], [camera])[camera]
        for image, step in zip(found, (2, 4, 7)):
            np.testing.assert_array_equal(image, np.rot90(picture(1, step, camera), 2))
    assert training.robot.action == libero.ENTRIES["libero_goal_no_noops"].robot.action
    assert training.robot.state == libero.ENTRIES["libero_goal_no_noops"].robot.state
    assert training.action_units == (0.05,) * 3 + (0.5,) * 3
    assert training.statistics.num_trajectories == 2
    again = pickle.loads(pickle.dumps(training))  # as worker processes get it
    np.testing.assert_array_equal(again.images([0], ["wrist"])["wrist"], training.images([0], ["wrist"])["wrist"])


def test_hdf5_files_can_be_packed(tmp_path, hdf5):
    write_hdf5(hdf5, tmp_path / "raw" / "a_demo.hdf5")
    source = libero_hdf5.LiberoDataset(tmp_path / "raw", "training")
    ids = np.concatenate([np.arange(episode.start, episode.end + 1) for episode in source.episodes])
    packing.pack(source, tmp_path / "packed" / "training", frame_ids=ids, codec="png")
    packed = calvin.open_dataset(tmp_path / "packed", "training")
    np.testing.assert_array_equal(packed.actions(ids), source.actions(ids))
    np.testing.assert_array_equal(packed.proprio(ids), source.proprio(ids))
    assert packed.robot == source.robot and packed.episodes == source.episodes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.pop("obs/ee_states"), r"has no data/demo_0/obs/ee_states; data/demo_0/obs has \['agent"),
        (
            lambda fields: fields.update(actions=np.zeros((T, 8))),
            r"data/demo_0/actions is \[8, 8\], expected \[steps, 7\]",
        ),
        (
            lambda fields: fields.update({"obs/agentview_rgb": np.zeros((T, 4, 4, 1), np.uint8)}),
            r"obs/agentview_rgb is uint8\[8, 4, 4, 1\], expected uint8\[8, height, width, 3\]",
        ),
        (lambda fields: fields["actions"].__setitem__((2, 1), np.nan), "with values that are not finite"),
    ],
)
def test_hdf5_files_of_another_layout_are_refused_by_name(tmp_path, hdf5, change, message):
    path = write_hdf5(hdf5, tmp_path / "a_demo.hdf5", change=change)
    with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
        libero_hdf5.LiberoDataset(tmp_path, "training")


def test_hdf5_files_that_are_none_or_say_nothing_are_refused_by_name(tmp_path, hdf5):
    with pytest.raises(ValueError, match=r"has no \*.hdf5"):
        libero_hdf5.LiberoDataset(tmp_path, "training")
    (tmp_path / "a_demo.hdf5").write_bytes(b"not this")
    with pytest.raises(ValueError, match=r"a_demo.hdf5 is no readable HDF5 file"):
        libero_hdf5.LiberoDataset(tmp_path, "training")
    with hdf5.File(tmp_path / "a_demo.hdf5", "w") as file:
        file.create_group("data").create_group("demo_0")
    with pytest.raises(ValueError, match="problem_info of data has no language_instruction"):
        libero_hdf5.LiberoDataset(tmp_path, "training")


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install .*\[libero\]"):
        libero_hdf5.LiberoDataset(tmp_path, "training")


@pytest.mark.parametrize("layout", libero._LEROBOT, ids=lambda names: names[1])
def test_copies_as_lerobot_datasets_mean_the_same(tmp_path, layout):
    toy = pytest.importorskip("tests.data.toy_lerobot")
    static, wrist, state, action = layout
    root = toy.write(tmp_path, cameras=(static, wrist), names=["x", "y", "z", "roll", "pitch", "yaw", "gripper"])
    rename_features(root, {"action": action, "observation.state": state})
    fill(root, action, state)
    settings = DataConfig(dataset="lerobot", root=str(root), conventions="libero")
    dataset = opening.open_split(settings, "training")
    ids = np.arange(dataset.episodes[0].start, dataset.episodes[0].end)
    actions, poses, _ = numbers(0)
    np.testing.assert_allclose(dataset.actions(ids)[:, :6], actions[: len(ids), :6], atol=1e-6)
    np.testing.assert_array_equal(dataset.actions(ids)[:, 6], -actions[: len(ids), 6])
    angles = Rotation.from_rotvec(poses[: len(ids), 3:]).as_euler("xyz")
    np.testing.assert_allclose(dataset.proprio(ids)[:, 3:6], angles, atol=1e-5)
    assert dataset.robot.action == libero.HDF5.robot.action and dataset.action_units == (0.05,) * 3 + (0.5,) * 3
    assert list(dataset.cameras) == ["static", "wrist"]


def rename_features(root, names):
    from tests.data.toy_lerobot import parquet

    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"] = {names.get(name, name): feature for name, feature in info["features"].items()}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    for path in (root / "data").rglob("*.parquet"):
        table = parquet.read_table(path)
        parquet.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), path)


def fill(root, action, state):
    """The demonstration's numbers in every episode."""
    from tests.data.toy_lerobot import pa, parquet

    actions, poses, fingers = numbers(0)
    for path in (root / "data").rglob("*.parquet"):
        table = parquet.read_table(path)
        rows = np.array(table["frame_index"].to_pylist())
        for name, values in ((action, actions), (state, np.c_[poses, fingers])):
            column = pa.array(values[rows].astype(np.float32).tolist(), pa.list_(pa.float32()))
            table = table.set_column(table.column_names.index(name), name, column)
        parquet.write_table(table, path)


def test_other_features_are_not_taken_for_libero():
    with pytest.raises(ValueError, match=r"data.conventions=libero: the dataset has features \['action'\]"):
        libero.lerobot_conventions(["action"])


def test_presets_take_both_cameras_and_every_form():
    for name, config in presets.PRESETS.items():
        assert config.policy.cameras == ("static", "wrist") and config.policy.action_scaling == "quantile"
        assert config.train.output == f"runs/{name}"
    changed = cli.override(presets.FLOW, **{"data.dataset": "libero_hdf5", "data.root": "x"})
    assert dataclasses.asdict(changed.policy) == dataclasses.asdict(presets.FLOW.policy)
