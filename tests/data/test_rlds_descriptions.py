"""RLDS datasets that other people wrote: what is guessed and said, what is asked for, what is refused."""

from __future__ import annotations

import io
import itertools
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robovlms_jax.actions import statistics as linter
from robovlms_jax.config import DataConfig
from robovlms_jax.data import frame_index, opening, rlds, rlds_writer, splits
from robovlms_jax.data.features import Field
from robovlms_jax.data.registry import entry as entries
from robovlms_jax.data.registry import expressions, libero, mixtures, oxe
from robovlms_jax.data.rlds import files, instructions
from tests.data import toy_rlds

T = 8


def picture(seed: int = 0, *, form: str = "PNG", mode: str = "RGB", size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(toy_rlds.image(seed, size)).convert(mode).save(buffer, form)
    return buffer.getvalue()


def open_written(directory, changes=None, *, given=None, split="training", episodes=6, name="mine", **options):
    """Write episodes of an action, a state, an image and a text, with fields replaced (None: left out) by `changes`,
    path -> (field, number of the episode -> values), and open them."""
    rng = np.random.default_rng(0)
    action = lambda e: np.c_[rng.uniform(-0.05, 0.05, (T, 6)), np.arange(T) > 3]  # noqa: E731
    described = {
        "steps/is_first": (Field("", "tensor", "bool"), lambda e: np.arange(T) == 0),
        "steps/action": (Field("", "tensor", "float32", (7,)), action),
        "steps/observation/image": (Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(e)] * T),
        "steps/language_instruction": (Field("", "text", "string"), lambda e: [b"lift it"] * T),
        **(changes or {}),
    }
    described = {path: content for path, content in described.items() if content}
    fields = [
        Field(path, f.kind, f.dtype, f.shape, f.encoding, path.startswith("steps/"))
        for path, (f, _) in described.items()
    ]
    records = [{path: values(e) for path, (_, values) in described.items()} for e in range(episodes)]
    rlds_writer.write(directory, name, fields, {"train": records})
    return rlds.open_dataset(directory, given or {}, split, name=name, options=rlds.Options(**options))


def numbers(size: int, values=None):
    return Field("", "tensor", "float32", (size,)), values or (lambda e: np.full((T, size), 0.01, np.float32))


def text(*shape, values):
    return Field("", "text", "string", shape), values


# Grippers.


@pytest.mark.parametrize(
    ("low", "high", "remedy"),
    [
        (-1, 1, r"gripper: invert\(clip\(action\[6\]\)\) if \+1 closes it"),
        (0, 100, r"gripper: from_range\(action\[6\], 0, 100\) if 100 is open"),
        (3, 848, r"from_range\(action\[6\], 850, 0\) if it is closed"),
        (0, 255, r"from_range\(action\[6\], 0, 255\)"),
        (-40, 40, r"from_range\(action\[6\], -40, 100\)"),
    ],
)
def test_a_gripper_outside_0_to_1_is_refused_with_its_range_and_what_to_write(tmp_path, low, high, remedy):
    values = lambda e: np.c_[np.zeros((T, 6)), np.where(np.arange(T) > 3, high, low)]  # noqa: E731
    with pytest.raises(ValueError, match=rf"'action\[6\]' runs from {low} to {high}, 100.0%|runs from {low}") as caught:
        open_written(tmp_path, {"steps/action": numbers(7, values)})
    with pytest.raises(ValueError, match=remedy):
        raise caught.value


