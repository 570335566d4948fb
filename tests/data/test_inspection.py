"""Inspection of datasets: a robot that does as it is told gives no problem, each fault is found and named."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robovlms_jax.control import robot
from robovlms_jax.data import base, findings, inspection, pairing, sampling

EPISODES, STEPS = 12, 30
SPEC = robot.RobotSpec(
    "toy",
    10.0,
    (robot.Camera("static", 24, 24),),
    (
        *(robot.Dimension(name, "m", "delta", "position", "base") for name in "xyz"),
        *(robot.Dimension(name, "rad", "delta", "euler_xyz", "base") for name in ("roll", "pitch", "yaw")),
        robot.GRIPPER,
    ),
    (
        *(robot.Dimension(name, "m", "absolute", "position", "base") for name in "xyz"),
        *(robot.Dimension(name, "rad", "absolute", "euler_xyz", "base") for name in ("roll", "pitch", "yaw")),
        robot.GRIPPER,
    ),
)


class Toy(base.Dataset):
    """A robot that does as it is told, seen by a camera over it. Tests change its arrays and then inspect it."""

    name, action_units = "toy", (1.0,) * 6

    def __init__(self):
        rng = np.random.default_rng(0)
        total = EPISODES * (STEPS + 1)
        pace = np.repeat(rng.uniform(0.2, 1.0, total // 6 + 1), 6)[:total, None]
        self.commands = rng.normal(0, 0.01, (total, 6)) * pace
        starts = np.arange(0, total, STEPS + 1)
        moved = np.cumsum(self.commands, axis=0) - self.commands
        self.pose = moved - np.repeat(moved[starts], STEPS + 1, axis=0)
        self.closed = np.tile(np.arange(STEPS + 1) > STEPS // 2, EPISODES)
        self.opening = np.where(self.closed, 0.01, 0.08)
        self.pixels = np.stack([self._look(*pose[:2]) for pose in self.pose])
        self.broken: set[int] = set()
        self.robot = SPEC
        self.image_sizes = {"static": (24, 24)}
        self.episodes = tuple(
            base.Episode(int(start), int(start) + STEPS, f"do task {i % 4}", "toy") for i, start in enumerate(starts)
        )

    @staticmethod
    def _look(x: float, y: float) -> np.ndarray:
        rows, columns = np.mgrid[:24, :24] / 24 - 0.5
        shade = 200 * np.exp(-((rows - 2 * x) ** 2 + (columns - 2 * y) ** 2) * 20)
        return np.repeat(shade[..., None], 3, axis=2).astype(np.uint8) + 20

    def images(self, frame_ids, cameras, out=None):
        if self.broken & set(np.asarray(frame_ids).tolist()):
            raise base.CorruptFrameError(f"frame {min(self.broken)} is cut off.")
        return dict.fromkeys(cameras, self.pixels[frame_ids])

    def array(self, name, frame_ids):
        if name == "rel_actions":
            values = np.concatenate([self.commands, np.where(self.closed, -1.0, 1.0)[:, None]], axis=1)
        elif name == "robot_obs":
            values = np.concatenate([self.pose, np.where(self.closed, -1.0, 1.0)[:, None]], axis=1)
        elif name == "gripper_opening" and self.opening is not None:
            values = self.opening[:, None]
        else:
            raise ValueError(f"toy stores no {name!r}")
        return base.require_finite(values[frame_ids].astype(np.float32), frame_ids, name, self.name)


def found(dataset: Toy, **splits: Toy) -> tuple[findings.Finding, ...]:
    return findings.find(inspection.inspect({"training": dataset, "validation": dataset, **splits}))


def test_a_robot_that_does_as_it_is_told_has_no_problem():
    result = inspection.inspect({"training": Toy(), "validation": Toy()})
    assert {finding.level for finding in findings.find(result)} == {"fine"}, findings.find(result)
    assert result.num_sampled == EPISODES * STEPS and result.num_runs == EPISODES and result.described
    assert [column.dimension.name for column in result.actions] == [d.name for d in SPEC.action]
    assert all(d.correlation > 0.999 and abs(d.gain - 1) < 1e-3 for d in result.follow.dimensions)
    assert result.follow.best_lag == 0 and result.cameras[0].correlation > 0.3
    assert result.gripper.correlation > 0.99 and result.gripper.transitions == 1.0


def shift_actions(toy: Toy) -> None:
    toy.commands = np.roll(toy.commands, 2, axis=0)


def other_order(toy: Toy) -> None:
    toy.commands = np.random.default_rng(1).permutation(toy.commands)


def flip_axis(toy: Toy) -> None:
    toy.commands[:, 1] *= -1


def millimetres(toy: Toy) -> None:
    toy.commands[:, :3] *= 1000


def close_is_one(toy: Toy) -> None:
    toy.closed = ~toy.closed


def commands_only(toy: Toy) -> None:
    toy.opening = None


def still_axis(toy: Toy) -> None:
    toy.commands[:, 4] = 0


def rare_axis(toy: Toy) -> None:
    toy.commands[:, 4] = 0
    toy.commands[5, 4] = 0.3


def rare_state(toy: Toy) -> None:
    toy.pose[:, 4] = 0.1
    toy.pose[5, 4] = 0.5


def clipped(toy: Toy) -> None:
    toy.commands = np.clip(toy.commands, -0.004, 0.004)


def beyond_bounds(toy: Toy) -> None:
    bounded = dataclasses.replace(SPEC.action[0], low=-0.01, high=0.01)
    toy.robot = dataclasses.replace(SPEC, action=(bounded, *SPEC.action[1:]))


def nothing_moves(toy: Toy) -> None:
    toy.commands[::2] = 0


def lacks_numbers(toy: Toy) -> None:
    toy.commands[7, 2] = np.nan


def broken_picture(toy: Toy) -> None:
    toy.broken = {toy.episodes[3].start}


def frozen_video(toy: Toy) -> None:
    toy.pixels = np.repeat(toy.pixels[::2], 2, axis=0)[: len(toy.pixels)]


def black(toy: Toy) -> None:
    toy.pixels = np.zeros_like(toy.pixels)


def other_pictures(toy: Toy) -> None:
    toy.pixels = np.roll(toy.pixels, 77, axis=0)
    for episode in toy.episodes:
        toy.pixels[episode.end - 1 : episode.end + 1] = np.uint8(250) - toy.pixels[episode.end - 1 : episode.end + 1]


def blank_sentence(toy: Toy) -> None:
    toy.episodes = (dataclasses.replace(toy.episodes[0], instruction=" "), *toy.episodes[1:])


def program_value(toy: Toy) -> None:
    toy.episodes = (dataclasses.replace(toy.episodes[0], instruction="['open it']"), *toy.episodes[1:])


def two_spellings(toy: Toy) -> None:
    toy.episodes = (dataclasses.replace(toy.episodes[0], instruction="Do task 0."), *toy.episodes[1:])


def one_sentence(toy: Toy) -> None:
    toy.episodes = tuple(dataclasses.replace(episode, instruction="go") for episode in toy.episodes)


def no_units(toy: Toy) -> None:
    toy.robot = dataclasses.replace(SPEC, rate_hz=0.0, action=(*SPEC.action[:-1], robot.Dimension("a6")))


def no_description(toy: Toy) -> None:
    del toy.robot


@pytest.mark.parametrize(
    ("fault", "level", "topic", "words"),
    [
        (shift_actions, "problem", "state and action", "2 steps before its command"),
        (other_order, "look", "state and action", "hardly follows"),
        (flip_axis, "problem", "state and action", r"against its command in y -1\.00"),
        (millimetres, "problem", "action units", "faster than"),
        (millimetres, "look", "action units", "measured motion per commanded motion"),
        (close_is_one, "problem", "gripper", r"means the opposite.*0\.01 .*0\.08"),
        (commands_only, "look", "gripper", "cannot be checked"),
        (still_axis, "look", "action pitch", "never changes"),
        (rare_axis, "problem", "action pitch", "q01 and q99 nearly coincide"),
        (rare_state, "look", "state ranges", r"q01 = q99.*pitch 0\.1 \(min 0\.1, max 0\.5\)"),
        (clipped, "look", "action ranges", "as if clipped.*x "),
        (beyond_bounds, "problem", "action ranges", r"x .*outside of -0\.01 to 0\.01"),
        (nothing_moves, "look", "still steps", "50%"),
        (lacks_numbers, "problem", "unreadable numbers", "actions of 1 of 360 frames.*frame 7"),
        (broken_picture, "problem", "static camera", r"1 of 72 pictures cannot be decoded.*is cut off"),
        (frozen_video, "problem", "static camera", "stands still in"),
        (black, "look", "static camera", "one colour"),
        (other_pictures, "look", "static camera", "changes abruptly inside"),
        (blank_sentence, "problem", "instructions", "1 episode without an instruction"),
        (program_value, "problem", "instructions", r"\['open it'\]"),
        (two_spellings, "look", "instructions", "several ways.*'Do task 0.'"),
        (one_sentence, "look", "instructions", "same sentence"),
        (no_units, "look", "units", "a6"),
        (no_units, "look", "rate", "unknown"),
        (no_description, "look", "robot", "knows nothing"),
    ],
)
def test_each_fault_is_found_and_named(fault, level, topic, words):
    toy = Toy()
    fault(toy)
    listed = found(toy)
    assert any(f.level == level and f.topic == topic and re.search(words, f.message) for f in listed), listed
    assert [f.level for f in listed] == sorted((f.level for f in listed), key=findings.LEVELS.index)


def test_sentences_that_only_validation_has_and_warnings_of_the_reader_are_worth_a_look():
    other = Toy()
    other.episodes = tuple(dataclasses.replace(e, instruction="something new") for e in other.episodes)
    assert any("1 of 1 validation sentences" in f.message for f in found(Toy(), validation=other))
    result = inspection.inspect({"training": Toy()})
    listed = findings.find(result, [("INFO", "rows are read"), ("WARNING", "left out 3 episodes")])
    assert [f.message for f in listed if f.topic == "reader"] == ["left out 3 episodes"]
    assert any(f.topic == "splits" and "no validation" in f.message for f in listed)


def test_absolute_targets_are_compared_with_the_state_they_lead_to():
    toy = Toy()
    toy.commands = np.concatenate([toy.pose[1:], toy.pose[-1:]])
    absolute = tuple(d if d.quantity == "gripper" else dataclasses.replace(d, kind="absolute") for d in SPEC.action)
    toy.robot = dataclasses.replace(SPEC, action=absolute)
    follow = inspection.inspect({"training": toy}).follow
    assert all(d.correlation > 0.999 and np.isnan(d.gain) for d in follow.dimensions) and follow.best_lag == 0


def test_angles_that_pass_half_a_turn_do_not_jump():
    turning = np.linspace(3.0, 3.4, 40)
    state = np.zeros((40, 1))
    state[:, 0] = (turning + np.pi) % (2 * np.pi) - np.pi
    rng = np.random.default_rng(0)
    state[:, 0] += rng.normal(0, 1e-3, 40)
    action = np.append(np.diff(turning) + np.diff(state[:, 0] - ((turning + np.pi) % (2 * np.pi) - np.pi)), 0)[:, None]
    dimension = robot.Dimension("turn", "rad", "delta", "other")
    delta = dataclasses.replace(dimension, quantity="euler_xyz")
    follow = pairing.follow([action], [state], [delta], [dataclasses.replace(delta, kind="absolute")])
    assert follow.dimensions[0].correlation > 0.999


def test_two_cameras_with_the_same_picture_are_named():
    toy = Toy()
    toy.image_sizes = {"static": (24, 24), "wrist": (24, 24)}
    assert any(f.level == "problem" and "static and wrist always show the same" in f.message for f in found(toy))


def test_without_any_readable_action_it_says_why():
    toy = Toy()
    toy.commands[:] = np.nan
    with pytest.raises(ValueError, match=r"none of 12 episodes has a readable action: .*frame 0 has rel_actions"):
        inspection.inspect({"training": toy})
    toy.episodes = tuple(dataclasses.replace(e, end=e.start) for e in toy.episodes)
    with pytest.raises(ValueError, match="12 episodes, none with a step"):
        inspection.inspect({"training": toy})
    with pytest.raises(ValueError, match="frames=1 must be at least 2"):
        inspection.Budget(frames=1)


@given(lengths=st.lists(st.integers(0, 40), max_size=30), budget=st.integers(0, 200))
def test_a_sample_stays_within_episodes_and_its_budget(lengths, budget):
    starts = np.cumsum([0, *(length + 1 for length in lengths)])
    episodes = [base.Episode(int(s), int(s) + n, "", "") for s, n in zip(starts, lengths, strict=False)]
    runs = sampling.choose(episodes, budget)
    ids = np.concatenate([np.zeros(0, int), *runs])
    learned = {i for e in episodes for i in range(e.start, e.end)}
    assert len(ids) == min(budget, sum(lengths)) and len(set(ids.tolist())) == len(ids) and set(ids.tolist()) <= learned
    assert (np.diff(ids) > 0).all()
    pairs = sampling.choose_pairs(episodes, budget)
    assert 2 * len(pairs) <= budget and all(pair[1] - pair[0] == 1 and set(pair.tolist()) <= learned for pair in pairs)
    assert all(any(e.start <= pair[0] and pair[1] < e.end for e in episodes) for pair in pairs)
    third = sampling.choose_pairs(episodes, 10 * budget + 1000, lambda ids: ids % 3 == 0)
    assert all(pair[1] - pair[0] == 3 and set(pair.tolist()) <= learned for pair in third)
    assert bool(third) == any((ids % 3 == 0).sum() > 1 for ids in sampling.choose(episodes, 10**6))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50))
def test_rank_correlation_depends_on_order_alone(values):
    rising = pairing.rank_correlation(values, np.cbrt(values) + np.array(values))
    assert np.isnan(rising) or rising > 0.999


class Sparse(Toy):
    """Every seventh frame alone has a picture; the others are black."""

    shows_all = False

    def shown(self, frame_ids):
        return np.asarray(frame_ids) % (STEPS + 1) % 7 == 0

    def images(self, frame_ids, cameras, out=None):
        seen = super().images(frame_ids, cameras, out)
        return {camera: pictures * self.shown(frame_ids)[:, None, None, None] for camera, pictures in seen.items()}


def test_frames_that_were_recorded_without_pictures_are_no_fault_and_are_counted():
    """Fails if black frames are looked at, shown, or taken for a camera that stands still."""
    sparse = Sparse()
    inspected = inspection.inspect({"training": sparse}, inspection.Budget(pictures=120))
    assert inspected.shown_share == pytest.approx(5 / 30)
    assert all((shown.steps % 7 == 0).all() and len(shown.steps) == 5 for shown in inspected.shown)
    assert all(picture.any() for shown in inspected.shown for picture in shown.pictures["static"])
    said = findings.find(inspected)
    assert any(
        finding.topic == "pictures" and "16.7% of the frames have pictures" in finding.message for finding in said
    )
    assert not [f for f in said if f.topic == "static camera" and f.level != "fine"]


def test_unit_scales():
    assert pairing.unit_scale("0.02 m") == 0.02 and pairing.unit_scale("mm") == 1e-3
    assert pairing.unit_scale("%") is None and pairing.unit_scale("") is None
