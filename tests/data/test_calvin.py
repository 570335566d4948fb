"""The published layout: what is read, and what is said when something is wrong."""

from __future__ import annotations

import json
import logging
import pathlib
import pickle

import numpy as np
import pytest

from robovlms_jax.data import base, calvin


def test_frames_and_episodes_are_read(write_calvin, frame_content):
    root = write_calvin([(100, 112), (105, 120)])
    dataset = calvin.open_dataset(root, "training")
    assert dataset.episodes == (
        base.Episode(100, 112, "open drawer", "open_drawer"),
        base.Episode(105, 120, "turn on led", "turn_on_led"),
    )
    assert dataset.image_sizes == {"static": (40, 40), "wrist": (32, 32)}
    ids = [118, 103, 103]
    images = dataset.images(ids, ("wrist", "static"))
    for row, frame_id in enumerate(ids):
        np.testing.assert_array_equal(images["static"][row], frame_content(frame_id)["rgb_static"])
        np.testing.assert_array_equal(images["wrist"][row], frame_content(frame_id)["rgb_gripper"])
        np.testing.assert_array_equal(
            dataset.actions(ids)[row], frame_content(frame_id)["rel_actions"].astype(np.float32)
        )
    assert dataset.actions(ids).dtype == np.float32
    assert dataset.robot_obs(ids).shape == (3, 15)
    assert dataset.scene_obs(ids).shape == (3, 24)


def test_only_the_wanted_camera_is_read(write_calvin):
    root = write_calvin([(0, 12)], change={5: {"rgb_gripper": None}})
    dataset = calvin.open_dataset(root, "training")
    assert set(dataset.images([5], ("static",))) == {"static"}
    with pytest.raises(base.CorruptFrameError, match=r"episode_0000005\.npz.*rgb_gripper"):
        dataset.images([5], ("static", "wrist"))


def test_a_dataset_survives_pickling(write_calvin):
    dataset = calvin.open_dataset(write_calvin([(0, 12)]), "training")
    again = pickle.loads(pickle.dumps(dataset))
    assert again.episodes == dataset.episodes
    np.testing.assert_array_equal(again.images([3], ("static",))["static"], dataset.images([3], ("static",))["static"])


def test_file_names_are_found_from_the_directory(write_calvin):
    root = write_calvin([(0, 3)])
    for path in sorted((root / "training").glob("*.npz")):
        path.rename(path.with_name(f"frame-{int(path.stem.split('_')[1]):04d}.npz"))
    (root / "training" / "other_1.npz").touch()
    assert calvin.open_dataset(root, "training").path(2).name == "frame-0002.npz"


def test_annotations_may_lie_beside_the_frames(write_calvin):
    root = write_calvin([(0, 3)])
    (root / "training" / "lang_annotations" / "auto_lang_ann.npy").rename(root / "training" / "auto_lang_ann.npy")
    assert len(calvin.open_dataset(root, "training").episodes) == 1


def test_the_npz_layout_says_how_to_load_faster(write_calvin, caplog):
    caplog.set_level(logging.INFO)
    root = write_calvin([(0, 3)])
    calvin.open_dataset(root, "training")
    assert f"python -m experiments.pack_calvin --root {root}" in caplog.text


# What is wrong with the folder -> how it is said.


def test_a_missing_root_names_the_nearest_folder(tmp_path):
    (tmp_path / "task_D_D").mkdir()
    with pytest.raises(ValueError, match=r"looked for .*nowhere/training.*does not exist\. .* holds task_D_D\."):
        calvin.open_dataset(tmp_path / "nowhere", "training")


def test_an_empty_root_is_said_to_be_empty(tmp_path):
    with pytest.raises(ValueError, match=r"looked for .*training with CALVIN frames.* holds nothing"):
        calvin.open_dataset(tmp_path, "training")


@pytest.mark.parametrize("levels", ["above", "below"])
def test_a_root_one_level_off_is_corrected(write_calvin, levels):
    root = write_calvin([(0, 3)])
    wrong, hint = (
        (root.parent, "Did you mean") if levels == "above" else (root / "training", "Pass the directory above it")
    )
    with pytest.raises(ValueError, match=f"{hint}.* {root}"):
        calvin.open_dataset(wrong, "training")


