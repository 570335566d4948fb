"""Mixtures, and what training draws: datasets by weight, sentences, windows that begin before their episode."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json

import jax
import numpy as np
import pytest

from experiments import convert_data
from robovlms_jax.data import base, calvin, language, loading, mixing, opening, order, segments, sensors, storage
from robovlms_jax.data.config import DataConfig
from robovlms_jax.data.registry import entry as entries
from robovlms_jax.data.registry import mixtures
from robovlms_jax.inputs.sensors import Reading
from tests.data import toy_rlds
from tests.data.test_rlds import make_source

STATE = sensors.make(Reading("proprio", "proprio", "robot_obs", (7,)))


def take(batches, count):
    with contextlib.closing(batches):
        return list(itertools.islice(batches, count))


def train(source, count, **options):
    options = {"segments_per_batch": 8, "seed": 5, "num_threads": 2, "prefetch": 2, **options}
    return take(loading.train_batches(source, **options), count)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def root(tmp_path):
    """Two robots, the second with actions ten times as large, no wrist camera, and a third of the episodes."""
    toy_rlds.write(tmp_path, [toy_rlds.episode(seed, 20) for seed in range(12)], name="arm")
    large = [toy_rlds.episode(100 + seed, 14, text="lift it") for seed in range(4)]
    for episode in large:
        episode["steps/action"][:, :6] *= 10
    toy_rlds.write(tmp_path, large, name="crane")
    (tmp_path / "mine.yaml").write_text(
        "datasets:\n  crane: {wrist: '', control_hz: 5}\nmixture: {arm: 3.0, crane: 1.0}\nbalance: false\n"
    )
    return tmp_path


def settings(root, **changes) -> DataConfig:
    return DataConfig(**{"dataset": str(root / "mine.yaml"), "root": str(root), "index_workers": 1, **changes})


def test_parts_are_drawn_by_weight_and_name_their_episodes(root):
    source = make_source(opening.open_split(settings(root), "training"), windows_per_segment=1)
    drawn = collections.Counter(
        source.dataset.episodes[episode].task for batch in train(source, 40) for episode in batch.episode
    )
    assert drawn == {"arm": 240, "crane": 80}
    balanced = json.dumps({"datasets": {"crane": {"wrist": ""}}, "mixture": {"arm": 1, "crane": 1}})
    (root / "balanced.json").write_text(balanced)
    groups = opening.open_split(settings(root, dataset=str(root / "balanced.json")), "training").groups
    assert [(g.name, g.weight) for g in groups] == [("arm", 11 * 20), ("crane", 3 * 14)]  # the last are held out
    assert "83.97%" in mixing.shares(groups, [100, 50])


def test_a_segment_of_few_windows_does_not_shift_the_weights(root):
    # crane's episodes have 11 windows of 4: segments of 8 and 3. Windows, not segments, follow the weights.
    source = make_source(opening.open_split(settings(root), "training"), windows_per_segment=8)
    counts = collections.Counter()
    for batch in train(source, 150):
        for episode, mask in zip(batch.episode, batch.window_mask, strict=True):
            counts[source.dataset.episodes[episode].task] += int(mask.sum())
    assert abs(counts["arm"] / counts.total() - 0.75) < 0.02


def test_actions_come_in_the_references_units(root):
    dataset = opening.open_split(settings(root), "training")
    arm, crane = (part.dataset for part in dataset._parts)
    first = next(e for e in dataset.episodes if e.task == "crane")
    own = crane.episodes[0]
    np.testing.assert_array_equal(dataset.actions([3]), arm.actions([3]))
    mixed, raw = dataset.actions([first.start])[0], crane.actions([own.start])[0]
    (low, high), (to_low, to_high) = crane.statistics.bounds(), arm.statistics.bounds()
    expected = (raw[:6] - low) / (high - low) * (to_high - to_low) + to_low
    np.testing.assert_allclose(mixed[:6], expected, atol=1e-6)
    assert mixed[6] == raw[6]
    np.testing.assert_array_equal(
        dataset.images([first.start], ["static"])["static"], crane.images([own.start], ["static"])["static"]
    )
    other = opening.open_split(settings(root, reference="crane"), "training")
    np.testing.assert_array_equal(other.actions([first.start]), crane.actions([own.start]))
    with pytest.raises(ValueError, match=r"data.reference='train' is no dataset of the mixture"):
        opening.open_split(settings(root, reference="train"), "training")


def test_frames_of_all_parts_are_read_together_and_come_in_the_order_asked_for(root, monkeypatch):
    # Breaks when answers of one part land in another's rows, or a part is asked more than once for a batch.
    dataset = opening.open_split(settings(root), "training")
    cameras = ("static", "wrist")
    ids = np.random.default_rng(0).permutation(dataset.num_frame_ids)[:40]
    one = [
        {name: getattr(dataset, name)([i])[0] for name in ("actions", "proprio")}
        | {camera: dataset.images([i], [camera])[camera][0] for camera in cameras}
        | {f"has {camera}": dataset.has_images([i], camera)[0] for camera in cameras}
        for i in ids
    ]
    asked = collections.Counter()
    for part in dataset._parts:
        real = part.dataset.images
        monkeypatch.setattr(
            part.dataset, "images", lambda *args, name=part.name, real=real: (asked.update([name]), real(*args))[1]
        )
    together = {"actions": dataset.actions(ids), "proprio": dataset.proprio(ids), **dataset.images(ids, cameras)}
    together |= {f"has {camera}": dataset.has_images(ids, camera) for camera in cameras}
    assert asked == {"arm": 1, "crane": 1}
    for name, values in together.items():
        np.testing.assert_array_equal(np.stack(values), np.stack([row[name] for row in one]), name)


def test_a_camera_that_a_part_lacks_is_black_masked_and_said_once(root, caplog):
    source = make_source(opening.open_split(settings(root), "training"), cameras=("static", "wrist"))
    assert caplog.text.count("no wrist camera in crane") == 1
    for batch in train(source, 3):
        tasks = np.array([source.dataset.episodes[episode].task for episode in batch.episode])
        assert (batch.inputs.image_mask["wrist"] == (tasks == "arm")[:, None]).all()
        assert not batch.inputs.images["wrist"][tasks == "crane"].any()
        assert batch.inputs.image_mask["static"].all() and batch.inputs.images["wrist"][tasks == "arm"].any()


def test_images_of_unlike_size_need_one(root):
    (root / "unlike.json").write_text(
        json.dumps({"datasets": {"crane": {"static": "wrist_image", "wrist": ""}}, "mixture": {"arm": 1, "crane": 1}})
    )
    with pytest.raises(ValueError, match=r"set data\.image_size"):
        opening.open_split(settings(root, dataset=str(root / "unlike.json")), "training")
    dataset = opening.open_split(settings(root, dataset=str(root / "unlike.json"), image_size=20), "training")
    assert dataset.image_sizes == {"static": (20, 20), "wrist": (20, 20)}


@pytest.mark.parametrize("step", [1, 5])
def test_a_mixture_resumes_exactly_and_on_any_number_of_hosts(root, step):
    dataset = opening.open_split(settings(root), "training")
    source = make_source(dataset, variation=language.Variation(templates=language.TEMPLATES))
    whole = train(source, step + 3)
    parts = [train(source, 3, start_step=step, process=(index, 2)) for index in (0, 1)]
    for expected, *shares in zip(whole[step:], *parts, strict=True):
        assert_same(expected, jax.tree.map(lambda *leaves: np.concatenate(leaves), *shares))


def check_workers(root, counts):
    dataset = opening.open_split(settings(root), "training")
    source = make_source(dataset, variation=language.Variation(templates=language.TEMPLATES))
    expected = train(source, 5)
    for count in counts:
        for a, b in zip(expected, train(source, 5, num_workers=count), strict=True):
            assert_same(a, b)
        (resumed,) = train(source, 1, num_workers=count, start_step=4)
        assert_same(expected[4], resumed)


def test_worker_processes_read_the_same_batches(root):
    check_workers(root, [2])


@pytest.mark.slow
def test_one_and_three_worker_processes_read_the_same_batches(root):
    check_workers(root, [1, 3])


def test_the_number_of_workers_is_chosen_by_measuring():
    class Slow:
        def __init__(self, count):
            self.count = count

        def __next__(self):
            import time

            time.sleep(0.001 if self.count == 2 else 0.02)

        def close(self):
            pass

    best, rates = loading.choose_workers(Slow, 8, candidates=[0, 1, 2], seconds=0.05)
    assert best == 2 and set(rates) == {0, 1, 2}


def test_the_fingerprint_knows_weights(root):
    sources = []
    for weight in (1.0, 2.0):
        (root / "w.json").write_text(json.dumps({"mixture": {"arm": weight, "crane": 1}, "balance": False}))
        sources.append(make_source(opening.open_split(settings(root, dataset=str(root / "w.json")), "training")))
    prints = [order.order_fingerprint(source, segments_per_batch=4, seed=1) for source in sources]
    with pytest.raises(ValueError, match="mixture was"):
        order.require_same_order(json.loads(json.dumps(prints[0])), prints[1])
    order.require_same_order(json.loads(json.dumps(prints[0])), prints[0])


def test_mistakes_in_mixtures_are_named(root):
    (root / "m.json").write_text(json.dumps({"mixture": {"arm": 1, "barge": 1}}))
    with pytest.raises(ValueError, match=r"1 of 2 datasets are not at(.|\n)*no RLDS dataset barge"):
        opening.open_split(settings(root, dataset=str(root / "m.json")), "training")
    (root / "m.json").write_text(json.dumps({"mixture": {"arm": -1}}))
    with pytest.raises(ValueError, match="weights above 0"):
        mixtures.resolve(str(root / "m.json"))
    for text, message in (
        ("mixture: {arm: [", "cannot be parsed"),
        ("datasets: {arm: {gripper: invert(action[6])}}", r'cannot be parsed(.|\n)*need quotes: {gripper: "invert'),
        ("", "holds None; expected datasets"),
        ("mixture: [arm]", r"mixture is \['arm'\]; expected"),
        ("mixture: {arm: lots}", "weights must be numbers: .*'lots'"),
        ("mixture: {arm: .nan}", "weights above 0"),
        ("mixture: {arm: 1}\ndatasets: {arm: 3}", r"datasets\.arm is 3; expected"),
        ("mixture: {arm: 1}\ndatasets: [arm]", r"datasets is \['arm'\]; expected"),
    ):
        (root / "m.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"m\.yaml.*" + message):
            mixtures.resolve(str(root / "m.yaml"))
    with pytest.raises(ValueError, match=r"m2\.yaml cannot be read: .*No such file"):
        mixtures.resolve(str(root / "m2.yaml"))
    with pytest.raises(ValueError, match=r"splits is 'train.*expected training and validation"):
        entries.Entry("arm", splits="train[:90%]")
    with pytest.raises(ValueError, match="not on a mixture"):
        opening.open_split(settings(root, exclude_tasks=("arm",)), "training")
    with pytest.raises(ValueError, match=r"data\.root is empty"):
        opening.open_split(DataConfig(), "training")


# Windows and sentences.


def test_left_padding_makes_every_frame_the_newest_once():
    every = segments.Segments(np.array([(10, 16), (20, 22)]), window=4, chunk=2, windows_per_segment=1, left_pad=True)
    assert len(every) == 6 + 2  # L windows each
    first, third = every[0], every[2]
    np.testing.assert_array_equal(first.step_ids, [10, 10, 10, 10, 11])
    np.testing.assert_array_equal(first.seen_mask, [False, False, False, True])
    np.testing.assert_array_equal(first.step_mask, [False, False, False, True, True])
    np.testing.assert_array_equal(third.seen_mask, [False, True, True, True])
    newest = [int(every[i].step_ids[3]) for i in range(len(every))]
    assert newest == [10, 11, 12, 13, 14, 15, 20, 21]
    shared = segments.Segments(np.array([(10, 16)]), window=4, chunk=2, windows_per_segment=3, left_pad=True)
    for index in range(len(shared)):
        for k in np.flatnonzero(shared[index].window_mask):
            alone = every[3 * index + int(k)]
            for name in ("step_ids", "step_mask", "seen_mask"):
                length = len(getattr(alone, name))
                np.testing.assert_array_equal(getattr(shared[index], name)[k : k + length], getattr(alone, name))


def test_padding_repeats_the_first_frame_and_reads_it_once(tmp_path):
    dataset = opening.open_split(
        DataConfig(dataset="bridge", root=str(toy_bridge(tmp_path)), index_workers=1), "training"
    )
    sample = make_source(dataset, left_pad=True)[0]
    np.testing.assert_array_equal(sample.inputs.step_mask, [False, False, False, True, True])
    for t in range(3):
        np.testing.assert_array_equal(sample.inputs.images["static"][t], sample.inputs.images["static"][3])
    assert sample.inputs.images["static"][3].any()


def toy_bridge(directory):
    """The bundled sample, copied so that its index is not written into the repository."""
    import shutil

    from experiments import bridge

    shutil.copytree(bridge.SAMPLE, directory / "sample", ignore=shutil.ignore_patterns(".frame_index"))
    return directory / "sample"


def test_the_bundled_sample_opens_in_both_ways(tmp_path):
    root = toy_bridge(tmp_path)
    options = {"root": str(root), "index_workers": 1}
    training, validation = (
        opening.open_split(DataConfig(dataset="bridge", **options), split) for split in ("training", "validation")
    )
    assert (len(training.episodes), len(validation.episodes)) == (14, 4)
    first = {training.images([e.start], ["static"])["static"].tobytes() for e in training.episodes}
    assert not first & {validation.images([e.start], ["static"])["static"].tobytes() for e in validation.episodes}
    mixture = opening.open_split(DataConfig(dataset=str(root / "mixture.yaml"), **options), "training")
    assert [group.name for group in mixture.groups] == ["bridge_orig", "bridge_commands"]
    assert not mixture.may_lack_images


def test_sentences_vary_in_training_and_never_in_evaluation(root, tmp_path):
    (tmp_path / "said.json").write_text(
        json.dumps({"templates": ["kindly {instruction}"], "sentences": {"lift it": ["raise the thing"]}})
    )
    variation = language.read(str(tmp_path / "said.json"))
    assert variation.of(base.Episode(0, 1, "lift it", "", ("pick it up",))) == (
        "lift it", "pick it up", "raise the thing", "kindly lift it", "kindly pick it up", "kindly raise the thing",
    )  # fmt: skip
    dataset = opening.open_split(settings(root), "training")
    source = make_source(dataset, variation=variation)
    said = {bytes(row[row > 0].astype(np.uint8)).decode() for b in train(source, 30) for row in b.inputs.text_ids}
    assert said == {"push the block", "kindly push the block", "lift it", "raise the thing", "kindly lift it",
                    "kindly raise the thing"}  # fmt: skip
    assert set(language.every(dataset.episodes, variation)) == said
    evaluated = take(loading.evaluation_batches(source, segments_per_batch=16, num_threads=1, prefetch=1), None)
    said = {bytes(row[row > 0].astype(np.uint8)).decode() for b in evaluated for row in b.inputs.text_ids}
    assert said == {"push the block", "lift it"}
    for wrong in ('{"templates": ["please"]}', '{"sentense": {}}', "[]", '{"templates": [3]}'):
        (tmp_path / "said.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"data\.paraphrases"):
            language.read(str(tmp_path / "said.json"))


def test_goal_relabelling_masks_what_comes_after_a_random_step(root):
    dataset = opening.open_split(settings(root), "training")
    plain, relabelled = (
        make_source(dataset, chunk=10, windows_per_segment=1, goal_relabelling=flag) for flag in (False, True)
    )
    shares = []
    for a, b in zip(train(plain, 40), train(relabelled, 40), strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        assert not (b.action_mask & ~a.action_mask).any()
        assert b.action_mask[:, :4].all()  # nothing up to the newest frame
        assert (np.diff(b.action_mask.astype(int), axis=1) <= 0).all()  # one cut, everything before it stays
        shares.append((a.action_mask[:, 3:].mean(), b.action_mask[:, 3:].mean()))
    before, after = np.mean(shares, axis=0)
    assert 0.5 * before < after < 0.95 * before


def test_calvin_becomes_an_rlds_dataset_with_the_same_samples(tmp_path):
    from experiments import calvin_abcd

    args = convert_data.Args("calvin", calvin_abcd.SAMPLE, tmp_path / "out", file_format="array_record")
    convert_data.main(args)
    (target,) = (tmp_path / "out").glob("*/*")
    assert storage.Directory(target).name == "1.0.0"
    (tmp_path / "m.json").write_text(json.dumps({"mixture": {target.parent.name: 1}}))
    before = calvin.open_dataset(calvin_abcd.SAMPLE, "validation")
    after = opening.open_split(
        DataConfig(dataset=str(tmp_path / "m.json"), root=str(tmp_path / "out"), index_workers=1), "validation"
    )
    a, b = (make_source(dataset, cameras=("static", "wrist"), sensors=[STATE]) for dataset in (before, after))
    assert len(a) == len(b)
    for index in (0, len(a) - 1):
        first, second = a[index], b[index]
        np.testing.assert_array_equal(first.action_mask, second.action_mask)
        np.testing.assert_array_equal(first.window_mask, second.window_mask)
        seen = first.window_mask.sum() + 3  # frames that windows of this segment look at
        for camera in ("static", "wrist"):
            np.testing.assert_array_equal(first.inputs.images[camera][:seen], second.inputs.images[camera][:seen])
        learned = first.action_mask
        scaled = first.actions[learned][:, :6] * np.array(before.action_units, np.float32)
        np.testing.assert_allclose(second.actions[learned][:, :6], scaled, rtol=1e-6)
        np.testing.assert_array_equal(second.actions[learned][:, 6], first.actions[learned][:, 6])
