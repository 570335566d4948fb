import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robovlms_jax.evaluation import offline

UNITS = (0.02,) * 3 + (0.05,) * 3


def make_batch(seed, shape=(5, 3, 4)):
    rng = np.random.default_rng(seed)
    recorded, predicted = rng.uniform(-1, 1, (2, *shape, 7)).astype(np.float32)
    recorded[..., 6] = np.sign(recorded[..., 6])
    predicted[..., 6] = np.sign(predicted[..., 6])
    return predicted, recorded, rng.random(shape) < 0.7


def test_numbers_equal_the_plain_definitions():
    predicted, recorded, mask = make_batch(0)
    summary = offline.summarize(offline.measure(predicted, recorded, mask, UNITS))
    for position in range(4):
        chosen = mask[:, :, position]
        p, r = (x[:, :, position][chosen].astype(np.float64) for x in (predicted, recorded))
        arm, target = p[:, :6] * UNITS, r[:, :6] * UNITS
        assert summary.count[position] == chosen.sum()
        np.testing.assert_allclose(summary.mae[position], np.abs(arm - target).mean(0))
        np.testing.assert_allclose(summary.mae_still[position], np.abs(target).mean(0))
        np.testing.assert_allclose(summary.rmse[position], np.sqrt(((arm - target) ** 2).mean(0)))
        np.testing.assert_allclose(summary.rmse_mean[position], target.std(0))
        np.testing.assert_allclose(summary.translation_m[position], np.abs(arm - target)[:, :3].mean())
        np.testing.assert_allclose(summary.rotation_rad[position], np.abs(arm - target)[:, 3:].mean())
        closed, said = r[:, 6] < 0, p[:, 6] < 0
        precision, recall = (closed & said).sum() / said.sum(), (closed & said).sum() / closed.sum()
        np.testing.assert_allclose(summary.gripper_accuracy[position], (closed == said).mean())
        np.testing.assert_allclose(summary.gripper_majority[position], max(closed.mean(), 1 - closed.mean()))
        np.testing.assert_allclose(summary.gripper_f1[position], 2 * precision * recall / (precision + recall))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_batches_add_up_however_they_are_cut(sizes):
    batches = [make_batch(seed, (size, 3, 4)) for seed, size in enumerate(sizes)]
    whole = offline.measure(*(np.concatenate(parts) for parts in zip(*batches, strict=True)), UNITS)
    parts = offline.add(*(offline.measure(*batch, UNITS) for batch in batches))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_overall_is_the_mean_over_entries_not_over_positions():
    predicted, recorded, mask = make_batch(1)
    mask[:, :, 1:] &= np.random.default_rng(0).random(mask[:, :, 1:].shape) < 0.2
    overall = offline.summarize(offline.over_chunk(offline.measure(predicted, recorded, mask, UNITS)))
    error = np.abs(predicted[..., :6].astype(np.float64) - recorded[..., :6])[mask] * UNITS
    assert overall.count == mask.sum()
    np.testing.assert_allclose(overall.mae, error.mean(0))


def test_perfect_predictions_and_units():
    _, recorded, mask = make_batch(2)
    perfect = offline.summarize(offline.over_chunk(offline.measure(recorded, recorded, mask, UNITS)))
    assert perfect.translation_m == perfect.rotation_rad == 0
    assert perfect.gripper_accuracy == perfect.gripper_f1 == 1
    off = recorded + np.float32([1, 1, 1, 1, 1, 1, 0])
    shifted = offline.summarize(offline.over_chunk(offline.measure(off, recorded, mask, UNITS)))
    np.testing.assert_allclose([shifted.translation_m, shifted.rotation_rad], [0.02, 0.05], rtol=1e-5)


def test_what_the_mask_leaves_out_is_never_looked_at(recwarn):
    predicted, recorded, mask = make_batch(3)
    before = offline.measure(predicted, recorded, mask, UNITS)
    predicted[~mask], recorded[~mask] = np.nan, np.inf
    for a, b in zip(before, offline.measure(predicted, recorded, mask, UNITS), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not recwarn.list


def test_nothing_measured_is_nan_without_warnings(recwarn):
    predicted, recorded, mask = make_batch(4)
    recorded[..., 6] = 1
    mask[:, :, 3] = False
    summary = offline.summarize(offline.measure(predicted, recorded, mask, UNITS))
    assert np.isnan(summary.gripper_f1).all()
    assert np.isnan(summary.mae[3]).all()
    assert np.isfinite(summary.mae[:3]).all()
    overall = offline.scalars(offline.summarize(offline.over_chunk(offline.measure(predicted, recorded, mask, UNITS))))
    assert "gripper_f1" not in overall
    assert overall["gripper_majority"] == 1
    assert all(isinstance(x, float) for x in overall.values())
    assert not recwarn.list


def test_sensitivity_spans_from_ignored_to_decisive():
    predicted, _, mask = make_batch(5)
    same = offline.language_sensitivity(predicted, predicted, mask, UNITS)
    assert same == (0, 0, 0, 0)
    left, right = np.zeros_like(predicted) - 0.5, np.zeros_like(predicted) + 0.5
    opposite = offline.language_sensitivity(left, right, mask, UNITS)
    np.testing.assert_allclose(opposite, (0.02, 0.05, 2, 1))
    nudged = offline.language_sensitivity(predicted, predicted + np.float32([0.1] * 6 + [0]), mask, UNITS)
    np.testing.assert_allclose(nudged[:2], (0.002, 0.005), rtol=1e-5)
    assert 0 < nudged.relative < 0.4
    assert nudged.gripper_flips == 0


def test_wrong_shapes_are_named():
    predicted, recorded, mask = make_batch(6)
    with pytest.raises(ValueError, match=r"got \(5, 3, 4, 7\), \(5, 3, 4\) and \(7,\)"):
        offline.measure(predicted, recorded, mask, np.ones(7))
    with pytest.raises(ValueError, match=r"got \(5, 3, 4, 6\)"):
        offline.measure(predicted, recorded[..., :6], mask, UNITS)
    with pytest.raises(ValueError, match="leaves no prediction"):
        offline.language_sensitivity(predicted, recorded, mask & False, UNITS)


def test_evaluation_needs_no_jax():
    code = "import sys; from robovlms_jax.evaluation.report import offline; "
    code += "print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(run.stdout.replace("'", '"') or "null") == [], run.stderr