def test_a_split_without_frames_lists_what_it_holds(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "readme.txt").touch()
    with pytest.raises(ValueError, match=r"holds neither CALVIN frames .* nor a packed split .*it holds readme\.txt"):
        calvin.open_dataset(tmp_path, "training")


def test_missing_annotations_name_other_folders(write_calvin):
    root = write_calvin([(0, 3)])
    (root / "training" / "lang_annotations").rename(root / "training" / "lang_other")
    with pytest.raises(ValueError, match=r"looked for .*lang_annotations/auto_lang_ann\.npy.*one of \['lang_other'\]"):
        calvin.open_dataset(root, "training")
    assert calvin.open_dataset(root, "training", annotation_folder="lang_other").episodes


def test_an_annotation_beyond_the_frames_names_the_file(write_calvin):
    root = write_calvin([(10, 20)], frames=range(10, 19))
    with pytest.raises(
        ValueError, match=r"frames 10 to 20, but episode_0000019\.npz is missing .* has 9 frames, 10 to 18"
    ):
        calvin.open_dataset(root, "training")


def test_an_annotation_with_a_hole_names_the_file(write_calvin):
    root = write_calvin([(10, 14)], frames=[10, 11, 13, 14])
    with pytest.raises(ValueError, match=r"episode_0000012\.npz is missing"):
        calvin.open_dataset(root, "training")


def test_an_episode_that_ends_before_it_starts_is_refused(write_calvin):
    root = write_calvin([(5, 3)], frames=range(10))
    with pytest.raises(ValueError, match="ends at frame 3, before its start 5"):
        calvin.open_dataset(root, "training")


class _Malice:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("never"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Malice(), "cannot be read: it asks for pathlib"),
        ({"language": {}}, "not CALVIN's annotation dictionary"),
        ({"language": {"ann": ["a"], "task": []}, "info": {"indx": [(0, 3)]}}, "of one length"),
        ({"language": {"ann": [], "task": []}, "info": {"indx": []}}, "annotates no episode"),
        (np.zeros(3), r"it holds float64\[3\], expected one pickled dictionary"),
    ],
)
def test_bad_annotations_are_refused_without_running_them(write_calvin, monkeypatch, tmp_path, content, message):
    monkeypatch.chdir(tmp_path)
    root = write_calvin([(0, 3)])
    np.save(root / "training" / "lang_annotations" / "auto_lang_ann.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        calvin.open_dataset(root, "training")
    assert not pathlib.Path("never").exists()


def test_truncated_annotations_are_named(write_calvin):
    path = write_calvin([(0, 3)]) / "training" / "lang_annotations" / "auto_lang_ann.npy"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"auto_lang_ann\.npy cannot be read"):
        calvin.open_dataset(path.parents[2], "training")


@pytest.mark.parametrize("keep", [0, 10, 4000, -30])
def test_a_truncated_frame_is_named(write_calvin, keep):
    root = write_calvin([(0, 5)])
    path = root / "training" / "episode_0000003.npz"
    path.write_bytes(path.read_bytes()[:keep])
    dataset = calvin.open_dataset(root, "training")
    with pytest.raises(base.CorruptFrameError, match=r"episode_0000003\.npz cannot be read"):
        dataset.images([2, 3], ("static",))
    with pytest.raises(base.CorruptFrameError, match=r"episode_0000003\.npz cannot be read"):
        dataset.actions([2, 3])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rel_actions", np.full(7, np.nan), "rel_actions .*every value must be finite"),
        ("rel_actions", np.zeros(6), r"rel_actions is float32\[6\], expected float32\[7\]"),
        (
            "rgb_static",
            np.zeros((50, 40, 3), np.uint8),
            r"rgb_static is uint8\[50, 40, 3\], expected uint8\[40, 40, 3\]",
        ),
        ("rgb_static", np.zeros((40, 40, 3), np.float32), "rgb_static is float32"),
    ],
)
def test_a_frame_of_wrong_content_is_named(write_calvin, key, value, message):
    dataset = calvin.open_dataset(write_calvin([(0, 5)], change={3: {key: value}}), "training")
    with pytest.raises(base.CorruptFrameError, match=rf"episode_0000003\.npz.*{message}"):
        dataset.images([3], ("static",)) if key == "rgb_static" else dataset.actions([3])