def test_a_gripper_that_means_the_opposite_of_the_measured_fingers_is_found(tmp_path):
    # Breaks when the opening is the command itself, or is not there for RLDS.
    state = lambda e: np.c_[np.zeros((T, 6)), np.where(np.arange(T) > 3, 0.0, 0.08)]  # noqa: E731
    given = {"gripper": "action[6]"}
    dataset = open_written(tmp_path / "a", {"steps/observation/state": numbers(7, state)}, given=given)
    ids = np.arange(T)
    findings = linter.lint(
        dataset.statistics.action, commands=dataset.actions(ids)[:, 6], widths=dataset.gripper_opening(ids)
    )
    assert any("means the opposite" in finding.message and finding.refused for finding in findings)
    given = {
        **given,
        "state": ["observation/state[:6]", "zeros(1)", "observation/state[6]"],
        "state_encoding": "POS_EULER",
    }
    closes = open_written(tmp_path / "b", {"steps/observation/state": numbers(7, state)},
                          given={**given, "state_gripper": "closes"})  # fmt: skip
    np.testing.assert_allclose(closes.gripper_opening(ids), 1 - dataset.gripper_opening(ids))
    unknown = open_written(tmp_path / "c", {"steps/observation/state": numbers(7, state)},
                           given={**given, "state_gripper": ""})  # fmt: skip
    assert unknown.gripper_opening(ids) is None


def test_the_linter_names_impossible_steps_and_grippers_beyond_one():
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 7))
    values = linter.summarize(actions * [1000, 0.01, 0.01, 90, 0.1, 0.1, 1])
    found = {
        finding.dimension: finding for finding in linter.lint(values, units=(1.0,) * 6) if "moves by" in finding.message
    }
    assert set(found) == {"x", "roll"} and not any(finding.refused for finding in found.values())
    assert "m within one step, more than 0.5 m" in found["x"].message and "rad" in found["roll"].message
    assert not any(
        "moves by" in f.message for f in linter.lint(linter.summarize(actions), units=(0.02,) * 3 + (0.05,) * 3)
    )
    beyond = linter.lint(linter.summarize(actions * [1, 1, 1, 1, 1, 1, 3]))
    assert any("leaves -1 (closed) to 1 (open)" in finding.message and finding.refused for finding in beyond)


# Actions and states.


@pytest.mark.parametrize("size", [6, 8, 14])
def test_an_action_that_has_not_seven_numbers_is_asked_for(tmp_path, size):
    with pytest.raises(ValueError, match=rf"steps/action has {size} numbers .*seven are expected"):
        open_written(tmp_path, {"steps/action": numbers(size)})


def test_an_action_of_other_size_is_read_as_described(tmp_path):
    values = lambda e: np.c_[np.zeros((T, 3)), np.tile([0, 0, 0, 1], (T, 1)), np.arange(T) > 3]  # noqa: E731
    given = {"arm": ["action[:3]", "euler(action[3:7])"], "gripper": "action[7]"}
    dataset = open_written(tmp_path, {"steps/action": numbers(8, values)}, given=given)
    np.testing.assert_array_equal(dataset.actions([0, 5]), [[0] * 6 + [-1], [0] * 6 + [1]])


def test_an_entry_with_the_usual_arm_wants_seven_numbers():
    action, image = Field("steps/action", "tensor", "float32", (8,)), Field("steps/observation/image", "image", "uint8")
    words = Field("steps/language_instruction", "text", "string")
    fields = {field.path: field for field in (action, image, words)}
    with pytest.raises(ValueError, match=r"steps/action: found float32\[8\], expected seven numbers"):
        entries.Entry("mine").check(fields, "here")
    entries.Entry("mine", shapes={"action": (8,)}).check(fields, "here")


def test_a_state_of_eight_numbers_is_not_guessed_and_one_word_describes_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = {"steps/observation/state": numbers(8)}
    dataset = open_written(tmp_path / "a", state)
    assert "no state, as steps/observation/state (float32[8]) may be a pose" in caplog.text
    with pytest.raises(ValueError, match="describe it with state and state_encoding"):
        dataset.proprio([0])
    named = open_written(tmp_path / "b", state, given={"state_encoding": "POS_QUAT"})
    assert named.array("state", [0]).shape == (1, 8) and len(named.proprio([0])[0]) == 7


