"""One policy that serves several: slots, threads, pictures of any size, instructions of any length."""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from robovlms_jax.control.interface import EpisodesFailed, Observation
from robovlms_jax.policies import serving
from robovlms_jax.policies.config import ActionHistoryConfig, ProprioConfig
from robovlms_jax.policies.sensors import base as sensors
from tests import toy

SLOTS, STEPS, LONG = 3, 3, 16
CONFIG = {
    "chunk": 2,
    "head": toy.HEADS["lstm"],
    "proprio": ProprioConfig(enabled=True),
    "action_history": ActionHistoryConfig(length=2),
}


def encode(instruction):
    """One token per character, eight slots or sixteen; longer ones are refused."""
    ids = [4 + ord(letter) % 90 for letter in instruction]
    if len(ids) > LONG:
        raise ValueError(f"the prompt has {len(ids)} tokens; at most {LONG} are served.")
    length = 8 if len(ids) <= 8 else LONG
    return np.pad(np.array(ids, np.int32), (0, length - len(ids))), np.arange(length) < len(ids)


@pytest.fixture(scope="module")
def served():
    model = toy.make_model(**CONFIG)
    return model, toy.random_params(model, blank_batch(model))


def blank_batch(model):
    batch = toy.make_batch(np.random.default_rng(0))
    blank = sensors.blank(model.config.all_sensors, *batch.inputs.step_mask.shape)
    return batch.replace(inputs=batch.inputs.replace(**blank))


@pytest.fixture(scope="module")
def shared(served):
    """One policy for the tests that compile nothing of their own."""
    return serving.BatchedVLAPolicy(*served, encode, slots=SLOTS)


@pytest.fixture
def policy(shared):
    shared.release(range(SLOTS))
    return shared


def look(seed: int, static=(20, 20), wrist=(12, 12)) -> Observation:
    rng = np.random.default_rng(seed)
    images = {"static": static, "wrist": wrist}
    images = {camera: rng.integers(0, 256, (*size, 3), np.uint8) for camera, size in images.items()}
    return Observation(images, rng.normal(size=7).astype(np.float32))


def alone(single: serving.VLAPolicy, instruction: str, seen: list[Observation]) -> np.ndarray:
    single.reset(instruction)
    return np.stack([single.act(x).actions for x in seen])


def test_a_slot_acts_as_it_would_alone_whatever_size_the_others_pictures_have(served, caplog, exact_matmul):
    # Slot 0 sends one size all the time. Slot 1 begins with another, then changes it, then sends slot 0's.
    seen = {
        0: [look(t) for t in range(STEPS + 1)],
        1: [look(10 + t, static=size) for t, size in enumerate([(30, 26), (48, 64), (20, 20)])],
    }
    policy = serving.BatchedVLAPolicy(*served, encode, slots=2)
    policy.reset([0, 1], ["open", "close"])
    with caplog.at_level(logging.INFO, logger=serving.__name__):
        found = {0: [policy.act(seen[0][:1], [0])[0].actions], 1: []}
        for t in range(STEPS):
            first, second = policy.act([seen[0][t + 1], seen[1][t]], [0, 1])
            found[0].append(first.actions)
            found[1].append(second.actions)
    assert policy._step._cache_size() == 2
    first, again = [record.getMessage() for record in caplog.records]
    assert "compiling the control step (2 at a time): pictures wrist 12x12, static 20x20, prompts of 8 tokens" in first
    assert "slot 1's static picture is 30x26 (height x width) and others were 20x20" in again
    single = serving.VLAPolicy(*served, encode)
    for slot, instruction in enumerate(["open", "close"]):
        np.testing.assert_allclose(found[slot], alone(single, instruction, seen[slot]), atol=1e-6)
        assert np.abs(np.diff(found[slot], axis=0)).max() > 1e-3


def test_a_long_instruction_costs_only_as_long_as_its_episode(served, caplog):
    policy = serving.BatchedVLAPolicy(*served, encode, slots=2)
    policy.reset([0], ["open"])
    policy.act([look(0)], [0])
    before = policy.act([look(1)], [0])[0].actions
    policy.reset([0, 1], ["open", "open the drawer"])
    with caplog.at_level(logging.WARNING, logger=serving.__name__):
        policy.act([look(0), look(0)], [0, 1])
        assert policy._text_length == LONG
        policy.reset([1], ["close"])
        assert policy._text_length == 8
        np.testing.assert_allclose(policy.act([look(1)], [0])[0].actions, before, atol=1e-5)
    (record,) = caplog.records  # going back compiles nothing
    assert "prompts of 16 tokens: the longest instruction is now 'open the drawer'" in record.getMessage()
    policy.reset([1], ["open the drawer"])
    policy.release([1])
    policy.reset([0], ["open"])
    assert policy._text_length == 8 and policy._step._cache_size() == 2


