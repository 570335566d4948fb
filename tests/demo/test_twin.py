"""The trained policy that comes with the package: small, whole, and still able to do what it is shown for."""

from __future__ import annotations

import collections
import configparser
import pathlib
import shutil
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import bundle, demo
from experiments.scripted_presets import FIXTURE_TASKS
from robovlms_jax.demo import twin
from robovlms_jax.demo.stage import Stage
from robovlms_jax.demo.world import Start, World
from robovlms_jax.evaluation import chains
from robovlms_jax.load import load_policy
from robovlms_jax.nn import stack
from robovlms_jax.training import checkpoints, items, seals
from tests.fake_hub import FakeHub

ROOT = pathlib.Path(__file__).resolve().parents[2]


def files():
    return [path for path in twin.DIRECTORY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_the_twin_is_whole_and_below_two_megabytes():
    step = checkpoints.locate(twin.DIRECTORY)
    assert seals.damage(step) is None
    seals.verify(step, "params", "serving")
    assert sum(path.stat().st_size for path in files()) <= 2e6


def test_the_twin_is_installed_with_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    patterns = config["options.package_data"]["robovlms_jax"].split()
    package = ROOT / "robovlms_jax"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    missing = [path.name for path in [*files(), package / "demo" / "page.html"] if path not in shipped]
    assert [name for name in missing if name != "__init__.py"] == []


def test_the_twin_knows_the_defaults_tasks_and_names_nothing_of_where_it_was_made():
    shown = demo.describe(demo.DemoConfig(), checkpoints.locate(twin.DIRECTORY))
    assert tuple(shown.tasks) == FIXTURE_TASKS and dict(shown.image_sizes) == {"static": 96, "wrist": 64}
    serving = items.read_serving(checkpoints.locate(twin.DIRECTORY))
    notes = [path.read_text() for path in twin.DIRECTORY.rglob("commit_success.txt")]
    assert len(notes) == 2 and not any("/" in note for note in notes)
    for room, name in (("data", "root"), ("train", "output"), ("backbone", "weights")):
        assert not pathlib.PurePath(serving["config"][room].get(name) or "").is_absolute()


def test_a_shared_policy_is_shown_under_its_name_and_an_own_one_under_its_last_folder(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    shutil.copytree(twin.DIRECTORY, tmp_path / "hub" / "me" / "table")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    for checkpoint, name in (("hf://me/table", "hf://me/table"), (str(twin.DIRECTORY), "in twin")):
        shown = demo.describe(demo.DemoConfig(checkpoint=checkpoint), checkpoints.locate(checkpoint))
        assert shown.about.startswith(f"PlayTable, a simulated table. The policy {name} (kosmos-2")
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", "hf://me/nothing"])
    with pytest.raises(SystemExit, match="error: cannot download hf://me/nothing"):
        demo.main()


def test_what_is_beyond_the_range_of_16_bits_is_not_bundled():
    good = {"a": {"kernel": np.array([1.0, -2.5])}}
    assert bundle.halve(good)["a"]["kernel"].dtype == np.float16
    for bad in (np.nan, np.inf, 7e4):
        with pytest.raises(ValueError, match="parameter a/kernel has values beyond 65504 or not finite"):
            bundle.halve({"a": {"kernel": np.array([1.0, bad])}})


@pytest.mark.slow
def test_a_bundle_opens_like_the_checkpoint_it_was_made_of(tmp_path):
    made = bundle.bundle(bundle.BundleConfig(str(twin.DIRECTORY), str(tmp_path / "small")))
    assert not [path for path in made.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    before, after = (
        flatten_dict(stack.joined(load_policy(x)._batched.params), sep="/") for x in (twin.DIRECTORY, made)
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)
    with pytest.raises(FileExistsError, match="another directory"):
        bundle.bundle(bundle.BundleConfig(str(twin.DIRECTORY), str(tmp_path / "small")))


@pytest.mark.slow
def test_the_twin_solves_known_starts_on_a_table_it_never_saw():
    # The first sixteen trials of the run's own report, through the page's stage: safety layer, way home and all.
    shown = demo.describe(demo.DemoConfig(), checkpoints.locate(twin.DIRECTORY))
    trials = chains.single_tasks(FIXTURE_TASKS, 16)
    scenes = iter([Start("D", trial.condition) for trial in trials] + [Start("D", trials[0].condition)])
    stage = Stage(
        World(shown.image_sizes),
        load_policy(twin.DIRECTORY),
        shown.sentences,
        scenes,
        execution=shown.execution,
        max_steps=shown.max_steps,
    )
    done = collections.Counter()
    for trial in trials:
        before = stage.score[0]
        stage.instruct(shown.sentences.known[trial.tasks[0]][0])
        for _ in range(shown.max_steps + 1):
            if stage.tick().facts["phase"] == "returning":
                break
        done[trial.tasks[0]] += stage.score[0] - before
        stage.next_scene()
    assert stage.score[1] == 16 and stage.score[0] >= 11, done
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(stage.world.frozen.state))
