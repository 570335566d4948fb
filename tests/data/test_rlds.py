"""RLDS directories: what is indexed, how numbers become actions, what happens to damaged shards."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.data import base, cutting, features, records, rlds, samples, shard_index, statistics, storage
from robovlms_jax.data.registry import expressions, mixtures, oxe
from robovlms_jax.data.registry.entry import Entry
from robovlms_jax.data.registry.infer import infer
from tests.data import toy_rlds

TOY = Entry("toy", instruction="language_instruction", state=("observation/state", "zeros(1)"), state_encoding="JOINT",
            wrist="wrist_image", success="success")  # fmt: skip


def encode_text(text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.frombuffer(text.encode()[:32].ljust(32, b"\0"), np.uint8).astype(np.int32)
    return ids, ids > 0


def make_source(dataset, *, window=4, chunk=3, windows_per_segment=2, cameras=("static",), **options):
    more = {name: options.pop(name) for name in ("left_pad", "goal_relabelling") if name in options}
    cut = cutting.Cut(window, chunk, windows_per_segment, **more)
    return samples.SegmentSource(dataset, cut, cameras=cameras, encode_text=encode_text, **options)


def open_toy(root, entry=TOY, split="training", **options) -> rlds.RldsDataset:
    return rlds.open_dataset(root, entry, split, options=rlds.Options(**options))


# What is read.


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_frames_are_those_that_were_recorded(tmp_path, file_format):
    root = toy_rlds.write(tmp_path, val=[toy_rlds.episode(9, 5)], file_format=file_format, shard_bytes=30_000)
    dataset = open_toy(root)
    assert len(dataset.episodes) == 6
    for seed, episode in enumerate(dataset.episodes):
        length = 9 + seed
        assert episode.end - episode.start == length and episode.instruction == "push the block"
        ids = np.arange(episode.start, episode.end + 1)
        frames = dataset.images(ids, ("wrist", "static"))
        for t in [0, 3, length - 1, length]:  # the frame after the last is the last again
            shown = min(t, length - 1)
            for camera, size, shift in (("static", 32, 0), ("wrist", 24, 500)):
                expected = features.decode_any(toy_rlds._jpeg(toy_rlds.image(1000 * seed + shown + shift, size)))
                np.testing.assert_array_equal(frames[camera][t], expected)
        recorded = toy_rlds.episode(seed, length)["steps/action"]
        actions = dataset.actions(ids)
        np.testing.assert_array_equal(actions[:-1, :6], recorded[:, :6])
        np.testing.assert_array_equal(actions[:-1, 6], 2 * recorded[:, 6] - 1)
        np.testing.assert_array_equal(actions[-1], [0] * 6 + [actions[-2, 6]])
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again.images([5], ["static"])["static"], dataset.images([5], ["static"])["static"])


def test_shards_behind_a_url_are_read_in_ranges(tmp_path):
    import fsspec

    local = toy_rlds.write(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(local), "/remote/toy/1.0.0", recursive=True)
    dataset = open_toy("memory://remote", index_dir=str(tmp_path / "index"))
    here = open_toy(local)
    assert dataset.episodes == here.episodes
    for a, b in zip(*(d.images(range(20), ["static"])["static"] for d in (dataset, here)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bridge_episodes_are_upstreams(shared_data, tmp_path):
    """First step dropped, gripper binarised, arm = next state - state, last step dropped; step by step, by hand."""
    root = shared_data / "bridge_dataset"
    dataset = rlds.open_dataset(root, oxe.ENTRIES["bridge_orig"], "training", options=rlds.Options(str(tmp_path)))
    path = next((root / "1.0.0").glob("*-train*"))
    fields = features.read((root / "1.0.0" / "features.json").read_text(), "features.json")
    with path.open("rb") as file:
        recorded = [features.decode(r.payload, fields) for r in records.tfrecords(file, path.stat().st_size)]
    assert len(dataset.episodes) == len(recorded) == 25
    for episode, steps in zip(dataset.episodes, recorded, strict=True):
        state, gripper = steps["steps/observation/state"], steps["steps/action"][1:, 6]
        target, now = [], gripper[-1]
        for value in gripper[::-1]:
            now = 1.0 if value > 0.95 else 0.0 if value < 0.05 else now
            target.append(now)
        ids = np.arange(episode.start, episode.end)
        actions = dataset.actions(ids)
        np.testing.assert_array_equal(actions[:, :6], (state[2:] - state[1:-1])[:, :6])
        np.testing.assert_array_equal(actions[:, 6], 2 * np.array(target[::-1][:-1]) - 1)
        np.testing.assert_array_equal(
            dataset.images(np.append(ids, episode.end), ["static"])["static"], steps["steps/observation/image_0"][1:]
        )
        assert episode.instruction == steps["steps/language_instruction"][0].decode()
    source = make_source(dataset, windows_per_segment=1)
    assert source.num_windows == 125  # 25 x (8 + 1 - 4)


def test_an_instruction_that_changes_begins_another_episode(tmp_path):
    said = [b"push the block"] * 4 + [b"open the drawer"] * 6
    dataset = open_toy(toy_rlds.write(tmp_path, [toy_rlds.episode(0, 10, language_instruction=said)] * 2,
                                      val=[toy_rlds.episode(0, 10)]))  # fmt: skip
    spans = [(e.start, e.end, e.instruction) for e in dataset.episodes[:2]]
    assert spans == [(0, 4, "push the block"), (4, 10, "open the drawer")]


def test_code_points_are_text(tmp_path):
    entry = Entry("toy", instruction="codes")
    dataset = open_toy(toy_rlds.write(tmp_path, [toy_rlds.episode(0, 5, text="slide Ä left")] * 3), entry)
    assert {e.instruction for e in dataset.episodes} == {"slide Ä left"}


def test_unlabelled_and_failed_episodes(tmp_path):
    episodes = [toy_rlds.episode(seed, 6, text="" if seed % 2 else "push") for seed in range(40)]
    episodes[0]["success"] = np.array([False])
    root = toy_rlds.write(tmp_path, episodes, val=[toy_rlds.episode(0, 6)])
    assert len(open_toy(root).episodes) == 19
    assert len(open_toy(root, success_only=False).episodes) == 20
    half = open_toy(root, unlabelled_share=0.5, unlabelled_instruction="play").episodes
    told = [e.instruction for e in half].count("play")
    assert 4 <= told <= 16 and len(half) == 19 + told
    assert half == open_toy(root, unlabelled_share=0.5, unlabelled_instruction="play").episodes
    assert len(open_toy(root, unlabelled_share=1.0).episodes) == 39


def test_validation_is_the_last_twentieth_where_there_is_no_split(tmp_path):
    root = toy_rlds.write(tmp_path, [toy_rlds.episode(seed, 5) for seed in range(40)])
    training, validation = (open_toy(root, split=split).episodes for split in ("training", "validation"))
    assert (len(training), len(validation)) == (38, 2)
    assert training[-1].end < validation[0].start


def test_an_empty_image_is_black_and_masked(tmp_path, caplog):
    images = toy_rlds.episode(1, 8)["steps/observation/wrist_image"]
    images[2] = b""
    root = toy_rlds.write(tmp_path, [toy_rlds.episode(1, 8, wrist_image=images)] * 3)
    source = make_source(open_toy(root), cameras=("static", "wrist"))
    sample = source[0]
    np.testing.assert_array_equal(sample.inputs.image_mask["wrist"], [True, True, False, True, True])
    assert sample.inputs.image_mask["static"].all()
    assert not sample.inputs.images["wrist"][2].any() and sample.inputs.images["wrist"][3].any()
    [source[index] for index in range(len(source))]
    assert caplog.text.count("no wrist image") == 1


def test_images_of_another_size_are_scaled_when_asked(tmp_path):
    dataset = open_toy(toy_rlds.write(tmp_path), image_size=(16, 16))
    assert dataset.image_sizes == {"static": (16, 16), "wrist": (16, 16)}
    assert dataset.images([0], ["static"])["static"].shape == (1, 16, 16, 3)


# Gripper rules and rotations, against loops and scipy.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.04, 0.2, 0.5, 0.94, 0.96, 1.0]), min_size=1, max_size=12))
def test_binarize_takes_the_state_that_comes_next(values):
    expected, now = [], values[-1]
    for value in values[::-1]:
        now = 1.0 if value > 0.95 else 0.0 if value < 0.05 else now
        expected.append(now)
    found = expressions.binarize(np.array(values, np.float32)[:, None])[:, 0]
    np.testing.assert_allclose(found, expected[::-1], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.05, 0.0, 0.05, 1.0]), min_size=1, max_size=12))
def test_relative_commands_hold_until_the_next(values):
    commands = [0.0 if v > 0.1 else 1.0 if v < -0.1 else None for v in values]
    first = next((c for c in commands if c is not None), None)
    now, expected = 1.0 if first is None else 1 - first, []
    for command in commands:
        now = now if command is None else command
        expected.append(now)
    np.testing.assert_array_equal(expressions.from_relative(np.array(values, np.float32)[:, None])[:, 0], expected)


def test_euler_angles_are_scipys():
    from scipy.spatial.transform import Rotation

    quaternions = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(
        expressions.euler(quaternions), Rotation.from_quat(quaternions).as_euler("xyz"), atol=1e-12
    )


# The registry.


def test_the_registry_has_the_published_sets_and_mixtures():
    assert len(oxe.ENTRIES) == 27
    published = mixtures.published_mixtures()
    assert len(published["oxe_magic_soup"]) == 23 and len(published["oxe_magic_soup_plus"]) == 27
    assert published["rt_1"] == {"fractal20220817_data": 1.0}
    assert all(name in oxe.ENTRIES for weights in published.values() for name in weights)
    assert all(entry.control_hz > 0 and "static" in entry.cameras for entry in oxe.ENTRIES.values())


@pytest.mark.parametrize("name", oxe.ENTRIES)
def test_an_entry_makes_seven_actions_and_eight_numbers_of_state(name):
    entry = oxe.ENTRIES[name]
    # The sizes of the original release, where the entry does not state them.
    known = {
        "action/world_vector": 3, "action/rotation_delta": 3, "action/gripper_closedness_action": 1,
        "action/rel_actions_world": 7, "action/open_gripper": 1, "action/future/xyz_residual": 30,
        "action/future/axis_angle_residual": 30, "action/future/target_close": 10, "action": 7,
        "action_dict/cartesian_velocity": 6, "action_dict/gripper_position": 1,
        "observation/base_pose_tool_reached": 7, "observation/gripper_closed": 1,
        "observation/clip_function_input/base_pose_tool_reached": 7, "observation/robot_obs": 15,
        "observation/end_effector_cartesian_pos": 7, "observation/joint_states": 7, "observation/gripper_states": 1,
        "observation/effector_translation": 2, "observation/state": 7, "observation/eef_pose": 7,
        "observation/state_gripper_pose": 1, "observation/present/xyz": 3, "observation/present/axis_angle": 3,
        "observation/present/sensed_close": 1, "observation/cartesian_position": 6, "observation/gripper_position": 1,
        "observation/robot_state": 15 if name == "berkeley_autolab_ur5" else 7,
    }  # fmt: skip
    if name == "furniture_bench_dataset_converted_externally_to_rlds":
        known["observation/state"] = 35
    sizes = {f: int(np.prod(entry.shapes.get(f, (known[f],)))) for f in entry.numeric_fields}
    assert entry.widths(sizes) == ""
    rng = np.random.default_rng(0)
    actions, state, rows = entry.standardize({f: rng.normal(size=(9, n)) for f, n in sizes.items()})
    assert actions.shape == (len(rows), 7) and state.shape == (len(rows), 8 if entry.state else 0)
    assert np.isin(actions[:, 6], (-1, 1)).all() or "from_relative" not in entry.gripper


def test_a_mismatch_names_field_found_and_expected(tmp_path):
    root = toy_rlds.write(tmp_path)
    entry = Entry("toy", static="front", arm=("velocity[:6]",), instruction="observation/state",
                  shapes={"action": (8,)})  # fmt: skip
    with pytest.raises(ValueError, match="does not fit the registry's entry 'toy'") as caught:
        open_toy(root, entry)
    text = str(caught.value)
    assert "steps/observation/front: not found, expected image" in text
    assert "steps/velocity: not found, expected numbers" in text
    assert "steps/observation/state: found float64[7], expected text" in text
    assert "steps/action: found float32[7], expected numbers[8]" in text
    assert not (root / shard_index.BESIDE_DATA).exists(), "refused before anything was indexed"


def test_common_names_need_no_entry(tmp_path):
    root = toy_rlds.write(tmp_path)
    dataset = rlds.open_dataset(tmp_path, {}, "training", name="toy", options=rlds.Options())
    assert dataset.cameras == ("static", "wrist") and dataset.array("state", [0]).shape == (1, 8)
    with pytest.raises(ValueError, match="did you mean 'gripper'"):
        infer("toy", shard_index.read_fields(storage.Directory(root)), {"griper": "action[6]"})


def test_names_that_nobody_knows_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'oxe_magic_soup'"):
        mixtures.resolve("oxe_magic_sup")
    with pytest.raises(rlds.NotFoundError, match=r"looked for features.json in .*toy"):
        rlds.open_dataset(tmp_path / "nowhere", TOY, "training")
    with pytest.raises(ValueError, match="no function 'halve'"):
        expressions.Expression("halve(action)")


# Statistics.


@pytest.mark.parametrize("name", ["bridge", "google"])
def test_statistics_have_the_published_layout(tmp_path, shared_data, name):
    published = json.loads((shared_data / "upstream" / f"dataset_statistics_{name}.json").read_text())
    published = published if "action" in published else next(iter(published.values()))
    ours = open_toy(toy_rlds.write(tmp_path)).statistics.to_json()
    assert published.keys() == ours.keys()
    for part in ("action", "proprio"):
        assert published[part].keys() == ours[part].keys() - {"mask"}
    assert ours["action"]["mask"] == [True] * 6 + [False]
    read = statistics.read(shared_data / "upstream" / f"dataset_statistics_{name}.json", ["x"])
    (values,) = read.values()
    np.testing.assert_allclose(values.action["q01"][:6], published["action"]["q01"][:6])
    assert (values.action["min"][6], values.action["max"][6]) == (-1, 1)


def test_statistics_are_those_of_the_steps_that_are_learned_from(tmp_path):
    dataset = open_toy(toy_rlds.write(tmp_path))
    recorded = np.concatenate([toy_rlds.episode(seed, 9 + seed)["steps/action"] for seed in range(6)]).astype(float)
    content = dataset.statistics.to_json()
    assert (content["num_transitions"], content["num_trajectories"]) == (len(recorded), 6)
    for name, function in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
        np.testing.assert_allclose(content["action"][name], function(recorded, axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(content["action"]["q99"], np.quantile(recorded, 0.99, axis=0), rtol=1e-5)
    low, high = dataset.statistics.bounds()
    inner = statistics.shrink(dataset.statistics.action, 0.65)
    x = np.linspace(-0.1, 0.1, 50)
    twice = np.clip(np.clip(2 * (x - low[0]) / (high[0] - low[0]) - 1, -1, 1), -0.65, 0.65) / 0.65
    once = np.clip(2 * (x - inner["q01"][0]) / (inner["q99"][0] - inner["q01"][0]) - 1, -1, 1)
    np.testing.assert_allclose(once, twice, atol=1e-9)


# Damage.


def test_a_flipped_bit_costs_one_episode_and_is_named(tmp_path, caplog):
    root = toy_rlds.write(tmp_path, [toy_rlds.episode(seed, 6) for seed in range(30)])
    shard = next(root.glob("*-train*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"1 of 30 episodes.*\n.*at byte \d+: the CRC of a record is wrong"):
        open_toy(root)
    dataset = open_toy(root, max_damaged_share=0.05)
    validation = open_toy(root, split="validation", max_damaged_share=0.05)
    assert len(dataset.episodes) + len(validation.episodes) == 29
    assert "1 of 30 episodes are left out" in caplog.text


def test_a_truncated_or_missing_shard_is_named(tmp_path):
    root = toy_rlds.write(tmp_path, shard_bytes=1)
    shards = sorted(root.glob("*-train*"))
    shards[2].write_bytes(shards[2].read_bytes()[:-100])
    shards[4].unlink()
    with pytest.raises(ValueError, match="2 of 6 episodes") as caught:
        open_toy(root)
    assert f"{shards[2].name}: at byte 0: the file ends within a record" in str(caught.value)
    assert f"{shards[4].name} is missing" in str(caught.value)
    assert len(open_toy(root, max_damaged_share=0.5).episodes) == 3  # and one for validation


def test_another_versions_features_are_recognised(tmp_path):
    root = toy_rlds.write(tmp_path)
    content = (root / "features.json").read_text()
    (root / "features.json").write_text(content.replace('"96"', '"95"'))
    with pytest.raises(ValueError, match=r"no record of split 'train' holds what features.json says(.|\n)*steps/codes"):
        open_toy(root)
    (root / "features.json").write_text(content[:-20])
    with pytest.raises(ValueError, match=r"features\.json is not JSON"):
        open_toy(root)
    (root / "features.json").write_text(content.replace("is_first", "is_frist"))
    with pytest.raises(ValueError, match="no steps/is_first"):
        open_toy(root)
    (root / "features.json").write_text(content.replace('"zlib"', '"brotli"'))
    with pytest.raises(ValueError, match=r"packed: found float32 tensor"):
        open_toy(root, Entry("toy", arm=("observation/packed", "zeros(3)")))


def test_more_episodes_than_listed_and_empty_splits_are_refused(tmp_path):
    root = toy_rlds.write(tmp_path / "a")
    info = root / "dataset_info.json"
    info.write_text(info.read_text().replace('"6"', '"5"'))
    with pytest.raises(ValueError, match=r"holds 6 episodes, dataset_info\.json says 5"):
        open_toy(root)
    with pytest.raises(ValueError, match="split 'train' is empty"):
        open_toy(toy_rlds.write(tmp_path / "b", []))
    with pytest.raises(ValueError, match="all 2 episodes of split 'train' are empty"):
        open_toy(toy_rlds.write(tmp_path / "c", [toy_rlds.episode(0, 0)] * 2))
    dataset = open_toy(toy_rlds.write(tmp_path / "d", [toy_rlds.episode(0, n) for n in (5, 0, 6)]))
    assert [e.end - e.start for e in dataset.episodes] == [5]  # the last is for validation


def test_nan_is_reported_left_out_of_statistics_and_replaced(tmp_path, caplog):
    bad = toy_rlds.episode(3, 9)
    bad["steps/action"][4, 2] = np.nan
    root = toy_rlds.write(tmp_path, [toy_rlds.episode(0, 9), bad, toy_rlds.episode(1, 9), toy_rlds.episode(2, 9)])
    dataset = open_toy(root)
    assert "1 steps in 1 episodes have NaN" in caplog.text and "record 1" in caplog.text
    assert all(np.isfinite(value).all() for value in dataset.statistics.action.values())
    with pytest.raises(base.CorruptFrameError, match="every value must be finite"):
        dataset.actions(range(10, 19))
    source = make_source(dataset)
    batch = source.training_batch(np.arange(len(source)), np.zeros(len(source), np.uint32))
    assert set(batch.corrupt[batch.corrupt >= 0]) == {1} and np.isfinite(batch.actions).all()
