"""Several recordings packed as one: every frame is there once, under a new number, and says what it said."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from experiments import pack_calvin
from robovlms_jax.data import calvin, packed

FIRST, SECOND = [(100, 104), (107, 110)], [(20, 26)]


@pytest.fixture
def recordings(write_calvin, tmp_path):
    """Two recordings; the frame numbers of the second come before the first's."""
    roots = []
    for name, spans in (("first", FIRST), ("second", SECOND)):
        roots.append(tmp_path / name)
        shutil.move(write_calvin(spans), roots[-1])
    return tuple(roots)


def pack(roots, out, **options) -> packed.PackedDataset:
    pack_calvin.main(pack_calvin.Args(root=tuple(roots), out=out, workers=1, **options))
    return packed.PackedDataset(out / "training")


def test_episodes_keep_their_frames_under_new_numbers(recordings, tmp_path):
    dataset = pack(recordings, tmp_path / "out")
    assert [(e.start, e.end) for e in dataset.episodes] == [(0, 4), (7, 10), (11, 17)]
    assert dataset.frame_ids.tolist() == [*range(5), *range(7, 18)]  # 105 and 106 lie in no episode
    old = [calvin.open_npz(root, "training") for root in recordings]
    assert [e.instruction for e in dataset.episodes] == [e.instruction for part in old for e in part.episodes]
    for new, part, frame_id in ((7, old[0], 107), (11, old[1], 20), (17, old[1], 26)):
        np.testing.assert_array_equal(dataset.array("rel_actions", [new])[0], part.frame(frame_id)[1]["rel_actions"])
        shown, real = dataset.images([new], ["wrist"])["wrist"][0], part.frame(frame_id)[0]["wrist"]
        assert np.abs(shown.astype(int) - real).mean() < 5


def test_packed_recordings_are_joined_without_another_loss(recordings, tmp_path):
    # Encoded anew they would lose a little each time.
    parts = [pack([root], tmp_path / f"packed_{root.name}") for root in recordings]
    dataset = pack([tmp_path / f"packed_{root.name}" for root in recordings], tmp_path / "out")
    assert dataset.encoded([11], "static") == parts[1].encoded([20], "static")
    mixed = pack([tmp_path / "packed_first", recordings[1]], tmp_path / "mixed")
    np.testing.assert_array_equal(
        mixed.array("robot_obs", mixed.frame_ids), dataset.array("robot_obs", mixed.frame_ids)
    )


def test_every_frame_is_stored_if_asked(recordings, tmp_path):
    again = tmp_path / "third"
    shutil.copytree(recordings[1], again)
    np.savez(again / "training" / "episode_0000027.npz", **np.load(again / "training" / "episode_0000026.npz"))
    dataset = pack([recordings[0], again], tmp_path / "out", all_frames=True)
    assert dataset.frame_ids.tolist() == [*range(5), *range(7, 19)]


def test_a_split_that_only_one_has_is_packed(recordings, tmp_path):
    shutil.copytree(recordings[1] / "training", recordings[1] / "validation")
    pack(recordings, tmp_path / "out")
    assert len(packed.PackedDataset(tmp_path / "out" / "validation").episodes) == len(SECOND)


def test_recordings_that_differ_are_refused(recordings, tmp_path):
    for path in (recordings[1] / "training").glob("episode_*.npz"):
        content = dict(np.load(path))
        content["rgb_static"] = content["rgb_static"][:8, :8]
        np.savez(path, **content)
    with pytest.raises(ValueError, match=r"second/training has image_sizes=.*\(8, 8\).*first/training has"):
        pack(recordings, tmp_path / "out")


def test_what_cannot_be_packed_is_refused_early(recordings, tmp_path):
    with pytest.raises(ValueError, match="root is empty"):
        pack_calvin.Args(root=(), out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"root names .*first more than once"):
        pack_calvin.Args(root=(*recordings, recordings[0]), out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"sensors=\['torque'\] are read from one recording"):
        pack_calvin.Args(root=recordings, out=tmp_path / "out", sensors=("torque",))
    with pytest.raises(ValueError, match="does not exist"):
        pack([recordings[0], tmp_path / "nowhere"], tmp_path / "out")