def test_a_state_in_degrees_is_named_with_its_range(tmp_path, caplog):
    state = lambda e: np.tile([0.3, 0, 0.2, -170, 0, 90, 0.5], (T, 1))  # noqa: E731
    open_written(tmp_path, {"steps/observation/state": numbers(7, state)})
    assert "numbers 3 to 5 run from -170 to 90: too much for angles in radians" in caplog.text


def test_guesses_are_logged_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    open_written(tmp_path, name="guessed_once")
    rlds.open_dataset(tmp_path, {}, "validation", name="guessed_once")
    assert caplog.text.count("dataset 'guessed_once' has no description; guessed: static: image") == 1


def test_rotation_vectors_become_scipys_euler_angles():
    from scipy.spatial.transform import Rotation

    vectors = np.random.default_rng(0).normal(size=(50, 3)) * 2
    vectors[:2] = [[0, 0, 0], [np.pi, 0, 0]]
    expected = Rotation.from_rotvec(vectors).as_euler("xyz")
    found = expressions.Expression("axis_angle(s[3:6])")({"s": np.c_[np.zeros((50, 3)), vectors]}, 50)
    np.testing.assert_allclose(np.cos(found), np.cos(expected), atol=1e-6)
    np.testing.assert_allclose(np.sin(found), np.sin(expected), atol=1e-6)
    with pytest.raises(ValueError, match="needs 3 columns, it has 4"):
        expressions.Expression("axis_angle(s[:4])").width(8)


@pytest.mark.parametrize("name", libero.NAMES)
def test_libero_is_read_as_openvla_publishes_it(tmp_path, name, caplog):
    action = lambda e: np.c_[np.full((T, 6), 0.9), np.where(np.arange(T) > 3, 1.0, -1.0)]  # noqa: E731
    state = lambda e: np.tile([0.1, 0.2, 0.3, 3.0, 0, 0, 0.04, -0.04], (T, 1))  # noqa: E731
    wrist = Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(e)] * T
    changes = {"steps/action": numbers(7, action), "steps/observation/state": numbers(8, state),
               "steps/observation/wrist_image": wrist}  # fmt: skip
    open_written(tmp_path, changes, name=name, given={"gripper": "clip(action[6])"})
    dataset = opening.open_split(DataConfig(dataset=name, root=str(tmp_path), index_workers=1), "training")
    np.testing.assert_array_equal(dataset.actions([0, 6])[:, 6], [1, -1])  # -1 opens, +1 closes
    np.testing.assert_allclose(dataset.array("state", [0])[0], [0.1, 0.2, 0.3, 3.0, 0, 0, 0, 0.04], atol=1e-6)
    np.testing.assert_allclose(dataset.gripper_opening([0]), [0.04])
    robot = dataset.robot
    assert [d.unit for d in robot.action] == ["0.05 m"] * 3 + ["0.5 rad"] * 3 + ["1"]
    assert (robot.rate_hz, robot.action[3].quantity, robot.action[0].frame) == (20, "axis_angle", "base")
    assert [(c.name, c.height) for c in robot.cameras] == [("static", 16), ("wrist", 16)]
    assert dataset.action_units == (0.05,) * 3 + (0.5,) * 3


def test_every_entry_describes_its_robot():
    for entry in mixtures.ENTRIES.values():
        robot = entry.robot
        assert robot.rate_hz == entry.control_hz and len(robot.action) == 7 and robot.grippers == (6,)
        assert robot.camera_names == tuple(entry.cameras)


# Images.


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "L"), ("PNG", "RGBA"), ("WEBP", "RGB"), ("BMP", "RGB"), ("JPEG", "L")]
)
def test_grey_transparent_and_other_encodings_are_read(tmp_path, form, mode):
    channels = len(mode) if mode != "L" else 1
    image = Field("", "image", "uint8", (16, 16, channels)), lambda e: [picture(e, form=form, mode=mode)] * T
    dataset = open_written(tmp_path, {"steps/observation/image": image})
    with Image.open(io.BytesIO(picture(0, form=form, mode=mode))) as expected:
        np.testing.assert_allclose(
            dataset.images([3], ["static"])["static"][0], np.asarray(expected.convert("RGB")), atol=3
        )