@pytest.mark.parametrize(
    ("slots", "instructions", "message"),
    [
        ([0, 1], ["open", "open the drawer slowly"], r"slot 1: the prompt has 22 tokens; at most 16"),
        ([0, 1], ["open", " "], "slot 1: the instruction is empty"),
        ([0, 1], [None, "open"], "slot 0: the instruction is None, a NoneType"),
        ([0, 1], ["open"], "2 slots were given with 1 instructions"),
        ([0, 1, 3], ["open"] * 3, r"slot 3 is none of the policy's 3: expected whole numbers 0 \.\.\. 2"),
        ([0, 1, -1], ["open"] * 3, "slot -1 is none"),
        ([1, 0, 0], ["open"] * 3, "slot 0 comes twice"),
        ([0, 1, 2.0], ["open"] * 3, r"slot 2\.0 is none"),
        ([0, 1, True], ["open"] * 3, "slot True is none"),
        ([0, 1, "2"], ["open"] * 3, "slot '2' is none"),
    ],
)
def test_a_reset_that_fails_leaves_its_slots_without_an_episode(policy, slots, instructions, message):
    policy.reset([0, 1, 2], ["close"] * 3)
    with pytest.raises(ValueError, match=message):
        policy.reset(slots, instructions)
    for slot in (0, 1):
        with pytest.raises(RuntimeError, match=f"slot {slot} has no episode"):
            policy.act([look(0)], [slot])
    policy.act([look(0)], [2])  # the others go on
    policy.reset([0], ["open"])
    policy.act([look(0)], [0])


@pytest.mark.parametrize("slots", [[-1], [SLOTS], [0, 0], [1.0], [np.float32(1)], [True], [None]])
def test_numbers_that_are_no_slots_are_refused(policy, slots):
    policy.reset(range(SLOTS), ["open"] * SLOTS)
    with pytest.raises(ValueError, match=r"slot .* (is none of|comes twice)"):
        policy.act([look(0)] * len(slots), slots)
    with pytest.raises(ValueError, match="1 slots were given with 2 observations"):
        policy.act([look(0)] * 2, np.array([1]))
    assert policy.act([], []) == []


GOOD = look(5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "the observation is a NoneType; expected interface.Observation"),
        (GOOD.images, "the observation is a dict"),
        (Observation(list(GOOD.images.values()), GOOD.proprio), "observation.images is a list; expected camera"),
        (Observation({"static": GOOD.images["static"]}, GOOD.proprio), r"no 'wrist' image, only \['static'\]"),
        (
            Observation({**GOOD.images, "wrist": np.zeros((12, 12, 3))}, GOOD.proprio),
            r"'wrist' is float64\[12, 12, 3\]",
        ),
        (Observation({**GOOD.images, "wrist": np.zeros((12, 12), np.uint8)}, GOOD.proprio), r"uint8\[12, 12\]"),
        (Observation({**GOOD.images, "wrist": np.zeros((0, 9, 3), np.uint8)}, GOOD.proprio), r"uint8\[0, 9, 3\]"),
        (Observation({**GOOD.images, "wrist": np.zeros((3, 9, 9), np.uint8)}, GOOD.proprio), r"uint8\[3, 9, 9\]"),
        (Observation(GOOD.images), "proprio is None"),
        (Observation(GOOD.images, np.full(7, np.nan)), "one finite robot state"),
        (Observation(GOOD.images, np.zeros((1, 7))), "one finite robot state"),
        (Observation(GOOD.images, np.float32(1)), "one finite robot state"),
        (Observation(GOOD.images, np.zeros(9)), "robot state has 9 numbers"),
        (Observation(GOOD.images, ["left"] * 7), "no array of numbers"),
        (Observation(GOOD.images, GOOD.proprio, np.full((1, 7), np.inf)), "executed must be finite"),
        (Observation(GOOD.images, GOOD.proprio, np.zeros(7)), "executed must be finite"),
    ],
)
def test_an_observation_that_cannot_be_used_is_named_with_its_slot_and_changes_nothing(policy, bad, message):
    policy.reset([0, 2], ["open", "close"])
    policy.act([look(0), look(1)], [0, 2])
    with pytest.raises(ValueError, match=rf"slot 2: .*{message}"):
        policy.act([look(2), bad], [0, 2])
    found = policy.act([look(3), look(4)], [0, 2])
    policy.reset([0, 2], ["open", "close"])
    policy.act([look(0), look(1)], [0, 2])
    for x, y in zip(found, policy.act([look(3), look(4)], [0, 2]), strict=True):
        np.testing.assert_array_equal(x.actions, y.actions)


def test_threads_with_slots_of_their_own_act_as_they_would_one_after_the_other(policy):
    names = ["open", "close", "push"]

    def episode(slot):
        policy.reset([slot], [names[slot]])
        return [policy.act([look(10 * slot + t)], [slot])[0].actions for t in range(6)]

    expected = [episode(slot) for slot in range(SLOTS)]
    with ThreadPoolExecutor(SLOTS) as pool:
        for _ in range(3):
            np.testing.assert_array_equal(list(pool.map(episode, range(SLOTS))), expected)


def in_a_thread(function, *arguments):
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        return pool.submit(function, *arguments).result()


