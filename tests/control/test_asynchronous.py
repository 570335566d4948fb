"""Which action belongs to which tick: seams, triggers and delays, on a clock of the test's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from robovlms_jax.control import robot as robots
from robovlms_jax.control.asynchronous import ActionQueue, AsyncConfig, Scheduler, roll_forward
from robovlms_jax.control.delayed import AsynchronousBatch
from robovlms_jax.control.interface import ActionChunk, Observation

C = 8
PLAIN = robots.RobotSpec(
    "line",
    10.0,
    action=(robots.Dimension("v", "m/s", "velocity", "base"), robots.GRIPPER),
    state=(robots.Dimension("v", "m"), robots.GRIPPER),
)


def chunk(first: float, length: int = C, gripper: float = 1.0) -> np.ndarray:
    return np.stack([first + np.arange(length), np.full(length, gripper)], axis=1).astype(np.float32)


def queue(seam="switch", **changes) -> ActionQueue:
    return ActionQueue(AsyncConfig(seam, **changes), PLAIN)


def taken(actions: ActionQueue, count: int) -> list[float]:
    rows = [actions.take() for _ in range(count)]
    return [np.nan if row is None else float(row.action[0]) for row in rows]


def look(value=0, state=(0.0, 1.0), size=32) -> Observation:
    return Observation({"static": np.full((size, size, 3), value, np.uint8)}, np.array(state))


def test_switch_takes_the_newest_chunks_row_of_the_tick():
    actions = queue()
    assert actions.offer(chunk(0), 0)
    assert taken(actions, 3) == [0, 1, 2]
    assert actions.offer(chunk(100), 1)  # two ticks late
    assert taken(actions, 3) == [102, 103, 104]
    assert not actions.offer(chunk(0), 1) and not actions.offer(chunk(0), 7)  # older; from the future


def test_wait_begins_a_chunk_when_it_comes():
    actions = queue("wait")
    taken(actions, 3)
    assert actions.offer(chunk(100), 1)
    assert taken(actions, 2) == [100, 101]


@pytest.mark.parametrize("blend", [1, 3])
def test_blending_spreads_a_jump_over_its_ticks(blend):
    # The reference's figure: a jump of 1 becomes steps of 1 / (blend + 1).
    actions = queue("blend", blend=blend)
    still, moved = np.zeros((20, 2)), np.ones((20, 2))
    actions.offer(still, 0)
    actions.take()
    actions.offer(moved, 1)
    values = [0.0, *taken(actions, blend + 2)]
    np.testing.assert_allclose(np.diff(values)[: blend + 1], 1 / (blend + 1))
    np.testing.assert_allclose(values[blend + 1 :], 1)


def test_a_blended_gripper_is_voted_on_and_never_in_between():
    actions = queue("blend", blend=3)
    actions.offer(chunk(0, gripper=1.0), 0)
    actions.take()
    actions.offer(chunk(0, gripper=-1.0), 1)
    rows = [actions.take().action[1] for _ in range(4)]
    assert rows == [1, -1, -1, -1]  # 3/4 of the vote, then a tie that the newest wins


def test_absolute_rotations_are_not_blended():
    turned = dataclasses.replace(robots.CALVIN, action=robots.CALVIN.state)
    with pytest.raises(ValueError, match="absolute rotations"):
        ActionQueue(AsyncConfig("blend"), turned)


def test_freeze_follows_the_old_chunk_for_the_expected_delay():
    actions = queue("freeze")
    actions.offer(chunk(0), 0)
    taken(actions, 2)
    actions.offer(chunk(100), 1, frozen=4)  # answered after one tick, expected after four
    assert taken(actions, 4) == [2, 3, 4, 104]


def test_rows_older_than_max_age_are_not_executed():
    actions = queue(max_age=2)
    actions.offer(chunk(0), 0)
    np.testing.assert_array_equal(taken(actions, 5), [0, 1, 2, np.nan, np.nan])


class Policy:
    """Answer n begins with 100 n; remembers what it saw."""

    robot = PLAIN

    def __init__(self, uncertainty=None):
        self.seen, self.calls, self.uncertainty = [], 0, uncertainty

    def reset(self, slots, instructions):
        self.instruction = instructions[0]

    def act(self, observations, slots):
        self.seen += observations
        self.calls += 1
        return [ActionChunk(chunk(100 * self.calls), self.uncertainty)] * len(slots)


def drive(config, latency, ticks, observe=lambda tick: look(), policy=None):
    """Executed numbers of so many ticks, and the policy and its wrapper."""
    policy = policy or Policy()
    batch = AsynchronousBatch(policy, config, latency)
    batch.reset([0], ["go"])
    done = []
    while len(done) < ticks:
        done += batch.act([observe(len(done))], [0])[0].actions[:, 0].tolist()
    return done[:ticks], policy, batch


def test_synchronous_control_holds_still_while_the_policy_thinks():
    done, policy, batch = drive(AsyncConfig("wait", ask_below=C - 3), 2, 10)
    assert done == [0, 0, 100, 101, 102, 0, 0, 200, 201, 202]
    assert batch.counts["held"] == 4 and policy.calls == 2


@pytest.mark.parametrize("latency", [0, 1, 3, 4])
def test_asynchronous_control_never_holds_after_the_first_answer(latency):
    config = AsyncConfig("switch", ask_below=1)
    done, _, batch = drive(config, latency, 40)
    assert batch.counts["held"] == latency
    assert 0 not in done[latency:]
    # a row's age is its place in the chunk, so its chunk's number says when it was asked for
    assert batch.counts["age"] / (40 - latency) < C


def test_no_row_is_executed_at_another_tick_than_its_own():
    done, _, _ = drive(AsyncConfig("switch", ask_below=2), 3, 60)
    asked = {}
    for tick, value in enumerate(done[3:], start=3):
        number, row = divmod(int(value), 100)
        assert asked.setdefault(number, tick - row) == tick - row


def test_a_policy_is_told_what_is_left_and_how_much_of_it_passes():
    config = AsyncConfig("freeze", tell=True, ask_below=2)
    _, policy, _ = drive(config, 3, 30)
    assert policy.seen[0].committed is None  # nothing before the first answer
    later = policy.seen[-1]
    assert later.delay == 3 and len(later.committed) == 5  # ask_below beside the delay
    assert later.committed[0, 0] % 100 == 3


def test_the_state_is_rolled_forward_and_the_answer_begins_there():
    config = AsyncConfig("switch", roll_forward=True, delay=3, ask_below=1)
    done, policy, _ = drive(config, 3, 20)
    first, second = policy.seen[:2]
    np.testing.assert_allclose(first.proprio, [0, 1])
    committed = [100 + i for i in range(C)][-4:-1]  # what is executed in the three ticks of thinking
    np.testing.assert_allclose(second.proprio, [sum(committed) / PLAIN.rate_hz, 1], rtol=1e-6)
    at = done.index(200)
    assert done[at - 1] == 106  # row 0 of the new chunk follows the last of those


@pytest.mark.parametrize("seam", ["switch", "blend", "freeze"])
def test_an_answer_that_comes_earlier_than_expected_leaves_the_old_rows_until_it_begins(seam):
    queue = ActionQueue(AsyncConfig(seam, roll_forward=True), PLAIN)
    queue.offer(np.zeros((20, len(PLAIN.action))), 0)
    queue.take()
    queue.offer(np.ones((20, len(PLAIN.action))), 1, starts=4, frozen=3)
    taken = [queue.take() for _ in range(8)]
    assert None not in taken and all(row.action[0] == 0 for row in taken[:3])
    assert taken[-1].action[0] == 1


def test_rolling_forward_sums_what_calvins_actions_move():
    state = np.array([0.1, 0.2, 0.3, 3.1, 0.0, -3.1, 1.0])
    actions = np.tile([0.5, 0, -1, 1, 0, 0, -1], (2, 1))
    rolled = roll_forward(state, actions, robots.CALVIN)
    expected = [0.12, 0.2, 0.26, 3.2 - 2 * np.pi, 0, -3.1, -1]
    np.testing.assert_allclose(rolled, expected, atol=1e-6)
    np.testing.assert_allclose(roll_forward(state, actions[:0], robots.CALVIN), state, atol=1e-6)
    long = roll_forward(np.r_[state[:6], 0.04, np.zeros(7), 1.0], actions, robots.CALVIN)
    assert long[14] == -1 and long[6] == np.float32(0.04)  # robot_obs: a width, and the command last
    with pytest.raises(ValueError, match="has the name of a number"):
        roll_forward(state, actions, dataclasses.replace(robots.CALVIN, state=()))


@pytest.mark.parametrize(
    ("changes", "observe", "reason"),
    [
        ({"picture_change": 0.1}, lambda tick: look(0 if tick < 4 else 60), "picture"),
        ({"state_change": 0.5}, lambda tick: look(state=(0.0 if tick < 4 else 1.0, 1.0)), "state"),
        ({"max_interval": 4}, lambda tick: look(), "interval"),
        ({"uncertainty": 0.5}, lambda tick: look(), "uncertainty"),
    ],
)
def test_an_event_asks_anew_and_without_it_the_chunk_is_followed(changes, observe, reason):
    doubt = np.where(np.arange(C) == 4, 1.0, 0.1) if reason == "uncertainty" else None
    done, _, batch = drive(AsyncConfig("switch", **changes), 0, 7, observe, Policy(doubt))
    assert batch.counts[reason] == 1
    assert done[:6] == [100, 101, 102, 103, 200, 201]
    quiet, _, batch = drive(AsyncConfig("switch"), 0, 7, observe, Policy(doubt))
    assert quiet == [100 + i for i in range(7)] and batch.counts[reason] == 0


def test_noise_of_single_pixels_is_no_change():
    rng = np.random.default_rng(0)

    def noisy(tick):
        picture = rng.integers(100, 140, (64, 64, 3), np.uint8)
        return Observation({"static": picture}, np.zeros(2))

    _, _, batch = drive(AsyncConfig("switch", picture_change=0.1), 0, C - 1, noisy)
    assert batch.counts["picture"] == 0


def test_events_keep_their_interval_and_only_one_question_is_under_way():
    config = AsyncConfig("switch", picture_change=0.01, min_interval=3)
    _, policy, _ = drive(config, 2, 12, lambda tick: look(20 * (tick % 2)))
    assert policy.calls <= 12 / 3 + 1
    scheduler = Scheduler(config, PLAIN)
    scheduler.ask(scheduler.due())
    assert scheduler.due(look(90)) == "" and scheduler.under_way


def test_the_expected_delay_is_the_largest_of_the_last_few():
    scheduler = Scheduler(AsyncConfig("switch", delay=9, delays=2), PLAIN)
    assert scheduler.expected_delay == 9
    for delay in (5, 1, 2):
        scheduler.ask("low")
        for _ in range(delay):
            scheduler.queue.take()
        scheduler.answer(ActionChunk(chunk(0)))
    assert scheduler.expected_delay == 2


def test_an_answer_for_an_older_instruction_is_not_waited_for():
    scheduler = Scheduler(AsyncConfig("switch"), PLAIN)
    scheduler.ask("low")
    scheduler.answer(ActionChunk(chunk(0)))
    scheduler.change_instruction()
    assert scheduler.due() == "instruction" and scheduler.queue.remaining == C  # followed meanwhile


@pytest.mark.parametrize(
    "changes",
    [
        {"seam": "jump"},
        {"blend": 0},
        {"max_age": -1},
        {"picture_change": float("nan")},
        {"seam": "wait", "tell": True},
        {"seam": "freeze", "tell": True, "roll_forward": True},
    ],
)
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="asynchronous"):
        AsyncConfig(**changes)


def test_acting_without_an_episode_is_refused():
    batch = AsynchronousBatch(Policy(), AsyncConfig(), 0)
    with pytest.raises(RuntimeError, match="slot 0 has no episode"):
        batch.act([look()], [0])
    with pytest.raises(ValueError, match="latency"):
        AsynchronousBatch(Policy(), AsyncConfig(), -1)


def test_late_answers_keep_how_uncertain_each_action_is_and_holding_still_says_nothing():
    driven = AsynchronousBatch(Policy(np.arange(C) / 10.0), AsyncConfig("wait"), 2)
    driven.reset([0], ["go"])
    found = driven.act([look()], [0])[0]
    np.testing.assert_allclose(found.uncertainty[:5], [np.nan, np.nan, 0.0, 0.1, 0.2], rtol=1e-6)
    assert len(found.uncertainty) == len(found.actions)
    unsaid = AsynchronousBatch(Policy(), AsyncConfig("wait"), 2)
    unsaid.reset([0], ["go"])
    assert unsaid.act([look()], [0])[0].uncertainty is None