def test_depth_is_never_taken_for_colour(tmp_path):
    distances = picture(0, mode="I;16")
    uint16 = Field("", "image", "uint16", (16, 16, 1)), lambda e: [distances] * T
    named = Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(0)] * T
    changes = {"steps/observation/image": None, "steps/observation/rgb": uint16, "steps/observation/depth_image": named,
               "steps/observation/front": named}  # fmt: skip
    dataset = open_written(tmp_path / "a", changes)
    assert dataset._meta["cameras"] == ["static"] and dataset._prepared.arrays["length"].shape[1] == 1
    with pytest.raises(ValueError, match=r"uint16 image\[16, 16, 1\], a depth image"):
        rlds.open_dataset(tmp_path / "a", {"static": "rgb"}, "training", name="mine")
    with pytest.raises(ValueError, match=r"no camera was found.*uint16 image\[16, 16, 1\], a depth image"):
        open_written(tmp_path / "b", {"steps/observation/image": uint16})
    disguised = Field("", "image", "uint8", (16, 16, 1)), lambda e: [distances] * T
    with pytest.raises(ValueError, match=r"none of the first images of steps/observation/image.*a depth image\?"):
        open_written(tmp_path / "c", {"steps/observation/image": disguised})


def test_pixels_that_are_not_encoded_are_named(tmp_path):
    pixels = Field("", "tensor", "uint8", (4, 4, 3)), lambda e: np.zeros((T, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"uint8\[4, 4, 3\], pixels that are not encoded"):
        open_written(tmp_path, {"steps/observation/image": pixels})


def test_encoded_pictures_in_a_text_field_are_images_once_named(tmp_path):
    forms = itertools.cycle(["PNG", "JPEG", "WEBP", "BMP"])
    cells = text(values=lambda e: [picture(t, form=next(forms)) for t in range(T)])
    changes = {"steps/observation/image": None, "steps/observation/image/cam_0": cells}
    given = {"static": "image/cam_0"}
    dataset = open_written(tmp_path, changes, given=given)
    np.testing.assert_array_equal(dataset.images([4], ["static"])["static"][0], toy_rlds.image(4, 16))
    # Where nobody names it, the index holds no copy of the pictures.
    with pytest.raises(ValueError, match=r"which may hold encoded pictures: .*cam_0"):
        rlds.open_dataset(tmp_path, {}, "training", name="mine")


def test_images_outside_observation_can_be_named(tmp_path):
    image = Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(e)] * T
    changes = {"steps/observation/image": None, "steps/obs/rgb": image}
    with pytest.raises(ValueError, match=r"below steps/observation, which does not exist.*steps/obs/rgb"):
        open_written(tmp_path, changes)
    for name in ("../obs/rgb", "obs/rgb", "steps/obs/rgb"):
        assert rlds.open_dataset(tmp_path, {"static": name}, "training", name="mine").cameras == ("static",)


def test_images_of_several_sizes_are_refused_with_the_setting_that_helps(tmp_path):
    image = Field("", "image", "uint8", (None, None, 3)), lambda e: [picture(e, size=16 + 8 * (e == 3))] * T
    with pytest.raises(ValueError, match=r"several sizes.*\(16, 16\), \(24, 24\).*--data.image_size 224"):
        open_written(tmp_path, {"steps/observation/image": image})
    dataset = rlds.open_dataset(tmp_path, {}, "training", name="mine", options=rlds.Options(image_size=(20, 20)))
    assert dataset.images(range(3 * T, 4 * T), ["static"])["static"].shape == (T, 20, 20, 3)
    with pytest.raises(ValueError, match=r"the image is \(24, 24, 3\), expected \(16, 16, 3\).*--data.image_size"):
        frame_index.decode_image(picture(size=24, form="JPEG"), np.empty((16, 16, 3), np.uint8))


