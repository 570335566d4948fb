"""Episodes for the Rerun viewer: everything of the page is in the file, and who lacks the package is told so first."""

from __future__ import annotations

import dataclasses
import sys
import types

import numpy as np
import pytest

from experiments import evaluate, evaluation_settings, inspect_data
from robovlms_jax.evaluation.config import RolloutConfig
from robovlms_jax.evaluation.report import player, rerun_file

LINE = np.array([0.0, 1.0, np.nan, 3.0])
FAILED = player.Episode(
    "open the drawer",
    {"static": [np.full((8, 6, 3), 9, np.uint8), None], "hand.camera": [np.zeros((4, 4, 3), np.uint8)] * 2},
    [0, 3],
    [player.Panel("action: position (m)", {"x": LINE}), player.Panel("state: position (m)", {"z": LINE[::-1]})],
    "failed after 4 steps",
    good=False,
    rate=10.0,
    success=False,
)
SOLVED = dataclasses.replace(FAILED, title="turn on the LED", outcome="solved", good=True, success=True)


class FakeStream:
    """Keeps what is logged: (entity path, what, timelines) in order."""

    def __init__(self, application):
        self.logged, self.now, self.saved = [], {}, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def save(self, path, blueprint):
        self.saved, self.blueprint = path, blueprint

    def send_recording_name(self, name):
        self.name = name

    def set_time(self, timeline, **value):
        self.now[timeline] = next(iter(value.values()))

    def log(self, path, *what, static=False):
        self.logged.append((path, what, {} if static else dict(self.now)))

    def send_columns(self, path, times, values):
        self.logged.append((path, values, {column["timeline"]: column for column in times}))

    def flush(self):
        pass


def plain(name):
    """A class of the package whose objects are its name and arguments."""
    return lambda *args, **values: types.SimpleNamespace(kind=name, args=args, **values)


@pytest.fixture
def streams(monkeypatch):
    """The streams that were opened of a package rerun that writes nothing."""
    opened = []
    fake = types.ModuleType("rerun")
    fake.RecordingStream = lambda application: opened.append(FakeStream(application)) or opened[-1]
    fake.TimeColumn = lambda timeline, **values: {"timeline": timeline, **values}
    fake.Scalars = types.SimpleNamespace(columns=lambda *, scalars: scalars)
    fake.Image = lambda picture: types.SimpleNamespace(compress=lambda quality: picture)
    for name in ("TextDocument", "AnyValues", "SeriesLines", "Clear"):
        setattr(fake, name, plain(name))
    fake.blueprint = types.ModuleType("rerun.blueprint")
    for name in (
        *("Blueprint", "Tabs", "Horizontal", "Vertical"),
        *("Spatial2DView", "TimeSeriesView", "TextDocumentView"),
    ):
        setattr(fake.blueprint, name, plain(name))
    monkeypatch.setitem(sys.modules, "rerun", fake)
    monkeypatch.setitem(sys.modules, "rerun.blueprint", fake.blueprint)
    return opened


def test_pictures_numbers_sentence_and_success_of_every_episode_are_written_failures_first(streams, tmp_path):
    path = rerun_file.write(tmp_path / "deep" / "x.rrd", "mine", [SOLVED, FAILED])
    (stream,) = streams
    assert stream.saved == path and path.parent.is_dir() and stream.name == "mine"
    paths = {where for where, _, _ in stream.logged}
    below = (
        "about",
        "camera/static",
        "camera/hand_camera",
        "curves/action__position__m/x",
        "curves/state__position__m/z",
    )
    assert paths == {f"episode_{number:04d}/{part}" for number in (0, 1) for part in below}
    about = {where: what for where, what, _ in stream.logged if where.endswith("about")}
    document, values = about["episode_0000/about"]
    assert document.args == ("open the drawer\n\nfailed after 4 steps",)
    assert values.instruction == "open the drawer" and values.success is False
    assert about["episode_0001/about"][1].success is True
    tabs = stream.blueprint.args[0].args
    assert [tab.name for tab in tabs] == ["0: open the drawer", "1: turn on the LED"]


def test_every_episode_begins_at_step_and_second_zero_and_gaps_stay_gaps(streams, tmp_path):
    rerun_file.write(tmp_path / "x.rrd", "mine", [FAILED, SOLVED])
    for number in (0, 1):
        root = f"episode_{number:04d}"
        seen = [(what[0], times) for where, what, times in streams[0].logged if where == f"{root}/camera/static"]
        assert [times for _, times in seen] == [{"step": 0, "time": 0.0}, {"step": 3, "time": 0.3}]
        np.testing.assert_array_equal(seen[0][0], FAILED.pictures["static"][0])
        assert seen[1][0].kind == "Clear"  # the one before does not stay on the screen
        values, times = next(
            (what, times)
            for where, what, times in streams[0].logged
            if where == f"{root}/curves/action__position__m/x" and times
        )
        np.testing.assert_array_equal(values, [0, 1, 3])
        np.testing.assert_array_equal(times["step"]["sequence"], [0, 1, 3])
        np.testing.assert_allclose(times["time"]["duration"], [0, 0.1, 0.3])


def test_without_the_package_every_program_names_its_extra_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rerun", None)
    message = r"\.rrd files need the package rerun-sdk .*pip install -e '\.\[rerun\]', or leave the option out"
    with pytest.raises(ImportError, match=message):
        rerun_file.write(tmp_path / "x.rrd", "mine", [FAILED])
    with pytest.raises(ImportError, match=message):
        inspect_data.main(inspect_data.Args(root="nowhere", rrd="x.rrd"))
    with pytest.raises(ImportError, match=message):
        evaluate.evaluate(evaluation_settings.EvaluateConfig(checkpoint="nowhere", rrd="x.rrd"))


def test_a_file_of_another_suffix_or_without_films_is_refused(streams):
    with pytest.raises(ValueError, match=r"the viewer opens files that end in \.rrd"):
        inspect_data.main(inspect_data.Args(root="nowhere", rrd="episodes"))
    with pytest.raises(ValueError, match="rrd holds what is filmed; set films above 0"):
        evaluation_settings.EvaluateConfig(checkpoint="nowhere", rrd="x.rrd", films=0)
    with pytest.raises(ValueError, match=r"set rollouts\.films above 0"):
        RolloutConfig(rrd=True, films=0)


def test_inspected_episodes_go_into_the_file(streams, tmp_path, capsys):
    args = inspect_data.Args(
        root="data/calvin_sample", out=str(tmp_path), rrd=str(tmp_path / "e.rrd"), frames=50, pictures=4, episodes=1
    )
    inspect_data.main(args)
    paths = {where for where, _, _ in streams[0].logged}
    assert {"episode_0000/camera/static", "episode_0000/camera/wrist"} <= paths
    assert any("curves/action" in path for path in paths) and any("curves/state" in path for path in paths)
    assert "opens in the Rerun viewer: rerun" in capsys.readouterr().out


@pytest.mark.slow
def test_the_package_itself_writes_a_file(tmp_path):
    pytest.importorskip("rerun")
    path = rerun_file.write(tmp_path / "x.rrd", "mine", [SOLVED, FAILED])
    content = path.read_bytes()
    assert content[:3] == b"RRF" and content[-8:-4] == b"FOOT"  # whole: it has the file's head and its foot
    assert all(part in content for part in (b"episode_0001", b"hand_camera"))
