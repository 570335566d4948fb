"""Trials on the disk: read as demonstrations are, with who acted, whatever ends the program."""

from __future__ import annotations

import json
import os
import stat

import jax
import numpy as np
import pytest

from robovlms_jax.data import calvin
from robovlms_jax.playtable import demonstrations, splits
from robovlms_jax.teaching import keeping
from robovlms_jax.teaching.lesson import Exercise, Kept, Step
from tests.labeling.made_up import states

SETTINGS = {"seed": 0}
EXERCISE = Exercise(3, "B", "open_drawer", "open the drawer", np.zeros(15), np.zeros(24))


@pytest.fixture(autouse=True)
def _plain_pictures(monkeypatch):
    def look(self, demos):
        for _, demo in demos:
            yield {camera: np.full((demo.length, size, size, 3), 7, np.uint8) for camera, size in self._sizes.items()}

    monkeypatch.setattr(demonstrations.Renderer, "_look", look)


def steps(whose):
    """Of a hand that goes 1 cm along x each; whose: "p" for the policy's, "h" for the person's."""
    state = jax.tree.map(lambda leaf: leaf[0], states(np.zeros((1, 3))))
    for t, who in enumerate(whose):
        robot = np.array([0.01 * t, *[0.0] * 14], np.float32)
        action = np.array([0.5, 0, 0, 0, 0, 0.1, -1], np.float32)
        yield Step(state, robot, np.zeros(24, np.float32), action, who == "h", t == len(whose) - 1)


def kept(out, *trials):
    with keeping.keeper(out, SETTINGS, ("A", "B"), (8, 6)) as keeper:
        for number, whose in trials:
            keeper.keep(EXERCISE._replace(number=number), list(steps(whose)))
        return keeper.kept, keeper.numbers


def spans(out):
    lines = (out / "journal/training/recording.jsonl").read_text().splitlines()[1:]
    return [row["span"] for line in lines for row in json.loads(line)["segments"]]


def test_what_a_person_did_is_annotated_and_every_frame_says_who_acted(tmp_path):
    assert kept(tmp_path, (3, "pphhpph"), (4, ""), (5, "hh")) == (Kept(3, 2, 9), {3, 4, 5})
    # frame 4 is where the person's last action led to; a single last frame would teach nothing
    assert spans(tmp_path) == [[2, 4], [7, 8]]
    data = calvin.open_npz(tmp_path, "training")
    assert [(e.start, e.end, e.task) for e in data.episodes] == [(2, 4, "open_drawer"), (7, 8, "open_drawer")]
    actions = data.array("rel_actions", np.arange(7))
    np.testing.assert_allclose(actions[3], [0.5, 0, 0, 0, 0, 0.1, -1], atol=1e-6)
    np.testing.assert_allclose(data.array("actions", [3])[0], [0.03 + 0.01, 0, 0, 0, 0, 0.005, -1], atol=1e-6)
    assert data.images([3], ["static", "wrist"])["wrist"].shape == (1, 6, 6, 3)
    rows = [np.load(tmp_path / f"training/episode_{i:07d}.npz")[splits.INTERVENTION].item() for i in range(9)]
    assert rows == [0, 0, 1, 1, 0, 0, 1, 1, 1]


def test_a_program_that_was_killed_loses_no_trial_that_was_kept_and_half_written_ones_vanish(tmp_path):
    kept(tmp_path, (0, "hhh"))
    half = tmp_path / "training/episode_0000003.npz"
    half.write_bytes(b"torn")  # killed between frames and line
    (tmp_path / "training/ep_lens.npy").unlink()  # killed between line and what describes the frames
    assert kept(tmp_path) == (Kept(1, 1, 3), {0}) and not half.exists()
    assert np.load(tmp_path / "training/ep_lens.npy").tolist() == [3]
    assert kept(tmp_path, (1, "phh"))[0] == Kept(2, 2, 6) and spans(tmp_path) == [[0, 2], [4, 5]]


def test_a_full_disk_takes_back_the_trial_and_leaves_the_others(tmp_path, monkeypatch):
    with keeping.keeper(tmp_path, SETTINGS, ("A", "B"), (8, 6)) as keeper:
        keeper.keep(EXERCISE, list(steps("hh")))
        with monkeypatch.context() as full:

            def append(*args, **more):
                raise OSError(28, "No space left on device")

            full.setattr(splits.json_lines, "append", append)
            with pytest.raises(OSError, match="No space"):
                keeper.keep(EXERCISE._replace(number=4), list(steps("hh")))
        assert not (tmp_path / "training/episode_0000002.npz").exists() and keeper.numbers == {3}
        assert keeper.keep(EXERCISE._replace(number=4), list(steps("hhh"))) == Kept(2, 2, 5)


def test_another_policy_or_a_foreign_folder_is_refused_and_so_is_a_second_writer(tmp_path):
    def refused(out, settings, kind, why):
        with pytest.raises(kind, match=why), keeping.keeper(out, settings, ("A", "B"), (8, 6)):
            pass

    own, foreign = tmp_path / "own", tmp_path / "foreign"
    kept(own, (0, "hh"))
    refused(own, {"seed": 1}, ValueError, "begun with other settings")
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    refused(foreign, SETTINGS, FileExistsError, "holds no recording")
    with keeping.keeper(own, SETTINGS, ("A", "B"), (8, 6)):
        refused(own, SETTINGS, ValueError, "is being written by")


def test_states_of_a_trial_are_put_together_for_the_pictures(tmp_path, monkeypatch):
    seen = []
    plain = demonstrations.Renderer._look
    monkeypatch.setattr(demonstrations.Renderer, "_look", lambda self, demos: seen.extend(demos) or plain(self, demos))
    kept(tmp_path, (0, "phh"))
    ((chain, demo),) = seen
    assert chain.scene == 1 and {len(leaf) for leaf in jax.tree.leaves(demo.steps.states)} == {3}


def test_frames_and_their_names_are_on_the_disk_before_a_trial_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    pictures = {camera: np.zeros((2, 4, 4, 3), np.uint8) for camera in ("static", "wrist")}
    segment = demonstrations.Segment("turn_on_led", pictures, {"rel_actions": np.zeros((2, 7))})
    splits.NpzFrames(tmp_path, (4, 4), durable=True).save(0, segment)
    assert synced == [False, False, True]  # two files, then the directory