# Instructions.


def spoken(dataset):
    return {(episode.instruction, episode.rewordings) for episode in dataset.episodes}


def test_an_instruction_of_the_episode_is_found_and_can_be_named(tmp_path):
    changes = {"steps/language_instruction": None,
               "episode_metadata/language_instruction": text(values=lambda e: [b"open  the drawer"]),
               "episode_metadata/file_path": text(values=lambda e: [b"/raw/7.h5"])}  # fmt: skip
    assert spoken(open_written(tmp_path, changes)) == {("open the drawer", ())}
    for name in ("episode_metadata/language_instruction", "../episode_metadata/language_instruction"):
        dataset = rlds.open_dataset(tmp_path, {"instruction": name}, "training", name="mine")
        assert spoken(dataset) == {("open the drawer", ())}


def test_of_several_texts_none_is_guessed(tmp_path):
    changes = {"steps/language_instruction": None, "episode_metadata/task": text(values=lambda e: [b"a"]),
               "episode_metadata/goal": text(values=lambda e: [b"b"])}  # fmt: skip
    with pytest.raises(ValueError, match=r"episode_metadata/task.*episode_metadata/goal.*say instruction: NAME"):
        open_written(tmp_path / "a", changes)
    only_path = {"steps/language_instruction": None, "episode_metadata/file_path": text(values=lambda e: [b"/raw/7"])}
    with pytest.raises(
        ValueError, match=r"no instruction \(read from 'nowhere'; texts: \['episode_metadata/file_path'"
    ):
        open_written(tmp_path / "b", only_path)


@pytest.mark.parametrize("shape", [(3,), (None,)])
def test_of_several_wordings_the_first_filled_is_the_instruction(tmp_path, shape):
    cells = text(*shape, values=lambda e: [(b" ", b"lift\0", b"raise")] * T)
    assert spoken(open_written(tmp_path, {"steps/language_instruction": cells})) == {("lift", ("raise",))}


def test_a_blank_first_wording_does_not_make_an_episode_unlabelled(tmp_path):
    changes = {"steps/language_instruction": text(values=lambda e: [b"" if e % 2 else b"lift"] * T),
               "steps/language_instruction_2": text(values=lambda e: [b"raise"] * T)}  # fmt: skip
    assert spoken(open_written(tmp_path, changes)) == {("lift", ("raise",)), ("raise", ())}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=3, unique=True).map(tuple), min_size=1, max_size=8))
def test_tasks_change_where_no_sentence_is_shared(said):
    table = instructions.Table()
    starts, found = instructions.spans(np.array([table.number(cell) for cell in said]), table)
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and len(found) == len(starts)
    for start, end, number in zip(starts, [*starts[1:], len(said)], found, strict=True):
        cells = said[start:end]
        assert table.entries[number] == tuple(dict.fromkeys(word for cell in cells for word in cell))
        assert all(cells) or not any(cells), "what is silent is no part of a task"
    for start in starts[1:]:
        assert not said[start] or said[start][0] not in said[start - 1]


# Which episodes.


def test_droids_failures_are_told_by_the_files_path(tmp_path):
    assert oxe.ENTRIES["droid"].success == "episode_metadata/file_path"
    given = {"success": "episode_metadata/file_path", "failure_pattern": oxe.ENTRIES["droid"].failure_pattern}
    paths = text(values=lambda e: [b"/raw/LAB/failure/7.h5" if e % 2 else b"/raw/failure-lab/success/7.h5"])
    dataset = open_written(tmp_path, {"episode_metadata/file_path": paths}, given=given)
    assert len(dataset.episodes) == 2  # of three successful ones the last is for validation
    kept = rlds.open_dataset(tmp_path, given, "training", name="mine", options=rlds.Options(success_only=False))
    assert len(kept.episodes) == 5


