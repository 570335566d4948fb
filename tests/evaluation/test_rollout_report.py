"""The closed-loop report and its films."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from robovlms_jax.control.execution import Execution
from robovlms_jax.envs.vector import EnvPool
from robovlms_jax.evaluation import chains
from robovlms_jax.evaluation.chains import Evaluation
from robovlms_jax.evaluation.report import films as film_files
from robovlms_jax.evaluation.report import rollouts as rollout_report
from robovlms_jax.evaluation.rollout import Films, TrialResult, run
from tests.evaluation.toy_world import CRITERION, LineEnv, LinePolicy, trial


def evaluation(mean: float, *, env="Line", execution="chunk", seed=0, **labels) -> Evaluation:
    names = ("open_drawer", "turn_on_led", "stack_block")
    scores = np.random.default_rng(seed).binomial(3, mean, 40)
    results = tuple(
        TrialResult(
            index,
            names,
            names,
            (True,) * score + (False,) * (score < 3),
            (12,) * min(score + 1, 3),
            labels,
            {"held": 0.5},
        )
        for index, score in enumerate(scores.tolist())
    )
    setup = {"env": env, "policy": "toy", "execution": execution, "max_steps": 360, "stop_at_success": True}
    return Evaluation(setup, results)


def tables(text: str) -> list[list[list[str]]]:
    blocks = re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split(" | ")] for line in b.strip().splitlines()] for b in blocks
    ]


def test_one_evaluation_gives_tables_pictures_and_files(tmp_path):
    done = chains.evaluate(
        LinePolicy(), EnvPool([LineEnv()]), [trial(i, 1, 2 + i % 9) for i in range(6)], tmp_path / "results",
        chains.Settings("toy checkpoint", criterion=CRITERION),
    )  # fmt: skip
    path = rollout_report.write_report(tmp_path, [done], title="Toy")
    text = path.read_text()
    assert text.startswith("# Toy\n")
    summary, per_task = tables(text)
    row = dict(zip(summary[0], summary[2]))
    assert row["environment"] == "Line"
    assert row["policy"] == "toy checkpoint"
    assert row["trials"] == "6"
    assert row["1 in a row"].startswith("100.0 % (")
    assert row["Avg. Len."].startswith("2.00 (2.00 to 2.00)")
    assert per_task[0][0] == "task on Line"
    for column in ("1 ... 2 in a row", "Avg. Len.", "Steps per success", "Restarts", "Execution", "Phrasing"):
        assert f"{column}: " in text  # what the columns mean stands below them
    for name in ("in_a_row.png", "per_task.png"):
        assert f"({name})" in text
        assert min(Image.open(tmp_path / name).size) > 100
    record = json.loads((tmp_path / "rollouts.json").read_text())
    assert record["rows"][0]["summary"]["in_a_row"][1]["successes"] == 6
    upstream = json.loads((tmp_path / "results_upstream.json").read_text())
    assert upstream == chains.upstream_results(done.results)


def test_every_table_names_its_environment(tmp_path):
    several = [
        evaluation(0.9, env="PlayTable (scene A)", scene="A", scene_seen=True, phrasing="training"),
        evaluation(0.8, env="PlayTable (scene B)", scene="B", scene_seen=True, phrasing="training", seed=1),
        evaluation(0.4, env="PlayTable (scene D)", scene="D", scene_seen=False, phrasing="training", seed=2),
        evaluation(0.2, env="PlayTable (scene D)", scene="D", scene_seen=False, phrasing="held out", seed=3),
    ]
    text = rollout_report.write_report(tmp_path, several).read_text()
    for table in tables(text):
        assert all("PlayTable" in " ".join(line) for line in table[2:]) or "PlayTable" in " ".join(table[0]), table
    assert len(list(tmp_path.glob("results_upstream_*.json"))) == 4


def test_the_gap_pools_seen_scenes_and_compares_like_with_like(tmp_path):
    several = [
        evaluation(0.9, env="T (A)", scene="A", scene_seen=True, phrasing="training"),
        evaluation(0.8, env="T (B)", scene="B", scene_seen=True, phrasing="training", seed=1),
        evaluation(0.4, env="T (D)", scene="D", scene_seen=False, phrasing="training", seed=2),
        evaluation(0.2, env="T (D)", scene="D", scene_seen=False, phrasing="held out", seed=3),
        evaluation(0.1, env="T (D)", execution="first", scene="D", scene_seen=False, phrasing="training", seed=4),
    ]
    gaps = json.loads((rollout_report.write_report(tmp_path, several).parent / "rollouts.json").read_text())["gaps"]
    assert [(gap["kind"], gap["execution"], gap["seen"], gap["unseen"], gap["elsewhere"]) for gap in gaps] == [
        ("scene", "chunk", "A, B", "D", "training"),
        ("phrasing", "chunk", "training", "held out", "D"),
    ]
    lengths = [np.mean([r.score for r in several[i].results]) for i in range(4)]
    assert gaps[0]["gap"]["value"] == pytest.approx((lengths[0] + lengths[1]) / 2 - lengths[2])
    assert gaps[1]["gap"]["value"] == pytest.approx(lengths[2] - lengths[3])


def test_execution_modes_stand_side_by_side(tmp_path):
    modes = [Execution("first"), Execution("chunk"), Execution("ensemble")]
    several = [evaluation(0.3 * (i + 1), execution=mode.label, seed=i) for i, mode in enumerate(modes)]
    text = rollout_report.write_report(tmp_path, several).read_text()
    assert [line[2] for line in tables(text)[0][2:]] == ["first", "chunk", "ensemble 0.01"]
    assert "## Generalisation gap" not in text
    assert "## Partial scores" in text


def test_one_evaluation_with_mixed_labels_becomes_several_rows():
    a, b = evaluation(0.5, scene="A", phrasing="training"), evaluation(0.5, scene="A", phrasing="held out")
    rows = rollout_report.rows([Evaluation(a.setup, a.results + b.results)])
    assert sorted(row.labels["phrasing"] for row in rows) == ["held out", "training"]
    assert [row.summary.trials for row in rows] == [40, 40]


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        rollout_report.write_report(tmp_path, [])


@pytest.fixture
def recording():
    films = []
    policy = LinePolicy(chunk=5)
    list(run(policy, EnvPool([LineEnv()]), [trial(2, 4, 30)], CRITERION, films=Films([2], films.append, every=1)))
    return films[0]


def test_a_film_shows_every_frame_and_is_linked(recording, tmp_path):
    path = film_files.write_film(recording, tmp_path / "films" / "trial_2")
    assert path.suffix in (".gif", ".mp4")
    if path.suffix == ".gif":
        with Image.open(path) as film:
            assert film.n_frames == len(recording.frames)
    text = rollout_report.write_report(tmp_path, [evaluation(0.5)], films=[path]).read_text()
    assert f"(films/{path.name})" in text


def test_rollouts_are_looked_through_on_a_page(recording, tmp_path):
    rollout_report.write_report(tmp_path, [evaluation(0.5)], recordings=[recording])
    text = (tmp_path / "rollouts.html").read_text()
    assert text.count('<div class="player">') == 1 and "failures first, as the policy sees them" in text
    assert f"trial {recording.trial.index}" in text and f"after {recording.result.steps[-1]} steps" in text


def test_a_long_film_skips_frames(recording, tmp_path, monkeypatch):
    monkeypatch.setattr(film_files.importlib.util, "find_spec", lambda name: None)  # a GIF in any case
    path = film_files.write_film(recording, tmp_path / "short", max_frames=5)
    with Image.open(path) as film:
        assert film.n_frames == 5


def test_a_frame_shows_cameras_and_action(recording):
    still = np.asarray(film_files.draw_frame(recording, 0)).astype(int)
    later = np.asarray(film_files.draw_frame(recording, 6)).astype(int)
    static, wrist = still[20:240, 20:240], still[20:240, 270:480]
    assert static.mean() == pytest.approx(recording.frames[0].observation.images["static"].mean(), abs=1)
    assert wrist.mean() == pytest.approx(90, abs=1)
    assert abs(later[20:240, 20:240] - static).mean() > 10
    # the x bar goes up (+1), the y bar is empty
    x_column, y_column = still[-66:-42, 12 + 34], still[-66:-42, 12 + 104]
    assert (x_column.min(axis=1) < 60).sum() > 12
    assert (y_column.min(axis=1) > 180).all()


def test_of_trials_of_one_task_there_is_no_picture_of_tasks_in_a_row(tmp_path, caplog):
    caplog.set_level("INFO")
    done = chains.evaluate(
        LinePolicy(), EnvPool([LineEnv()]), [trial(i, 3) for i in range(2)], tmp_path / "results",
        chains.Settings("toy", criterion=CRITERION),
    )  # fmt: skip
    assert any("2 trials in" in x and x.endswith("100% solved") for x in caplog.messages)
    text = rollout_report.write_report(tmp_path, [done]).read_text()
    assert "Avg. Len." not in text and "in_a_row" not in text and not (tmp_path / "in_a_row.png").exists()
    assert "intervals (Wilson)." in text


def test_films_show_peoples_view_where_there_is_one():
    class Viewed(EnvPool):
        def views(self, slots):
            return [lambda: np.full((6, 6, 3), 210, np.uint8) for _ in slots]

    recordings = []
    films = Films([0], recordings.append)
    assert len(list(run(LinePolicy(), Viewed([LineEnv()]), [trial(0, 1, 4)], CRITERION, films=films))) == 1
    (recording,) = recordings
    assert all(frame.observation.images["static"].max() < 210 for frame in recording.frames)  # what the policy saw
    for index in (0, len(recording.frames) - 1):
        frame = np.asarray(film_files.draw_frame(recording, index))
        assert (frame[20:240, 20:240] == 210).all() and frame[20:240, 270:480].mean() == pytest.approx(90, abs=1)
    assert (np.asarray(film_files.draw_strips([recording]))[40:180, 20:160] == 210).all()


def test_a_film_without_frames_is_refused(recording, tmp_path):
    recording.frames.clear()
    with pytest.raises(ValueError, match="trial 2 has no frames"):
        film_files.write_film(recording, tmp_path / "empty")


def test_section_and_strips_of_a_run(tmp_path):
    recordings = []
    done = chains.evaluate(
        LinePolicy(), EnvPool([LineEnv()]), [trial(i, 1, 3 + i) for i in range(2)], tmp_path,
        chains.Settings("toy", criterion=CRITERION), films=Films([0, 1], recordings.append),
    )  # fmt: skip
    text = rollout_report.section(done, "rollouts", strips=True)
    assert text.startswith("**2.00 (2.00 to 2.00) of 2 tasks in a row** on Line, 2 trials.")  # the answer comes first
    labelled = rollout_report.section(evaluation(0.5, scene="D", phrasing="training"), "rollouts", strips=False)
    assert "** on Line (scene D, training wordings), 40 trials." in labelled  # D was in no training
    per_task, summary = tables(text)
    assert summary[2] == ["environment", "Line"] and per_task[0][0] == "task on Line"  # where numbers come from
    assert ["Avg. Len.", "2.00 (2.00 to 2.00)"] in summary and len(summary[0]) == 2  # as wide as a phone
    assert "(rollouts/strips.png)" in text
    assert "(rollouts/rollouts.md)" in text and "(rollouts/rollouts.html)" in text
    assert "strips" not in rollout_report.section(done, "rollouts", strips=False)
    one, two = (film_files.draw_strips(recordings[:n], frames=4) for n in (1, 2))
    assert one.width == two.width
    assert two.height > one.height
    assert len(np.unique(np.asarray(two).reshape(-1, 3), axis=0)) > 4  # something is drawn


def test_sentences_stand_below_the_pictures_and_what_training_is_told_beside_them():
    stored, seen = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 6, 6, 3), 200, np.uint8)
    plain = film_files.draw_pairs({"static": (stored, seen)})
    told = film_files.draw_pairs({"static": (stored, seen)}, [("go left", "go right"), ("stop", "stop")])
    assert told.size == (plain.size[0], plain.size[1] + 40)
    lines = np.asarray(told)[-46:].min(axis=-1)  # two lines of text, the first longer
    first, second = (np.flatnonzero((part < 128).any(axis=0)) for part in (lines[:20], lines[20:40]))
    assert 0 < second.max() < first.max()


def test_words_of_tables_are_not_broken_by_letters_or_after_a_hyphen():
    from robovlms_jax.evaluation.report import page

    made = page.from_markdown("| on playtable-D | success |\n|---|---|\n| a-b | 96.0 % (80-99) |\n", pathlib.Path())
    for word in ("playtable-D", "a-b", "(80-99)"):
        assert f'<span class="whole">{word}</span>' in made
    assert "td { white-space: normal; overflow-wrap: anywhere" not in page.STYLE