def test_frames_without_actions_are_refused_on_opening(write_calvin):
    root = write_calvin([(0, 2)], change={0: {"rel_actions": None}})
    with pytest.raises(ValueError, match="a CALVIN frame needs rel_actions"):
        calvin.open_dataset(root, "training")


def test_a_frame_key_by_another_name_is_pointed_at(write_calvin):
    """Frames of a converter that spells its keys otherwise."""
    root = write_calvin([(0, 2)], change={0: {"rel_actions": None, "actions": None, "rel_action": np.zeros(7)}})
    with pytest.raises(
        ValueError, match=r"episode_0000000\.npz has the keys \[.*'rel_action'.*\].*calls 'rel_action'\?"
    ):
        calvin.open_dataset(root, "training")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rel_actions": np.zeros(14)}, r"rel_actions is float64\[14\], expected 7 numbers"),
        ({"rel_actions": np.array(["a"] * 7)}, r"rel_actions is <U1\[7\], expected 7 numbers"),
        (
            {"rgb_static": np.zeros((40, 40), np.uint8)},
            r"rgb_static is uint8\[40, 40\], expected uint8\[height, width, 3\]",
        ),
        ({"rgb_gripper": np.zeros((40, 40, 4), np.uint8)}, r"rgb_gripper is uint8\[40, 40, 4\]"),
        ({"rgb_static": np.zeros((40, 40, 3))}, r"rgb_static is float64\[40, 40, 3\]"),
    ],
)
def test_frames_of_another_form_are_refused_on_opening(write_calvin, change, message):
    with pytest.raises(ValueError, match=rf"episode_0000000\.npz: {message}"):
        calvin.open_dataset(write_calvin([(0, 2)], change={0: change}), "training")


def test_a_field_of_another_size_is_left_out_and_named(write_calvin, caplog):
    change = {frame: {"scene_obs": np.zeros(79)} for frame in range(3)}
    dataset = calvin.open_dataset(write_calvin([(0, 2)], change=change), "training")
    assert "scene_obs" not in dataset.arrays and "robot_obs" in dataset.arrays
    assert "scene_obs is float64[79], CALVIN's has 24 numbers: it is left out" in caplog.text


def test_a_field_of_words_is_a_damaged_frame(write_calvin):
    dataset = calvin.open_dataset(write_calvin([(0, 2)], change={1: {"robot_obs": np.array(["x"] * 15)}}), "training")
    with pytest.raises(base.CorruptFrameError, match=r"episode_0000001\.npz: robot_obs is <U1\[15\], expected numbers"):
        dataset.robot_obs([1])


def test_unknown_frames_cameras_and_fields_are_errors(write_calvin):
    dataset = calvin.open_dataset(write_calvin([(0, 2)], change={0: {"scene_obs": None}}), "training")
    with pytest.raises(ValueError, match=r"has no frame 7; it stores 3 frames between 0 and 2"):
        dataset.images([1, 7], ("static",))
    with pytest.raises(ValueError, match=r"has no camera \['overhead'\]; it has \['static', 'wrist'\]"):
        dataset.images([1], ("overhead",))
    with pytest.raises(ValueError, match="stores no 'scene_obs'"):
        dataset.scene_obs([1])


def test_sessions_and_the_frames_they_cover(write_calvin):
    dataset = calvin.open_npz(write_calvin([(3, 5)], frames=[0, 1, 2, 3, 4, 5, 9]), "training")
    np.testing.assert_array_equal(dataset.sessions(), [[0, 9]])
    np.testing.assert_array_equal(dataset.frames_within(np.array([[1, 3], [3, 4], [7, 20]])), [1, 2, 3, 4, 9])
    (dataset.directory / "ep_start_end_ids.npy").unlink()
    with pytest.raises(ValueError, match=r"ep_start_end_ids\.npy.*cannot be read"):
        dataset.sessions()