def test_an_episode_is_acted_in_by_one_thread(policy):
    policy.reset([0], ["open"])
    policy.act([look(0)], [0])
    with pytest.raises(RuntimeError, match=r"slot 0: thread 'other_0' acts .* of thread 'MainThread' \('open'\)"):
        in_a_thread(policy.act, [look(0)], [0])
    in_a_thread(policy.reset, [0], ["close"])
    with pytest.raises(RuntimeError, match=r"thread 'MainThread' acts .* of thread 'other_0' \('close'\)"):
        policy.act([look(0)], [0])  # it would follow the other's instruction
    policy.reset([0], ["open"])
    in_a_thread(policy.act, [look(0)], [0])  # one thread resets, another acts


def test_actions_that_are_not_finite_end_their_own_episode_and_no_other(policy, monkeypatch):
    def run(poisoned):
        policy.reset([0, 1], ["open", "close"])
        found = [policy.act([look(0), look(1)], [0, 1])[1].actions]
        with monkeypatch.context() as patch:
            step = policy._step

            def bad(*arguments):
                actions, *rest = step(*arguments)
                return actions.at[0, 0, 0].set(np.nan), *rest

            if poisoned:
                patch.setattr(policy, "_step", bad)
                with pytest.raises(EpisodesFailed, match=r"slot 0: .*not finite") as error:
                    policy.act([look(2), look(3)], [0, 1])
                assert list(error.value.failed) == [0]
                found.append(error.value.chunks[1].actions)
            else:
                found.append(policy.act([look(2), look(3)], [0, 1])[1].actions)
        found.append(policy.act([look(4)], [1])[0].actions)
        return found

    np.testing.assert_array_equal(run(poisoned=True), run(poisoned=False))


def test_a_step_that_fails_ends_the_episodes_and_the_policy_goes_on(policy, served, monkeypatch):
    policy.reset([0, 1], ["open", "close"])
    expected = policy.act([look(0)], [0])[0].actions
    monkeypatch.setattr(policy, "params", jax.tree.map(lambda x: x * np.nan, served[1]))
    with pytest.raises(ValueError, match=r"slot 0: .*not finite: .*reset the slot.*slot 1: .*not finite"):
        policy.act([look(0), look(0)], [0, 1])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="slot 0 has no episode"):
        policy.act([look(0)], [0])
    policy.reset([0, 1], ["open", "close"])
    monkeypatch.setattr(policy, "_step", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        policy.act([look(0)], [0])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="slot 1 has no episode"):
        policy.act([look(0)], [1])
    policy.reset([0], ["open"])
    np.testing.assert_array_equal(policy.act([look(0)], [0])[0].actions, expected)


@pytest.mark.parametrize("slots", [0, -1, 2.0, True, "2"])
def test_a_number_of_slots_that_cannot_be_served_is_refused(policy, slots):
    with pytest.raises(ValueError, match="expected how many episodes to serve"):
        serving.BatchedVLAPolicy(policy.model, policy.params, None, slots)


@pytest.mark.parametrize("history", ["policy_head", pytest.param("interleaved", marks=pytest.mark.slow)])
def test_after_the_warm_up_no_prompt_and_no_picture_compiles_anything(served, caplog, history):
    model, params = served
    if history != "policy_head":
        model = dataclasses.replace(
            model, config=dataclasses.replace(model.config, history=history, head=toy.HEADS["mlp"])
        )
        params = toy.random_params(model, blank_batch(model))
    policy = serving.BatchedVLAPolicy(model, params, encode, slots=2, prompt_lengths=(LONG, 6))
    policy.warm_up({"static": (20, 20), "wrist": (12, 12)})
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    with caplog.at_level(logging.INFO, logger=serving.__name__):
        policy.reset([0], ["open"])
        policy.act([look(0)], [0])
        policy.reset([1], ["open the drawer"])  # longer, beside an episode that goes on
        policy.act([look(1), look(2)], [0, 1])
        policy.act([look(1, static=(30, 26))], [1])  # and another size
        policy.release([1])
        policy.reset([1], ["close"])
        policy.act([look(1), look(2, wrist=(9, 9))], [0, 1])
    assert compiled == [] and not caplog.records
    with pytest.raises(ValueError, match=r"slot 0: .* 17 tokens; at most 16"):
        policy.reset([0], ["x" * 17])


def test_prompts_are_padded_to_the_shortest_of_the_lengths_and_longer_ones_are_refused(served):
    policy = serving.BatchedVLAPolicy(*served, encode, slots=1, prompt_lengths=(12, 6))
    for instruction, length in (("open", 6), ("pull it", 12)):
        ids, mask = policy._text_of(0, instruction)
        assert (len(ids), mask.sum()) == (length, len(instruction))
        np.testing.assert_array_equal(ids[mask], encode(instruction)[0][: len(instruction)])
    with pytest.raises(ValueError, match=r"'open the drawer' has 15 tokens, .* prompts of \[6, 12\]\. Shorten"):
        policy.reset([0], ["open the drawer"])
    with pytest.raises(ValueError, match=r"17 tokens; .* This policy is ready for prompts of \[6, 12\]"):
        policy.reset([0], ["x" * 17])
    with pytest.raises(ValueError, match="warm_up needs prompt_lengths"):
        serving.BatchedVLAPolicy(*served, encode, slots=1).warm_up({})
