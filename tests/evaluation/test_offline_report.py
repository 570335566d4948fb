import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from robovlms_jax.control import robot
from robovlms_jax.evaluation import offline
from robovlms_jax.evaluation.report import offline as report

UNITS = (0.02,) * 3 + (0.05,) * 3


def make_curves(steps=30, seed=0):
    rng = np.random.default_rng(seed)
    recorded = np.clip(rng.normal(0, 0.2, (steps, 7)).cumsum(0), -1, 1)
    recorded[:, 6] = np.sign(recorded[:, 6])
    return report.EpisodeCurves("open the drawer", recorded * 0.9, recorded, UNITS)


def make_sums(chunk=4):
    rng = np.random.default_rng(0)
    recorded = rng.uniform(-1, 1, (6, 3, chunk, 7))
    return offline.measure(recorded * 0.5, recorded, np.ones((6, 3, chunk), bool), UNITS)


def write_metrics(directory, lines=60):
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            loss = 1 / step
            file.write(
                json.dumps({"step": step, "train/loss": loss, "train/loss_arm": loss / 2, "train/lr": 1e-4}) + "\n"
            )
        file.write(json.dumps({"step": lines, "validation/loss": 0.1}) + "\n")


def write(directory, **changes):
    arguments = {
        "title": "Twin",
        "facts": {"preset": "twin", "parameters": 1234567, "seconds": 12.5},
        "sums": make_sums(),
        "sensitivity": offline.Sensitivity(0.001, 0.002, 0.5, 0.25),
        "episodes": [make_curves(), make_curves(1, 1)],
        "closing": "    python -m experiments.calvin_abcd --data.root DIR",
    }
    arguments |= changes
    found = {name: arguments.pop(name) for name in ("sums", "sensitivity", "episodes", "robot") if name in arguments}
    return report.write_report(directory, report.Compared(**found), **arguments)


def test_a_report_without_a_validation_split_says_so(tmp_path):
    write_metrics(tmp_path)
    text = write(tmp_path, sums=None, sensitivity=None, episodes=(), closed_loop="solved 3").read_text()
    assert "no annotated episode: nothing was compared" in text
    assert "solved 3" in text and "## Loss" in text and "errors.png" not in text
    assert json.loads((tmp_path / "report.json").read_text())["overall"] is None


def test_the_page_has_every_section_and_the_episodes_with_what_was_seen(tmp_path):
    write_metrics(tmp_path)
    curves = make_curves()
    seen = {"pictures": {"static": np.zeros((2, 8, 8, 3), np.uint8)}, "at": [0, len(curves.recorded) - 1]}
    write(tmp_path, episodes=[dataclasses.replace(curves, **seen), make_curves(1, 1)])
    text = (tmp_path / "report.html").read_text()
    assert "Language sensitivity" in text and "data:image/png;base64," in text
    assert text.count('<div class="player">') == 1  # the other has no pictures
    assert "x (mm)" in text and "recorded" in text


def test_report_holds_text_numbers_and_pictures(tmp_path):
    write_metrics(tmp_path)
    text = write(tmp_path).read_text()
    for expected in (
        "# Twin",
        "| parameters | 1,234,567 |",
        "| train/loss | 1 (step 1) | 0.01667 (step 60) |",
        "1 mm and 0.115° per axis",
        "25.0 % of the gripper decisions flip",
        "## The real thing\n\n    python -m experiments.calvin_abcd",
    ):
        assert expected in text
    assert "train/lr" not in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["actions_0.png", "actions_1.png", "errors.png", "loss.png"]
    for name in pictures:
        assert f"({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10  # something was drawn


def test_table_shows_millimetres_and_degrees(tmp_path):
    text = write(tmp_path, episodes=[]).read_text()
    overall = offline.summarize(offline.over_chunk(make_sums()))
    assert f"| x (mm) | {1000 * overall.mae[0]:.3g} | {1000 * overall.mae_still[0]:.3g} |" in text
    assert f"| yaw (°) | {np.rad2deg(overall.mae[5]):.3g} | {np.rad2deg(overall.mae_still[5]):.3g} |" in text
    assert "| that of no motion |" in text and "a guess which looks at nothing: no motion, or always the mean" in text


def test_json_is_strict_and_complete(tmp_path):
    write_metrics(tmp_path)
    sums = make_sums()
    sums.gripper[...] = 0  # nothing was ever closed: F1 is nan
    write(tmp_path, sums=sums, episodes=[])

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert record["losses"]["validation/loss"] == {"first": 0.1, "last": 0.1}
    assert record["overall"]["gripper_f1"] is None
    assert np.shape(record["chunk"]["mae"]) == (4, 6)
    assert record["language_sensitivity"]["relative"] == 0.5
    assert record["facts"]["seconds"] == 12.5


