"""The packed layout: what comes out is what went in, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from experiments import spreading
from robovlms_jax.data import calvin, packed, packing
from robovlms_jax.driving import recording
from robovlms_jax.driving.config import RecordingConfig
from robovlms_jax.parallel.config import RayConfig

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SPANS = [(100, 112), (105, 120), (130, 139)]
FRAMES = [*range(100, 121), *range(130, 140)]
BOTH = ("static", "wrist")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(packing, "FRAMES_PER_SHARD", 8)


def pack(root: pathlib.Path, out: pathlib.Path, **options) -> packed.PackedDataset:
    source = calvin.open_npz(root, "training")
    spans = np.array([(episode.start, episode.end) for episode in source.episodes])
    return packing.pack(source, out / "training", frame_ids=source.frames_within(spans), **options)


def content(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean(np.square(a.astype(float) - b)))


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_everything_annotated_comes_back(write_calvin, frame_content, tmp_path, small_shards, codec):
    root = write_calvin(SPANS, frames=range(90, 150))
    dataset = pack(root, tmp_path / "out", codec=codec)
    source = calvin.open_npz(root, "training")
    assert dataset.frame_ids.tolist() == FRAMES
    assert dataset.episodes == source.episodes
    assert dict(dataset.image_sizes) == source.image_sizes
    assert len(dataset.meta["shards"]) == 4
    ids = [138, 104, 104, 120, 130]
    images = dataset.images(ids, BOTH)
    for row, frame_id in enumerate(ids):
        for camera, key in calvin.IMAGE_KEYS.items():
            if codec == "png":
                np.testing.assert_array_equal(images[camera][row], frame_content(frame_id)[key])
            else:
                assert psnr(images[camera][row], frame_content(frame_id)[key]) > 35
    for name in calvin.ARRAY_SIZES:
        np.testing.assert_array_equal(dataset.array(name, FRAMES), source.array(name, FRAMES))
        assert dataset.array(name, FRAMES).dtype == np.float32


def test_the_packed_layout_is_found_and_filtered(write_calvin, tmp_path):
    pack(write_calvin(SPANS), tmp_path / "out")
    dataset = calvin.open_dataset(tmp_path / "out", "training", exclude_tasks=["open_drawer"])
    assert isinstance(dataset, packed.PackedDataset)
    assert [episode.task for episode in dataset.episodes] == ["turn_on_led", "push_blue_block_left"]
    again = pickle.loads(pickle.dumps(dataset))
    assert again.episodes == dataset.episodes
    np.testing.assert_array_equal(again.images([105], BOTH)["static"], dataset.images([105], BOTH)["static"])


def test_the_command_packs_every_split_with_its_sidecars(write_calvin, tmp_path):
    from experiments import pack_calvin

    root = write_calvin(SPANS, frames=range(90, 150))
    shutil.copytree(root / "training", root / "validation")
    (root / "validation" / ".hydra").mkdir()
    (root / "validation" / ".hydra" / "merged_config.yaml").write_text("scene: D")
    pack_calvin.main(pack_calvin.Args(root=(root,), out=tmp_path / "out", workers=1, all_frames=True))
    for split in ("training", "validation"):
        dataset = calvin.open_dataset(tmp_path / "out", split)
        assert dataset.frame_ids.tolist() == list(range(90, 150))
        assert np.load(dataset.directory / "ep_start_end_ids.npy").tolist() == [[90, 149]]
    assert (tmp_path / "out" / "validation" / ".hydra" / "merged_config.yaml").read_text() == "scene: D"
    with pytest.raises(ValueError, match=r"looked for .*nowhere/training"):
        pack_calvin.main(pack_calvin.Args(root=(tmp_path / "nowhere",), out=tmp_path / "out2"))


def test_one_read_serves_a_run_of_frames(write_calvin, tmp_path, monkeypatch):
    dataset = pack(write_calvin(SPANS), tmp_path / "out")
    reads = []
    real = os.pread
    monkeypatch.setattr(
        os, "pread", lambda handle, length, offset: reads.append(length) or real(handle, length, offset)
    )
    dataset.images(range(100, 108), BOTH)
    assert len(reads) == 1
    whole = reads.pop()
    dataset.images(range(100, 108), ("wrist",))
    assert len(reads) == 8
    assert sum(reads) < whole / 2
    reads.clear()
    dataset.images([100, 110], ("wrist", "static"))
    assert len(reads) == 2


def test_frames_of_several_shards_are_read_alone(write_calvin, tmp_path, small_shards, monkeypatch):
    # The first shard's last frames end further into their file than the second's begin: nothing to read along.
    dataset = pack(write_calvin(SPANS), tmp_path / "out")
    sizes, reads, real = {}, [], os.pread
    monkeypatch.setattr(
        os, "pread", lambda handle, length, offset: reads.append(length) or real(handle, length, offset)
    )
    wanted = [FRAMES[row] for row in (6, 8, 15)]
    for frame in wanted:
        dataset.images([frame], BOTH)
        sizes[frame] = reads.pop()
    dataset.images(wanted[::-1], BOTH)
    assert sorted(reads) == sorted(sizes.values())


def test_threads_read_the_same_bytes(write_calvin, tmp_path, small_shards):
    dataset = pack(write_calvin(SPANS), tmp_path / "out", codec="png")
    expected = dataset.images(FRAMES, BOTH)["static"]
    dataset.close()
    wrong = []

    def read(seed: int) -> None:
        for row in np.random.default_rng(seed).permutation(len(FRAMES)):
            image = dataset.images([FRAMES[row]], ("static",))["static"][0]
            if not np.array_equal(image, expected[row]):
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_finished_shards_are_kept_and_the_result_is_the_same(write_calvin, tmp_path, small_shards, monkeypatch):
    root = write_calvin(SPANS)
    pack(root, tmp_path / "whole")
    real, written = calvin.NpzDataset.frame, []

    def frame(self, frame_id):
        written.append(frame_id)
        if frame_id == 119 and interrupted:
            raise KeyboardInterrupt
        return real(self, frame_id)

    monkeypatch.setattr(calvin.NpzDataset, "frame", frame)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        pack(root, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    with pytest.raises(ValueError, match="packing has not finished"):
        calvin.open_dataset(tmp_path / "out", "training")
    interrupted = False
    written.clear()
    pack(root, tmp_path / "out")
    assert 101 not in written  # neither written again nor at the edge of a shard, which verification reads
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def living(session: int) -> list[str]:
    """Processes of a session that have not ended (Linux; elsewhere nothing is known)."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, of_session = path.read_text().rsplit(")", 1)[1].split()[:4]
            if int(of_session) == session and state not in "ZX":
                found.append(path.parent.name)
    return found


