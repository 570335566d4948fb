"""`python -m experiments.inspect_data`: kinds are told from directories, pages stand alone, errors are sentences."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import pathlib
import re
import shutil

import numpy as np
import pytest

from experiments import inspect_data, inspection_page, lerobot
from robovlms_jax.control import robot as robots
from robovlms_jax.data import inspection, rlds, rlds_writer, storage
from robovlms_jax.data.lerobot import synthetic
from tests.data import toy_rlds
from tests.processes import run_python

DATA = pathlib.Path(__file__).resolve().parents[2] / "data"


@pytest.fixture
def calvin(tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(DATA / "calvin_sample", tmp_path / "sample"))


@pytest.fixture
def bridge(tmp_path) -> pathlib.Path:
    skip = shutil.ignore_patterns(".frame_index")
    return pathlib.Path(shutil.copytree(DATA / "bridge_sample", tmp_path / "oxe", ignore=skip))


def look(root: pathlib.Path, tmp_path: pathlib.Path, **changes) -> tuple[str, str]:
    """(page, summary) of a dataset."""
    page, _ = inspect_data.main(inspect_data.Args(str(root), out=str(tmp_path / "out"), **changes))
    return page.read_text(), (page.parent / "summary.md").read_text()


class Links(html.parser.HTMLParser):
    """What a page refers to, and its tags, which must be closed in order."""

    def __init__(self):
        super().__init__()
        self.links, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass  # drawings

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_of_calvin_stands_alone_and_is_the_same_every_time(calvin, tmp_path, capsys):
    page, summary = look(calvin, tmp_path)
    again, _ = look(calvin, tmp_path)
    assert page == again
    links = Links()
    links.feed(page)
    assert (
        not links.open and len(links.links) == 8
    )  # four episodes, two cameras; the other pictures are data of the player
    assert all(link.startswith("data:image/jpeg;base64,") for link in links.links)
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    for text in ("push the drawer back in", "0.02 m", "wrist camera", "200 x 200 px", "30 Hz"):
        assert text in page
    assert summary in capsys.readouterr().out
    assert "## Problems" not in summary and "**gripper**: 1 is open" in summary
    assert "**action roll, pitch**: never changes" in summary and "training: 10 episodes, 354 steps, 12 s" in summary


def test_a_sentence_cannot_change_the_page(calvin, tmp_path):
    path = calvin / "training" / "annotations.json"
    episodes = json.loads(path.read_text())
    episodes[0]["instruction"] = "<script>alert('x')</script> & more"
    path.write_text(json.dumps(episodes))
    page, _ = look(calvin, tmp_path)
    assert "<script>alert" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("below", ["", "bridge_dataset", "bridge_dataset/1.0.0"])
def test_an_rlds_dataset_is_found_at_and_above_its_directory(bridge, tmp_path, below):
    page, summary = look(bridge / below, tmp_path)
    assert "# bridge_dataset" in summary and "RLDS, described by the registry" in summary
    assert "training: 14 episodes" in summary and "validation: 4 episodes" in summary
    assert page.count('<div class="player">') == 4 and page.count("<img") == 4


def test_an_unknown_rlds_dataset_is_read_by_common_names(tmp_path):
    toy_rlds.write(tmp_path / "sets")
    _, summary = look(tmp_path / "sets", tmp_path)
    assert "# toy" in summary and "fields inferred from common names" in summary
    # Its numbers are random: nothing follows anything.
    assert "**state and action**: the state hardly follows" in summary


def test_several_rlds_datasets_are_listed_and_a_file_chooses(bridge, tmp_path):
    toy_rlds.write(bridge)
    with pytest.raises(ValueError, match="2 RLDS datasets: bridge_dataset, toy; pass --dataset NAME"):
        look(bridge, tmp_path)
    mixture = tmp_path / "mine.yaml"
    mixture.write_text("mixture: {bridge_orig: 1.0, toy: 1.0, viola: 1.0}\n")
    page, summary = look(bridge, tmp_path, dataset=str(mixture))
    assert "# bridge_orig" in summary and "# toy" in summary
    assert "**Not found**: no RLDS dataset viola" in summary and "no RLDS dataset viola" in page
    _, summary = look(bridge, tmp_path, dataset="bridge_orig", episodes=0, pictures=12)
    assert "12 pictures decoded" in summary


@pytest.fixture
def toy_lerobot():
    pytest.importorskip("av")
    pytest.importorskip("pyarrow")
    from tests.data import toy_lerobot as writer

    return writer


def test_a_lerobot_dataset_is_recognised(tmp_path, toy_lerobot):
    root = toy_lerobot.write(tmp_path / "arm")
    page, summary = look(root, tmp_path)
    assert "LeRobotDataset (it has meta/info.json)" in summary and "# arm" in summary
    assert "open it" in page and "close it" in page and "48 x 32 px" in page and "10 Hz" in page
    (root / "meta" / "info.json").write_text('{"codebase_')
    with pytest.raises(ValueError, match=r"info\.json is not JSON"):
        look(root, tmp_path)


@pytest.mark.parametrize("name", ["so100", "aloha", "mobile_base"])
def test_robots_of_other_numbers_than_seven_are_shown_by_their_own_names(tmp_path, name):
    pytest.importorskip("pyarrow")
    robot = lerobot.ROBOTS[name]
    _, summary = look(synthetic.write(tmp_path / "own", robot, episodes=3, length=8), tmp_path)
    assert f"action, state: {len(robot.action)} and {len(robot.state)} numbers" in summary


@pytest.mark.parametrize("video", [False, True])
def test_what_training_refuses_is_shown_as_it_is_in_the_files(tmp_path, toy_lerobot, video):
    from robovlms_jax.data.lerobot import StoredDataset

    sides = [f"{side}_{joint}" for side in ("left", "right") for joint in ("waist", "elbow", "wrist_rotate", "gripper")]
    root = toy_lerobot.write(tmp_path / "arms", names=sides, width=8, video=video)
    page, refusals = inspect_data.main(inspect_data.Args(str(root), out=str(tmp_path / "out")))
    assert len(refusals) == 1 and "8 numbers" in refusals[0]
    summary, page = (page.parent / "summary.md").read_text(), page.read_text()
    assert "**training refuses it**" in summary and "action, state: 8 and 8 numbers" in summary
    assert "right_wrist_rotate" in page and "front camera" in summary
    dataset = StoredDataset(root, "training")
    assert [e.instruction for e in dataset.episodes] == ["open it", "close it", "open it"]
    assert dataset.array("state", [5]).tolist() == [[1, 0, 0, 0, 0, 0, 0, 1]]
    ids = [12, 0, 7]
    where = [(2, 1), (0, 0), (1, 2)]
    for (episode, frame), image in zip(where, dataset.images(ids, ["front"])["front"], strict=True):
        assert np.abs(image.mean(axis=(0, 1)) - toy_lerobot.colour(episode, frame)).max() < 12
    np.testing.assert_allclose(dataset.actions(ids)[:, :2], np.array(where) / [100, 200], atol=1e-6)


def test_an_rlds_dataset_that_no_description_fits_is_shown_as_it_is_in_the_files(tmp_path):
    joints = [dataclasses.replace(f, shape=(9,)) if f.path == "steps/action" else f for f in toy_rlds.FIELDS]
    numbers = np.arange(12 * 9, dtype=np.float32).reshape(12, 9)
    episodes = [toy_rlds.episode(seed, 12, action=numbers + seed) for seed in range(5)]
    root = rlds_writer.write(tmp_path / "sets", "arm", joints, {"train": episodes})
    page, refusals = inspect_data.main(inspect_data.Args(str(tmp_path / "sets"), out=str(tmp_path / "out")))
    assert len(refusals) == 1 and "action" in refusals[0]
    summary, page = (page.parent / "summary.md").read_text(), page.read_text()
    assert "**training refuses it**" in summary and "action, state: 9 and 10 numbers" in summary
    assert "action[8]" in page and "state[6]" in page and "push the block" in page
    dataset = rlds.StoredDataset(storage.Directory(root), "training", rlds.Options())
    assert [(e.start, e.end) for e in dataset.episodes] == [(0, 11), (12, 23), (24, 35), (36, 47)]
    np.testing.assert_array_equal(dataset.actions([13, 3]), [numbers[1] + 1, numbers[3]])
    frames = dataset.images([13, 3], ["image", "wrist_image"])
    for place, seed in enumerate((1001, 3)):
        assert np.abs(frames["image"][place].astype(int) - toy_rlds.image(seed, 32)).mean() < 3
        assert np.abs(frames["wrist_image"][place].astype(int) - toy_rlds.image(seed + 500, 24)).mean() < 3


def test_a_file_says_what_the_numbers_of_a_lerobot_dataset_mean(tmp_path, toy_lerobot):
    root = toy_lerobot.write(tmp_path / "arm", width=8)
    conventions = tmp_path / "arm.json"
    conventions.write_text(json.dumps({"arm": ["action[:6]"], "gripper": "action[7]"}))
    page, refusals = inspect_data.main(
        inspect_data.Args(str(root), out=str(tmp_path / "out"), conventions=str(conventions))
    )
    assert not refusals and "action, state: 7 and 8 numbers" in (page.parent / "summary.md").read_text()


def test_a_damaged_picture_is_a_problem_and_the_page_is_made(calvin, tmp_path):
    index = calvin / "training" / "index"
    offset, length = (int(np.load(index / f"{name}.npy").reshape(-1)[0]) for name in ("offset", "length"))
    with open(calvin / "training" / "shard_00000.bin", "r+b") as file:
        file.seek(offset)
        file.write(bytes(length))
    page, summary = look(calvin, tmp_path)
    problems = re.search(r"## Problems \((\d)\)\n\n(.*)\n", summary)
    assert problems[1] == "1" and re.search(r"camera\*\*: 1 of 60 pictures cannot be decoded", problems[2])
    assert "1 picture cannot be read" in page


def test_what_the_reader_leaves_out_is_on_the_page(tmp_path):
    episodes = [toy_rlds.episode(seed, 9, text="" if seed == 2 else "push it") for seed in range(8)]
    toy_rlds.write(tmp_path / "sets", episodes)
    page, _ = look(tmp_path / "sets", tmp_path)
    assert re.search(r"left out 1 of \d episodes without instruction", page)


def test_a_missing_validation_split_is_worth_a_look(calvin, tmp_path):
    shutil.rmtree(calvin / "validation")
    _, summary = look(calvin, tmp_path)
    assert "there is no validation split" in summary


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "is empty"),
        (lambda root: root.touch(), "is a file"),
        (lambda root: (root / "photos").mkdir(parents=True), r"looked for meta/info\.json .* it holds photos"),
        (lambda root: shutil.copytree(DATA / "calvin_sample" / "training", root), "is one split of a dataset"),
    ],
)
def test_a_wrong_root_says_what_was_looked_for(tmp_path, make, message):
    root = tmp_path / "training"
    make(root)
    with pytest.raises(ValueError, match=message):
        inspect_data.sources(inspect_data.Args(str(root)))


def test_files_that_are_cut_end_with_status_2_and_one_sentence(calvin):
    path = calvin / "training" / "meta.json"
    path.write_text(path.read_text()[:100])
    code = (
        "import runpy, sys; sys.stderr = sys.stdout; sys.argv = ['inspect_data', '--root', sys.argv[1]];"
        "runpy.run_module('experiments.inspect_data', run_name='__main__', alter_sys=True)"
    )
    said = run_python("-c", code, calvin, status=2, JAX_PLATFORMS="cpu")
    assert "Traceback" not in said and re.search(r"\nerror: .*meta\.json cannot be read", said)
    lines = re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", said)
    assert lines.startswith("sample: packed (it has training/)\nopening training\n")


def test_newest_version_of_an_rlds_dataset_counts(tmp_path):
    for version in ("1.0.0", "0.9.0", "1.10.0"):
        (tmp_path / "toy" / version).mkdir(parents=True)
        (tmp_path / "toy" / version / "features.json").touch()
    found = inspect_data._rlds_names(storage.Directory(tmp_path), ["toy"])
    assert {name: pathlib.Path(str(where)).name for name, where in found.items()} == {"toy": "1.10.0"}


def test_the_configuration_of_an_rlds_dataset_is_found_from_the_directory_above_it(tmp_path):
    written = toy_rlds.write(tmp_path / "written")
    for config in ("large", "small"):
        shutil.copytree(written, tmp_path / "oxe" / "toy" / config / "1.0.0")
    with pytest.raises(ValueError, match="toy has several configurations, large, small; say which one"):
        inspect_data.sources(inspect_data.Args(str(tmp_path / "oxe")))
    shutil.rmtree(tmp_path / "oxe" / "toy" / "large")
    _, summary = look(tmp_path / "oxe", tmp_path, pictures=6)
    assert summary.startswith("# toy\n") and "toy/small/1.0.0/features.json" in summary


@pytest.mark.parametrize(
    ("low", "high", "lines"), [(-1.0, 1.0, 2), (-math.inf, 1.0, 1), (-math.inf, math.inf, 0), (-99.0, 99.0, 0)]
)
def test_histograms_show_what_is_allowed_where_it_is_near(low, high, lines):
    dimension = robots.Dimension("x", "m", low=low, high=high)
    counts = np.arange(1, 1 + inspection.BINS)
    summary = {"min": -0.8, "q01": -0.6, "mean": 0.1, "q99": 0.6, "max": 0.8}
    drawn = inspection_page._spark(inspection.Column(dimension, summary, counts, 0.1, 0.1, 0.0, 9))
    assert drawn.count('class="bound"') == lines and drawn.count('class="bar"') == inspection.BINS
    if lines == 2:  # the ends of what is allowed are those of the picture, to a bar
        places = [float(x) for x in re.findall(r'class="bound" x1="([\d.]+)"', drawn)]
        assert places[0] < 6 and places[1] > 144


def test_a_folder_of_several_datasets_is_not_taken_for_one_of_them(calvin, bridge, tmp_path):
    """The repository's own data/: the one that is RLDS was shown, and nothing said of the other."""

    def seen():
        return inspect_data.sources(inspect_data.Args(str(tmp_path)))

    (tmp_path / "runs" / "training").mkdir(parents=True)  # is no dataset
    (tmp_path / "runs" / "training" / "log.txt").write_text("")
    (tmp_path / "suite").mkdir()
    both = f"{tmp_path}/oxe/?.*, {tmp_path}/sample"
    with pytest.raises(ValueError, match=f"holds 2 datasets: {both}; pass one of these"):
        seen()
    shutil.rmtree(calvin)
    (source,) = seen()
    assert source.kind.startswith("RLDS")
    (tmp_path / "suite" / "open_demo.hdf5").write_text("")
    with pytest.raises(ValueError, match=f"holds 2 datasets: {tmp_path}/oxe, {tmp_path}/suite; pass"):
        seen()
    shutil.rmtree(bridge)
    (tmp_path / "other_suite").mkdir()  # LIBERO's suites may be read together
    (tmp_path / "other_suite" / "close_demo.hdf5").write_text("")
    (source,) = seen()
    assert source.kind.startswith("LIBERO")


def test_a_dataset_that_has_foreign_folders_is_that_dataset(bridge, tmp_path):
    (version,) = (bridge / "bridge_dataset").iterdir()
    for name in ("first", "second"):
        shutil.copytree(DATA / "calvin_sample", version / name)
    (source,) = inspect_data.sources(inspect_data.Args(str(version)))
    assert source.kind.startswith("RLDS")
