"""Statistics of actions, and the linter that reads them before a run."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from robovlms_jax.actions import statistics
from robovlms_jax.policies.config import PolicyConfig


def recorded(rng: np.random.Generator, steps: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Healthy actions float[steps, 7] and the finger widths that go with them."""
    actions = rng.normal(size=(steps, 7)) * [0.3, 0.3, 0.3, 0.1, 0.1, 0.1, 1]
    actions[:, 6] = np.where(rng.random(steps) < 0.4, -1, 1)
    return actions, np.where(actions[:, 6] > 0, 0.08, 0.01) + 0.002 * rng.normal(size=steps)


def findings_of(actions: np.ndarray, widths: np.ndarray | None = None, **options) -> list[statistics.Finding]:
    values = statistics.summarize(actions)
    return statistics.lint(values, commands=actions[:, 6], widths=widths, **options)


def test_summary_is_numpys():
    actions, _ = recorded(np.random.default_rng(0))
    values = statistics.summarize(actions)
    np.testing.assert_allclose(values["std"], actions.std(0))
    np.testing.assert_allclose(values["q01"], np.sort(actions, 0)[4] * 0.01 + np.sort(actions, 0)[5] * 0.99, atol=0.02)
    with pytest.raises(ValueError, match="no action"):
        statistics.summarize(np.zeros((0, 7)))


def test_healthy_actions_have_no_findings():
    assert findings_of(*recorded(np.random.default_rng(1))) == []


def test_each_fault_is_named_with_its_dimension_and_values():
    actions, widths = recorded(np.random.default_rng(2))
    actions[:, 4] = 0.25
    actions[:, 1] = 0  # moves in one step of 500: both quantiles are 0
    actions[17, 1] = 1.0
    found = {finding.dimension: finding for finding in findings_of(actions, widths)}
    assert set(found) == {"y", "pitch"}
    assert "never changes (min 0.25" in found["pitch"].message
    assert not found["pitch"].refused
    assert "q01 and q99 nearly coincide (min 0, q01 0, q99 0, max 1)" in found["y"].message
    assert found["y"].refused
    (y, _) = findings_of(actions, widths, by_quantiles=False)  # fixed bounds lose nothing there
    assert y.dimension == "y"
    assert not y.refused


@pytest.mark.parametrize(
    ("gripper", "message"),
    [
        (lambda g: (g + 1) / 2, "one sign only"),
        (lambda g: -g, "means the opposite: fingers are 0.0"),
        (lambda g: 0 * g + 1, "never changes"),
    ],
)
def test_a_gripper_of_another_convention_is_found(gripper, message):
    actions, widths = recorded(np.random.default_rng(3))
    actions[:, 6] = gripper(actions[:, 6])
    (finding,) = findings_of(actions, widths)
    assert finding.dimension == "gripper"
    assert message in finding.message
    assert finding.refused == ("never" not in message)


def test_findings_are_logged_and_grave_ones_refused(caplog):
    findings = [statistics.Finding("yaw", "is odd", False), statistics.Finding("gripper", "is inverted", True)]
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=r"here: .*gripper: is inverted.*check_act"):
        statistics.enforce(findings, "here")
    assert [record.getMessage() for record in caplog.records] == [
        "here: action dimension yaw is odd",
        "here: action dimension gripper is inverted",
    ]
    statistics.enforce(findings, "here", refuse=False)
    statistics.enforce(findings[:1], "here")


@pytest.mark.parametrize(
    ("count", "value", "refused"),
    [(1, 1e9, True), (40, -1e9, True), (3, 500.0, True), (1, -60.0, False), (1, 2.0, False)],
)
def test_values_that_can_be_no_actions_are_refused(count, value, refused):
    # One label, or as many as reach q99 and q01. A single large step (here 43 usual ranges) is kept.
    actions, widths = recorded(np.random.default_rng(4))
    actions[:count, 1] = value
    found = [finding for finding in findings_of(actions, widths, by_quantiles=False) if "no actions" in finding.message]
    assert [(finding.dimension, finding.refused) for finding in found] == [("y", True)] * refused


@pytest.mark.parametrize(("count", "value"), [(1, 1e9), (1, 1e3), (4, -50.0), (40, 1e9)])
def test_outliers_never_become_the_bounds_that_a_robot_is_sent(count, value):
    # Whether or not the linter was told to go on.
    policy = PolicyConfig(action_scaling="mean_std")
    actions, _ = recorded(np.random.default_rng(5))
    assert max(policy.with_statistics(statistics.summarize(actions)).action_high) < 1.2
    actions[:count, 4] = value
    with pytest.raises(ValueError, match=r"action dimension pitch has standard deviation .* outliers"):
        policy.with_statistics(statistics.summarize(actions))
    if count < 5:
        quantile = dataclasses.replace(policy, action_scaling="quantile")
        assert quantile.with_statistics(statistics.summarize(actions)).action_high[4] < 1
