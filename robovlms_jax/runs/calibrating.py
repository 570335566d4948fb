"""Calibrate a trained policy on its validation split: intervals around actions, and how many they hold.

Half of the episodes (drawn at random) says how wide intervals have to be, the other half how often they then hold what
was demonstrated. See `policies.confidence` for what is promised, and what is not.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from robovlms_jax.data import loading, opening, represented
from robovlms_jax.policies import confidence, objective
from robovlms_jax.policies.vla import VLA
from robovlms_jax.runs import setup
from robovlms_jax.runs.config import ExperimentConfig


class Compared(NamedTuple):
    """Every window of a split. scores: float32[N, C], nan where the demonstration is over. episode: int[N].
    uncertainty: float32[N, C], or None."""

    scores: np.ndarray
    episode: np.ndarray
    uncertainty: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How often intervals held the demonstrated action, per step of the chunk.

    share: of the test episodes' frames, each episode counting as one. error: its standard error over these episodes.
    repeated: mean share over `splits` further random halves, whose deviation is `deviation`.
    """

    share: tuple[float, ...]
    error: tuple[float, ...]
    repeated: tuple[float, ...]
    deviation: tuple[float, ...]
    splits: int
    episodes: int


def compare(config: ExperimentConfig, model: VLA, params: Any, encode: Any) -> Compared:
    """Predictions and demonstrations of the validation split.

    Raises ValueError for an autoregressive policy: here it would see the demonstrated tokens, and err less than it does
    by itself.
    """
    if config.policy.is_autoregressive:
        raise ValueError(
            "a policy that decodes token after token cannot be calibrated on recorded ones; train it with "
            "policy.head.decoding=parallel."
        )
    dataset = represented.represented(opening.open_split(config.data, "validation"), config.policy.representation)
    source = setup.source_of(config, dataset, encode)
    program, columns = jax.jit(objective.RobotLoss(model).confidence), config.policy.predicted.scaled
    found, episodes, doubts = [], [], []
    batches = loading.evaluation_batches(
        source, segments_per_batch=config.segments_per_batch, num_batches=0, num_threads=config.data.num_threads
    )
    for batch in tqdm.tqdm(batches, desc="predicting the validation split", unit="batch", delay=2):
        predicted, recorded, mask, spread = jax.device_get(program(params, batch))
        scores = confidence.scores(predicted, recorded, None if spread is None else spread.scale, columns)
        there = mask.any(-1)
        found.append(np.where(mask, scores, np.nan)[there])
        episodes.append(np.repeat(batch.episode, len(mask) // len(batch.episode))[there])
        doubts.append(None if spread is None else spread.uncertainty[there])
    uncertainty = None if doubts[0] is None else np.concatenate(doubts)
    return Compared(np.concatenate(found), np.concatenate(episodes), uncertainty)


def calibrate(
    compared: Compared, coverage: float, *, share: float = 0.5, splits: int = 200, seed: int = 0
) -> tuple[confidence.Calibration, Coverage]:
    """Quantiles from a `share` of the episodes, coverage on the others; and over further random splits.

    Raises ValueError where either part would be empty.
    """
    rng, episodes = np.random.default_rng(seed), np.unique(compared.episode)
    count = round(share * len(episodes))
    if not 0 < count < len(episodes):
        raise ValueError(f"share={share} of {len(episodes)} validation episodes leaves none to calibrate or to test.")
    rows = [np.flatnonzero(compared.episode == episode) for episode in episodes]
    results = []
    for _ in range(splits + 1):
        order = rng.permutation(len(episodes))
        quantiles = _quantiles(compared.scores, [rows[i] for i in order[:count]], coverage, rng)
        results.append((quantiles, *_held(compared.scores, [rows[i] for i in order[count:]], quantiles)))
    (quantiles, held, error), others = results[0], np.array([result[1] for result in results[1:]])
    measured = Coverage(
        share=tuple(held.tolist()),
        error=tuple(error.tolist()),
        repeated=tuple(others.mean(0).tolist()),
        deviation=tuple(others.std(0).tolist()),
        splits=splits,
        episodes=len(episodes) - count,
    )
    scaled = compared.uncertainty is not None
    return confidence.Calibration(tuple(quantiles.tolist()), coverage, count, scaled), measured


def _quantiles(scores: np.ndarray, rows: list[np.ndarray], coverage: float, rng: np.random.Generator) -> np.ndarray:
    """float[C]: of one random frame of each episode that has one with this step of the chunk."""
    drawn = np.full((len(rows), scores.shape[1]), np.nan)
    for episode, own in enumerate(rows):
        for step in range(scores.shape[1]):
            there = own[~np.isnan(scores[own, step])]
            if len(there):
                drawn[episode, step] = scores[rng.choice(there), step]
    return np.array([confidence.quantile(column[~np.isnan(column)], coverage) for column in drawn.T])


def _held(scores: np.ndarray, rows: list[np.ndarray], quantiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float[C] each: mean over episodes of the share of their frames that are held, and its standard error."""
    inside = np.where(np.isnan(scores), np.nan, scores <= quantiles)
    shares = np.full((len(rows), scores.shape[1]), np.nan)
    for episode, own in enumerate(rows):
        there = ~np.isnan(scores[own])
        some = there.any(0)
        shares[episode, some] = np.nansum(inside[own][:, some], axis=0) / there[:, some].sum(0)
    number = (~np.isnan(shares)).sum(0)
    return np.nanmean(shares, axis=0), np.nanstd(shares, axis=0) / np.sqrt(number)