PACK_IN_PROCESSES = """
import sys, pathlib
from robovlms_jax.data import calvin, packing
packing.FRAMES_PER_SHARD = 4
if __name__ == "__main__":
    source = calvin.open_npz(sys.argv[1], "training")
    out = pathlib.Path(sys.argv[2], "training")
    packing.pack(source, out, frame_ids=source.frame_ids, workers=2)
"""


def test_killed_and_repeated_with_several_processes(write_calvin, tmp_path):
    root = write_calvin([(0, 299)])
    script = tmp_path / "script.py"
    script.write_text(PACK_IN_PROCESSES)
    command = [sys.executable, str(script), str(root)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    split = tmp_path / "out" / "training"
    process = subprocess.Popen(
        [*command, str(tmp_path / "out")], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(split.glob("shard_*.npz"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (split / packed.META).exists(), "it finished before it could be killed"
    kept = {path: path.stat().st_mtime_ns for path in split.glob("shard_*.npz")}
    assert kept
    while living(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not living(process.pid), "its workers did not end with it"

    kept_shards = {path.with_suffix(".bin"): path.with_suffix(".bin").stat().st_mtime_ns for path in kept}
    subprocess.run([*command, str(tmp_path / "out")], env=environment, check=True, stderr=subprocess.DEVNULL)
    assert {path: path.stat().st_mtime_ns for path in kept_shards} == kept_shards
    dataset = packed.PackedDataset(split)
    source = calvin.open_npz(root, "training")
    np.testing.assert_array_equal(dataset.frame_ids, source.frame_ids)
    np.testing.assert_array_equal(dataset.actions(range(300)), source.actions(range(300)))
    images = dataset.images(range(300), BOTH)
    assert psnr(images["wrist"], source.images(range(300), BOTH)["wrist"]) > 35
    assert not [
        path.name for path in split.iterdir() if path.suffix in (".tmp", ".npz") or path.name == packed.PARTIAL_META
    ]


def test_packing_twice_only_verifies(write_calvin, tmp_path):
    root = write_calvin(SPANS)
    pack(root, tmp_path / "out")
    shard = tmp_path / "out" / "training" / "shard_00000.bin"
    before = shard.stat().st_mtime_ns
    pack(root, tmp_path / "out")
    assert shard.stat().st_mtime_ns == before
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"shard_00000\.bin has crc32 .*, expected .*; delete .* and pack again"):
        pack(root, tmp_path / "out")


def test_verification_compares_with_the_source(write_calvin, tmp_path):
    root = write_calvin(SPANS)
    dataset = pack(root, tmp_path / "out")
    frame = root / "training" / "episode_0000100.npz"
    changed = {**np.load(frame), "actions": np.ones(7)}
    changed["rgb_static"] = changed["rgb_static"][:, ::-1]
    np.savez(frame, **changed)
    with pytest.raises(RuntimeError, match=r"\['static', 'actions'\] of frame 100 are not those of"):
        packing.verify(dataset, calvin.open_npz(root, "training"))


def test_another_way_of_packing_is_refused(write_calvin, tmp_path):
    root = write_calvin(SPANS)
    pack(root, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"packed with other settings \(codec: 'jpeg' there, 'png' here.*Choose another"
    ):
        pack(root, tmp_path / "out", codec="png")


def test_a_directory_with_something_else_is_left_alone(write_calvin, tmp_path):
    root = write_calvin(SPANS)
    (tmp_path / "out" / "training").mkdir(parents=True)
    (tmp_path / "out" / "training" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds something else \(thesis\.tex\)"):
        pack(root, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds something else \(ep_start_end_ids\.npy"):
        pack(root, root)


def test_an_output_that_cannot_be_written_is_named(write_calvin, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(
        OSError, match=r"packing into .*out/training failed: .*; choose a directory that can be written"
    ):
        pack(write_calvin(SPANS), tmp_path / "out")


def test_a_full_disk_is_said_before_the_work(write_calvin, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"about .* GB are needed and .* are free; free space and repeat") as caught:
        pack(write_calvin(SPANS), tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC


def test_a_disk_that_fills_up_keeps_finished_shards(write_calvin, tmp_path, small_shards, monkeypatch):
    root = write_calvin(SPANS)
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if str(target).endswith("shard_00002.bin"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(
        OSError, match="No space left on device; free space and repeat the command; finished shards are kept"
    ):
        pack(root, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "training").glob("*.npz")) == [
        "shard_00000.npz",
        "shard_00001.npz",
    ]


def test_all_unusable_frames_are_listed(write_calvin, tmp_path, small_shards):
    root = write_calvin(SPANS, change={103: {"rel_actions": np.full(7, np.nan)}, 131: {"rgb_static": None}})
    with pytest.raises(
        ValueError, match=r"(?s)2 frames cannot be used:.*0000103\.npz.*0000131\.npz.*or pass --skip_corrupt"
    ):
        pack(root, tmp_path / "out")
    assert not (tmp_path / "out" / "training" / packed.META).exists()


def test_unusable_frames_can_be_left_out(write_calvin, tmp_path, small_shards):
    root = write_calvin(SPANS, change={103: {"rel_actions": np.full(7, np.nan)}})
    dataset = pack(root, tmp_path / "out", skip_corrupt=True)
    assert dataset.frame_ids.tolist() == [frame_id for frame_id in FRAMES if frame_id != 103]
    assert [(episode.start, episode.end) for episode in dataset.episodes] == SPANS[1:]
    np.testing.assert_array_equal(dataset.actions([104]), calvin.open_npz(root, "training").actions([104]))
    with pytest.raises(ValueError, match="has no frame 103"):
        dataset.images([103], BOTH)


def test_nothing_usable_is_an_error(write_calvin, tmp_path):
    bad = {frame_id: {"rel_actions": np.full(7, np.inf)} for frame_id in range(4)}
    with pytest.raises(ValueError, match="no frame can be used"):
        pack(write_calvin([(0, 3)], change=bad), tmp_path / "out", skip_corrupt=True)


def test_an_image_jpeg_would_ruin_is_refused(write_calvin, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    root = write_calvin([(0, 3)], change={0: {"rgb_static": noise}})
    with pytest.raises(RuntimeError, match="does not survive jpeg at quality 5; raise it or use --codec png"):
        pack(root, tmp_path / "out", quality=5)


def test_a_packed_dataset_of_another_robot_is_packed_again_without_a_quarrel(tmp_path):
    """Its description is compared with the one in meta.json, where tuples have become lists."""
    made = recording.drive(RecordingConfig(episodes=1), range(1))
    source = recording.Frames("one drive", made, 1)
    first = packing.pack(source, tmp_path / "drives", frame_ids=source.frame_ids[:6])
    assert (
        packing.pack(source, tmp_path / "drives", frame_ids=source.frame_ids[:6]).robot == first.robot == source.robot
    )


@pytest.mark.slow
def test_two_workers_of_a_ray_cluster_pack_what_one_process_packs(write_calvin, tmp_path, small_shards):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    root = write_calvin(SPANS, frames=range(90, 150))
    with spreading.over_files(RayConfig(workers=2, address="local")):
        pack(root, tmp_path / "shared")
    pack(root, tmp_path / "alone")
    assert content(tmp_path / "shared") == content(tmp_path / "alone")
    assert len(content(tmp_path / "alone")) > 4