# Choosing episodes.

SPANS = [(0, 9), (5, 14), (20, 29), (20, 29)]
TASKS = ["open_drawer", "turn_on_led", "open_drawer", "close_drawer"]


def chosen(dataset: base.Dataset) -> list[tuple[str, int]]:
    return [(episode.task, episode.start) for episode in dataset.episodes]


def test_excluded_tasks_are_left_out(write_calvin):
    root = write_calvin(SPANS, tasks=TASKS)
    kept = chosen(calvin.open_dataset(root, "training", exclude_tasks=["open_drawer"]))
    assert kept == [("turn_on_led", 5), ("close_drawer", 20)]


def test_an_unknown_excluded_task_suggests_the_nearest(write_calvin):
    root = write_calvin(SPANS, tasks=TASKS)
    with pytest.raises(ValueError, match=r"exclude_tasks has 'open_drawers', .* did you mean 'open_drawer'\?"):
        calvin.open_dataset(root, "training", exclude_tasks=["open_drawers"])


def test_excluding_everything_is_an_error(write_calvin):
    with pytest.raises(ValueError, match="leave none of 4 episodes"):
        calvin.open_dataset(write_calvin(SPANS, tasks=TASKS), "training", exclude_tasks=sorted(set(TASKS)))


def test_a_json_list_chooses_by_task_and_span(write_calvin, tmp_path):
    root = write_calvin(SPANS, tasks=TASKS)
    path = tmp_path / "few_shot.json"
    path.write_text("\ufeff" + json.dumps({"open_drawer": [[20, 29]], "turn_on_led": [[5, 14]]}), encoding="utf-8")
    assert chosen(calvin.open_dataset(root, "training", episode_list=str(path))) == [
        ("turn_on_led", 5),
        ("open_drawer", 20),
    ]


def test_a_text_list_chooses_by_span(write_calvin, tmp_path):
    root = write_calvin(SPANS, tasks=TASKS)
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbf7 20 29\r\n\r\n8 0 9\r\n")  # as editors on Windows write it
    kept = chosen(calvin.open_dataset(root, "training", episode_list=str(path)))
    assert kept == [("open_drawer", 0), ("open_drawer", 20), ("close_drawer", 20)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"turn_on_led": [[20, 29]]}', r"no annotation matches: task 'turn_on_led' at frames 20 to 29"),
        ("0 0 9\n1 5 15", r"no annotation matches: frames 5 to 15 \(one of 1 such entries out of 2\)"),
        ("0 0 9 4", "neither JSON .* nor text lines"),
        ('{"open_drawer": [[0, 9.5]]}', r"neither JSON .*9\.5 is not a whole number"),
        ('{"open_drawer": [[0, null]]}', "neither JSON .*None is not a number"),
        ('{"open_drawer": [[0, NaN]]}', "neither JSON .*nan is not a whole number"),
        ('{"open_drawer": null}', "neither JSON"),
        ('{"open_drawer": [0, 9]}', "neither JSON .* nor text lines"),
        ("", "leave none of 4 episodes"),
    ],
)
def test_a_list_that_does_not_fit_is_an_error(write_calvin, tmp_path, text, message):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        calvin.open_dataset(write_calvin(SPANS, tasks=TASKS), "training", episode_list=str(path))


def test_a_list_that_does_not_exist_is_an_error(write_calvin):
    with pytest.raises(ValueError, match=r"episode_list: cannot read nothing\.json"):
        calvin.open_dataset(write_calvin(SPANS, tasks=TASKS), "training", episode_list="nothing.json")


def test_frames_that_are_packed_already_are_called_so():
    root = pathlib.Path(__file__).resolve().parents[2] / "data" / "calvin_sample"
    with pytest.raises(ValueError, match="calvin_sample/training is packed already"):
        calvin.open_npz(root, "training")