def test_where_nothing_tells_success_it_is_said_once_with_a_hint(tmp_path, caplog):
    paths = text(values=lambda e: [b"/raw/failed/7.h5" if e == 2 else b"/raw/7.h5"])
    open_written(tmp_path, {"episode_metadata/file_path": paths})
    rlds.open_dataset(tmp_path, {}, "validation", name="mine")
    assert (
        caplog.text.count("although episode_metadata/file_path speaks of failure in 1 (such as '/raw/failed/7.h5')")
        == 1
    )


def test_success_may_be_a_flag_of_steps(tmp_path):
    flag = Field("", "tensor", "bool"), lambda e: (np.arange(T) == T - 1) & (e != 1)
    dataset = open_written(tmp_path, {"steps/solved": flag}, given={"success": "solved"})
    assert [episode.start // (T + 1) for episode in dataset.episodes] == [0, 2, 3, 4]


@pytest.mark.parametrize("names", list(itertools.product(*[(False, True)] * 4)))
def test_test_episodes_never_train_whatever_splits_there_are(names):
    there = [name for name, is_there in zip(("train", "val", "validation", "test"), names, strict=True) if is_there]
    found = {name: splits.Split("mine", "1", name, "tfrecord", ("a",), (10,)) for name in there}
    if "train" not in there:
        with pytest.raises(ValueError, match=r"has no split 'train'.*splits: \{training"):
            splits.choose(found, {}, "training", "here")
        return
    training, validation = (splits.choose(found, {}, use, "here") for use in ("training", "validation"))
    assert training.split.name == "train"
    expected = next((name for name in ("val", "validation") if name in there), "train")
    assert validation.split.name == expected
    assert training.is_shared == validation.is_shared == (expected == "train")


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.integers(1, 99))
def test_slices_of_a_split_share_nothing_and_leave_nothing_out(total, percent):
    found = {"all": splits.Split("mine", "1", "all", "tfrecord", ("a",), (total,))}
    given = {"training": f"all[:{percent}%]", "validation": f"all[{percent}%:]"}
    border = round(percent * total / 100)
    if border in (0, total):
        with pytest.raises(ValueError, match="which has none of the"):
            [splits.choose(found, given, use, "here") for use in ("training", "validation")]
        return
    training, validation = (splits.choose(found, given, use, "here") for use in ("training", "validation"))
    assert (training.first, training.last, validation.first, validation.last) == (0, border, border, total)
    assert not training.is_shared


def test_slices_that_overlap_or_are_no_slices_are_refused():
    found = {"train": splits.Split("mine", "1", "train", "tfrecord", ("a",), (100,))}
    with pytest.raises(ValueError, match="share episodes 90 to 94 of split 'train'"):
        splits.choose(found, {"training": "train[:95]", "validation": "train[-10:]"}, "training", "here")
    with pytest.raises(ValueError, match=r"such as 'train\[:90%\]'; there are \['train'\]"):
        splits.choose(found, {"training": "test[:90%]"}, "training", "here")


def test_validation_opens_where_the_last_episodes_are_unusable(tmp_path):
    words = text(values=lambda e: [b"" if e >= 30 else b"lift"] * T)
    training = open_written(tmp_path, {"steps/language_instruction": words}, episodes=40)
    validation = rlds.open_dataset(tmp_path, {}, "validation", name="mine")
    assert (len(training.episodes), len(validation.episodes)) == (28, 2)
    assert training.episodes[-1].end < validation.episodes[0].start