def test_report_works_with_the_least(tmp_path):
    text = write(tmp_path, sums=make_sums(1), sensitivity=None, episodes=[]).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "errors.png",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert "## Loss" not in text
    assert "Language sensitivity" not in text


def test_metrics_survive_resuming_and_a_killed_process(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "a": 1.0}, {"step": 3, "a": 3.0}, {"step": 2, "a": 2.0, "b": 5.0}, {"step": 3, "a": 4.0}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "a"')
    metrics = report.read_metrics(path)
    assert list(metrics) == ["a", "b"]
    np.testing.assert_array_equal(metrics["a"], [[1, 2, 3], [1, 2, 4]])
    np.testing.assert_array_equal(metrics["b"], [[2], [5]])
    path.write_text('{"step": 1}\n[]\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        report.read_metrics(path)
    assert report.read_metrics(tmp_path / "none") == {}


def test_curves_of_one_metric_share_a_panel(tmp_path):
    write_metrics(tmp_path)
    figure = report.draw_curves(report.read_metrics(tmp_path / "metrics.jsonl"))
    assert [axes.get_title() for axes in figure.axes] == ["loss", "loss arm", "lr"]
    raw, smooth, validation = figure.axes[0].lines
    np.testing.assert_array_equal(validation.get_xydata(), [[60, 0.1]])
    assert np.abs(np.diff(smooth.get_ydata(), 2)).max() < np.abs(np.diff(raw.get_ydata(), 2)).max()
    assert raw.get_ydata().min() <= smooth.get_ydata().min() <= smooth.get_ydata().max() <= raw.get_ydata().max()


def test_markers_of_values_that_hardly_differ_lie_below_the_upper_edge():
    # Fails if the room above is a part of the values' range, which a flat curve has none of.
    figure = report.draw_curves({"train/loss": (np.arange(2), np.array([0.0799, 0.08]))})
    assert figure.axes[0].get_ylim() == pytest.approx((0, 0.084))


def test_many_curves_are_drawn_four_panels_a_row():
    names = [f"train/loss_{source}" for source in "abcdefghi"]
    figure = report.draw_curves({name: (np.arange(3), np.ones(3)) for name in names})
    assert [axes.get_title() for axes in figure.axes] == [f"loss {source}" for source in "abcdefghi"]
    places = [axes.get_subplotspec() for axes in figure.axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [divmod(i, 4) for i in range(9)]
    assert figure.get_figwidth() < 1.5 * figure.get_figheight() + 1


def test_action_panels_show_real_units_and_all_seven_dimensions():
    curves = make_curves()
    figure = report.draw_actions(curves)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["x (mm)", "y (mm)", "z (mm)", "roll (°)", "pitch (°)", "yaw (°)", "gripper"]
    figure.draw_without_rendering()
    heights = [axes.get_position().height for axes in figure.axes[:6]]
    assert max(heights) - min(heights) < 0.01 and figure.legends  # the legend makes no hole between panels
    tops = np.array([axes.get_position().y0 for axes in figure.axes[:3]])
    assert np.ptp(np.diff(tops)) < 0.01
    predicted, recorded = figure.axes[4].lines[:2]
    np.testing.assert_allclose(recorded.get_ydata(), np.rad2deg(curves.recorded[:, 4] * 0.05))
    np.testing.assert_allclose(predicted.get_ydata(), np.rad2deg(curves.predicted[:, 4] * 0.05))
    assert "open the drawer" in figure.get_suptitle()


def test_a_report_of_another_robot_names_its_dimensions_in_their_units(tmp_path):
    joint = robot.Dimension("elbow", "rad", quantity="joint")
    speed = robot.Dimension("forward", "m/s", "velocity", "base")
    spec = robot.RobotSpec("mine", action=(robot.GRIPPER, joint, speed, robot.Dimension("lift")))
    recorded = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4))
    units = offline.units_of(spec)
    sums = offline.measure(recorded * 0.5, recorded, np.ones((2, 3, 4), bool), units, spec)
    curves = report.EpisodeCurves("go", recorded[0, :, 0], recorded[1, :, 0], units, spec)
    sensitivity = offline.Sensitivity(float("nan"), float("nan"), 0.5, 0.25)
    text = write(tmp_path, sums=sums, episodes=[curves], sensitivity=sensitivity, robot=spec).read_text()
    for expected in ("| elbow (°) |", "| forward (mm/s) |", "| lift |", "Gripper: ", "instruction change them."):
        assert expected in text
    summary = offline.summarize(offline.over_chunk(sums), spec)
    expected = 0.5 * np.abs(recorded[..., 1]).mean()
    assert offline.by_name(summary, spec)["mae/elbow"] == pytest.approx(expected)
    assert np.isnan(summary.translation_m) and "translation_m" not in offline.scalars(summary)
