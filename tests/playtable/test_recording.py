"""What a recording leaves behind when it is stopped, and how it goes on. Made-up chains stand in for the simulator."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from robovlms_jax.data import calvin, language, spool
from robovlms_jax.envs.calvin import tasks
from robovlms_jax.playtable import demonstrations, recording, splits


def fake_chains(tables, renderer):
    """Chain k has k % 3 segments of 3 frames; every number in it says which chain and frame it is."""
    for k in tables.numbers:
        segments = []
        for i in range(k % 3):
            marks = 1000.0 * tables.seed + 10.0 * k + i + np.zeros((3, 1)) + np.arange(3)[:, None] / 4
            images = {camera: np.full((3, 8, 8, 3), k, np.uint8) for camera in ("static", "wrist")}
            arrays = {"rel_actions": marks.repeat(7, 1), "actions": marks.repeat(7, 1)}
            arrays |= {"robot_obs": marks.repeat(15, 1), "scene_obs": marks.repeat(24, 1)}
            segments.append(demonstrations.Segment("open_drawer", images, arrays))
        yield k, segments, 3


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(demonstrations, "rendered", fake_chains)


def config(path, **changes):
    return recording.RecordConfig(out=str(path), **{"episodes": 6, "validation_episodes": 3} | changes)


def contents(path):
    """Everything that training reads, as plain values."""
    found = {}
    for file in sorted(path.rglob("*.np[yz]")):
        loaded = np.load(file, allow_pickle=True)
        if file.suffix == ".npz":
            value = {key: loaded[key].tolist() for key in loaded.files}
        else:
            value = str(loaded.item() if loaded.dtype == object else loaded.tolist())
        found[str(file.relative_to(path))] = value
    return found


def stop_after(monkeypatch, calls, error):
    """The `calls`-th frame is written by half, then `error` comes."""
    real, count = np.savez, iter(range(1, 10**6))

    def savez(file, **arrays):
        if next(count) == calls:
            file.write(b"PK half a frame")
            raise error
        real(file, **arrays)

    monkeypatch.setattr(np, "savez", savez)


@pytest.mark.parametrize("calls", [1, 8, 17, 20])  # in the first, a middle and the last chain, in the second split
def test_a_killed_recording_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, calls):
    counts = recording.record(config(tmp_path / "whole"))
    assert counts == {"attempted": 27, "recorded": 9, "frames": 27}
    with monkeypatch.context() as patch:
        stop_after(patch, calls, KeyboardInterrupt())  # nothing gets a chance to clean up
        with pytest.raises(KeyboardInterrupt):
            recording.record(config(tmp_path / "parts"))
    journal = tmp_path / "parts" / "journal" / "training" / "recording.jsonl"
    journal.write_text(journal.read_text() + '{"frames": 3, "att')  # killed while it wrote a line
    assert recording.record(config(tmp_path / "parts")) == counts
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    # once finished there is nothing to do; asked for more, it adds
    assert recording.record(config(tmp_path / "parts")) == counts
    more = recording.record(config(tmp_path / "parts", episodes=9))
    assert more["recorded"] == counts["recorded"] + 3
    longer = contents(tmp_path / "parts")
    assert all(longer[name] == value for name, value in contents(tmp_path / "whole").items() if "episode_" in name)


def test_a_full_disk_leaves_a_dataset_that_can_be_read(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 12, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match=r"No space left.*keeps the 4 chains of training.*same command goes on"):
            recording.record(config(tmp_path))
    dataset = calvin.open_dataset(tmp_path, "training")
    assert [(e.start, e.end) for e in dataset.episodes] == [(0, 2), (3, 5), (6, 8)]  # chains 1 and 2
    frames = np.arange(dataset.episodes[-1].start, dataset.episodes[-1].end + 1)
    np.testing.assert_allclose(dataset.actions(frames)[:, 0] % 1, [0.0, 0.25, 0.5])
    whole = recording.record(config(tmp_path))
    assert whole["recorded"] == 9


def test_a_full_disk_before_the_first_chain_is_said_plainly(tmp_path, monkeypatch):
    stop_after(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match=r"No space left.*keeps the 1 chains of training"):  # chain 0 has no frames
        recording.record(config(tmp_path))
    assert not list(tmp_path.rglob("*.npz"))


def test_directories_that_cannot_be_used_are_refused(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds no recording to go on with"):
        recording.record(config(taken))
    with pytest.raises(FileExistsError, match="is a file"):
        recording.record(config(taken / "thesis.tex"))
    with pytest.raises(ValueError, match=r"thesis\.tex is a file"):  # below a file nothing can be made, whoever asks
        recording.record(config(taken / "thesis.tex" / "below"))
    begun = tmp_path / "begun"
    recording.record(config(begun))
    with pytest.raises(ValueError, match=r"other settings.*max_steps: 200 there, 100 here"):
        recording.record(config(begun, max_steps=100))
    journal = begun / "journal" / "training" / "recording.jsonl"
    journal.write_text(journal.read_text().replace('"frames"', '"trams"'))
    with pytest.raises(ValueError, match="damaged"):
        recording.record(config(begun))


@pytest.mark.parametrize("pack", [True, False])
def test_a_recording_that_was_stopped_after_its_last_chain_is_finished_by_the_same_command(tmp_path, monkeypatch, pack):
    settings = {"pack": pack, "image_size": (8, 8)}
    counts = recording.record(config(tmp_path / "whole", **settings))
    owner, name = (splits.packing, "pack") if pack else (np, "save")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            recording.record(config(tmp_path / "parts", **settings))
    assert recording.record(config(tmp_path / "parts", **settings)) == counts
    for split in ("training", "validation"):
        whole, parts = (calvin.open_dataset(tmp_path / name, split) for name in ("whole", "parts"))
        assert whole.episodes == parts.episodes
    assert not list(tmp_path.rglob("*.unpacked*"))


@pytest.mark.parametrize("pack", [True, False])
def test_a_recording_in_which_nothing_succeeded_is_refused_again_when_it_is_asked_for_again(tmp_path, pack):
    """Fails if the second call takes chains without frames for a finished split, and training finds none."""
    for plays in (1, 0):
        journal = splits.Journal(splits.directory(tmp_path, "training"), {}, splits.own_sentences(held_out=False))
        played = []

        def play(numbers, bar, played=played):
            played.append(numbers)
            return [(number, [], 1) for number in numbers]

        with pytest.raises(RuntimeError, match="no demonstration succeeded"):
            splits.record(journal, tmp_path / "training", 2, (8, 8), play, pack=pack)
        assert len(played) == plays


def test_a_killed_packed_recording_goes_on(tmp_path, monkeypatch):
    counts = recording.record(config(tmp_path / "whole", pack=True, image_size=(8, 8)))
    real, count = spool.Spool.add, iter(range(1, 10**6))

    def add(spool, *args):
        real(spool, *args)
        if next(count) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spool.Spool, "add", add)
        with pytest.raises(KeyboardInterrupt):
            recording.record(config(tmp_path / "parts", pack=True, image_size=(8, 8)))
    assert recording.record(config(tmp_path / "parts", pack=True, image_size=(8, 8))) == counts
    for split in ("training", "validation"):
        whole, parts = (calvin.open_dataset(tmp_path / name, split) for name in ("whole", "parts"))
        assert whole.episodes == parts.episodes
        np.testing.assert_array_equal(whole.actions(whole.frame_ids), parts.actions(parts.frame_ids))
    assert not list(tmp_path.rglob("*.unpacked*"))
    # a packed split cannot grow
    with pytest.raises(ValueError, match="episodes: 6 there, 9 here"):
        recording.record(config(tmp_path / "parts", pack=True, image_size=(8, 8), episodes=9))


def test_pictures_of_few_frames_are_training_s_and_have_a_layout_of_their_own(tmp_path, monkeypatch):
    """Fails if validation is thinned out too, if settings of before are taken for others, or if CALVIN's layout gets
    frames without pictures."""
    every = []

    def watched(tables, renderer):
        every.append(tables.config.picture_every)
        return fake_chains(tables, renderer)

    monkeypatch.setattr(demonstrations, "rendered", watched)
    with pytest.raises(ValueError, match=r"picture_every=4 leaves frames without pictures.*add --pack"):
        config(tmp_path / "npz", picture_every=4)
    with pytest.raises(ValueError, match="picture_every=0 must be at least 1"):
        config(tmp_path / "npz", picture_every=0)
    recording.record(config(tmp_path / "few", picture_every=4, pack=True, image_size=(8, 8)))
    assert every == [4, 1]
    with pytest.raises(ValueError, match=r"other settings .*picture_every: 4 there, 1 here"):
        recording.record(config(tmp_path / "few", pack=True, image_size=(8, 8)))
    recording.record(config(tmp_path / "all"))
    words = language.read(str(tmp_path / "all" / "paraphrases.json"))
    assert set(words.sentences["open the drawer"]) == {*tasks.TASKS["open_drawer"].phrasings} - {"open the drawer"}
    assert set(tasks.TASKS["open_drawer"].held_out) < set(words.never) and not set(words.never) & set(words.sentences)
    drawer = tasks.TASKS["open_drawer"]
    assert set(words.tasks["open_drawer"]) >= {*drawer.phrasings, *drawer.held_out} and set(words.tasks) == {
        *tasks.TASKS
    }
    for left, kept in (('{"never": ["mine"]}', True), ('{"never": ["mi', False)):  # changed by somebody; cut off
        (tmp_path / "all" / "paraphrases.json").write_text(left)
        recording.record(config(tmp_path / "all"))
        found = (tmp_path / "all" / "paraphrases.json").read_text()
        assert found == left if kept else language.read(str(tmp_path / "all" / "paraphrases.json")) == words
    assert (tmp_path / "all" / "paraphrases.damaged.json").read_text() == left
    journal = tmp_path / "all" / "journal" / "training" / "recording.jsonl"
    assert "picture_every" not in journal.read_text()  # as recordings of before have it
