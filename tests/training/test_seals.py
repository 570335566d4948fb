"""What a disk or a copy has altered is noticed, and a checkpoint is known by what is in it."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

from robovlms_jax.training import checkpoints, items, seals
from tests.training.test_checkpoints import at_step, restore, small_state, write_steps


def flip(path: pathlib.Path) -> None:
    """Other contents of the same length."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    run = tmp_path_factory.mktemp("run")
    write_steps(run, 1)
    return run


@pytest.fixture
def run(written, tmp_path) -> pathlib.Path:
    return shutil.copytree(written, tmp_path / "run")


def test_an_altered_byte_in_any_file_is_named_by_whoever_reads_that_part(run):
    step = run / "checkpoints" / "1"
    for name in json.loads((step / seals.SEAL).read_text()):
        item, before = name.split("/")[0], (step / name).read_bytes()
        flip(step / name)
        assert seals.damage(step) is None  # sizes alone do not tell
        with pytest.raises(seals.DamagedError, match=rf"{name} is damaged.*Copy the checkpoint again"):
            seals.verify(step, *seals.ITEMS)
        seals.verify(step, *(other for other in seals.ITEMS if other != item))
        (step / name).write_bytes(before)
    seals.verify(step, *seals.ITEMS)


@pytest.mark.parametrize("item", ["params", "train", "data"])
def test_a_run_does_not_go_on_from_an_altered_checkpoint(run, item):
    folder = run / "checkpoints" / "1" / item
    altered = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip(altered)
    with pytest.raises(seals.DamagedError, match=rf"{altered} is damaged"):
        restore(run)


def test_seals_of_sizes_alone_and_checkpoints_without_a_seal_still_load(run):
    seal = run / "checkpoints" / "1" / seals.SEAL
    entries = json.loads(seal.read_text())
    seal.write_text(json.dumps({name: entry["bytes"] for name, entry in entries.items()}))
    assert restore(run) == (1, 1.0)
    seal.unlink()
    assert restore(run) == (1, 1.0)


@pytest.mark.parametrize("text", ["[]", '{"params/x": null}', '{"params/x": {"size": 3}}', "3"])
def test_what_is_no_seal_is_said(run, text):
    (run / "checkpoints" / "1" / seals.SEAL).write_text(text)
    assert "seal.json is no seal" in seals.damage(run / "checkpoints" / "1")


def test_copies_are_the_same_policy_and_other_parameters_or_files_are_another(run, tmp_path):
    step = run / "checkpoints" / "1"
    known = seals.identity(step)
    assert known.step == 1 and known.label == f"step_1-{known.fingerprint}"
    copy = shutil.copytree(step, tmp_path / "elsewhere")
    assert seals.identity(copy) == known  # its step stands in its data, too
    saver = checkpoints.Checkpointer(tmp_path / "other", keep=1, serving={"config": {}})
    saver.save(at_step(small_state(), 1).replace(trainable={"head/kernel": small_state().trainable["head/kernel"]}), {})
    saver.close()
    assert seals.identity(tmp_path / "other" / "checkpoints" / "1") != known
    # Where the seal holds no checksums, the files themselves tell.
    (copy / seals.SEAL).unlink()
    unsealed = seals.identity(copy)
    assert unsealed == known
    flip(copy / "serving" / "metadata")
    assert seals.identity(copy) != known


def test_a_copy_that_lacks_files_is_told_in_a_few_lines(run):
    # Without its seal, too, as when files are copied one after the other. Fails if TensorStore's pages come through, or
    # if a checkpoint with a missing file is read as if it were whole.
    step = run / "checkpoints" / "1"
    (step / seals.SEAL).unlink()
    abstract = small_state().params
    for path in sorted(path for path in (step / "params").rglob("*") if path.is_file()):
        before = path.read_bytes()
        path.unlink()
        said, read = None, {"head": {"kernel": np.ones((2, 3))}}
        try:
            read = items.read_params(step, abstract)
        except ValueError as error:
            said = str(error)
        assert (read["head"]["kernel"] == 1.0).all(), path
        assert said is None or (str(step) in said and len(said) < 900 and said.count("\n") <= 2), said
        path.write_bytes(before)
    shutil.rmtree(step / "params")
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .*params is missing"):
        restore(run)