def test_a_last_action_that_is_no_number_is_left_out_with_its_step(tmp_path, caplog):
    action = lambda e: np.where(np.arange(T)[:, None] == T - 1, np.nan, np.c_[np.full((T, 6), 0.01), np.arange(T) > 3])  # noqa: E731
    dataset = open_written(tmp_path, {"steps/action": numbers(7, action)})
    assert [episode.end - episode.start for episode in dataset.episodes] == [T - 1] * 5
    assert np.isfinite(dataset.actions(range(dataset.num_frame_ids))).all() and "NaN" not in caplog.text
    assert "left out 6 steps at ends of episodes" in caplog.text
    last = dataset.images([dataset.episodes[0].end], ["static"])["static"]
    np.testing.assert_array_equal(last[0], toy_rlds.image(0, 16))


# Files.


def test_files_with_a_byte_order_mark_are_read(tmp_path):
    open_written(tmp_path)
    for name in ("features.json", "dataset_info.json"):
        path = tmp_path / "mine" / "1.0.0" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert rlds.open_dataset(tmp_path, {}, "training", name="mine").episodes
    for name, content in (
        ("a.yaml", b"mixture: {bridge_orig: 1.0}\r\n"),
        ("a.json", b'{"mixture": {"bridge_orig": 1}}'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert mixtures.resolve(str(tmp_path / name)).weights == {"bridge_orig": 1.0}


def test_a_configuration_between_name_and_version_is_found_when_there_is_one(tmp_path):
    open_written(tmp_path)
    (tmp_path / "mine" / "small").mkdir()
    (tmp_path / "mine" / "1.0.0").rename(tmp_path / "mine" / "small" / "1.0.0")
    assert rlds.open_dataset(tmp_path, {}, "training", name="mine").episodes
    assert rlds.open_dataset(tmp_path / "mine", {}, "training", name="mine").episodes
    rlds_writer.write(tmp_path / "mine", "large", toy_rlds.FIELDS, {"train": [toy_rlds.episode(0, 3)]})
    with pytest.raises(rlds.NotFoundError, match=r"several configurations, large, small; .*--data.root .*mine/large"):
        rlds.open_dataset(tmp_path, {}, "training", name="mine")
    assert rlds.open_dataset(tmp_path, {"directories": "mine/small"}, "training", name="of_mine").episodes


def test_records_of_another_shape_are_named_with_both_sides(tmp_path):
    open_written(tmp_path, {"steps/observation/state": numbers(7)})
    path = tmp_path / "mine" / "1.0.0" / "features.json"
    tree = json.loads(path.read_text())
    step = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    state = step["observation"]["featuresDict"]["features"]["state"]
    state["tensor"]["shape"]["dimensions"] = ["8"]
    step["note"] = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="record 0 and 5 more, to record 5: ") as caught:
        rlds.open_dataset(tmp_path, {}, "training", name="mine")
    assert f"state has {7 * T} values, that is 7 each, expected {T} x 8" in str(caught.value)
    assert "the record has no steps/note, which features.json says is text[]" in str(caught.value)


def test_a_dataset_without_is_first_is_told_so(tmp_path):
    image = Field("", "image", "uint8", (16, 16, 3)), lambda e: [picture(e)] * T
    changes = {"steps/is_first": None, "steps/observation/image": None, "steps/obs/image": image}
    with pytest.raises(
        ValueError, match=r"no steps/is_first.*no steps/observation; its images are \['steps/obs/image'"
    ):
        open_written(tmp_path, changes)


def test_prepared_arrays_are_compared_with_their_checksums_once(tmp_path, monkeypatch):
    dataset = open_written(tmp_path)
    hashed = []
    real = files.google_crc32c.value
    monkeypatch.setattr(files.google_crc32c, "value", lambda data: (hashed.append(len(data)), real(data))[1])
    rlds.open_dataset(tmp_path, {}, "validation", name="mine")
    path = dataset._prepared.directory / "actions.npy"
    assert path.stat().st_size not in hashed
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"actions\.npy is damaged"):
        files.load(dataset._prepared.directory, dataset._prepared.stamps)
