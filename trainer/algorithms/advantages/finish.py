"""The last step of every estimator: whitening over the whole step, and figures about the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from polyturn.configs.schema.algorithm import AdvantageSection
from polyturn.trainer.algorithms.advantages.comparison import Compared
from polyturn.trainer.algorithms.advantages.types import (
    Advantages,
    Float32,
    Float64,
    RewardBatch,
    back,
    trajectory,
)

WHITENING_EPSILON = 1e-8


def finish(
    step: RewardBatch,
    advantages: Sequence[Float64],
    *,
    config: AdvantageSection,
    trainable: Sequence[bool] | None = None,
    returns: tuple[tuple[Float32, ...], ...] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Advantages:
    """What an estimator gives back, from the advantages along each part's trajectory, [N] each.

    Args:
        trainable: By part; None: all.
    """
    kept = [True] * len(step.parts) if trainable is None else list(trainable)
    if config.whiten:
        advantages = whiten(advantages, kept)
    tokens = _tokens(advantages, kept)
    figures = {
        "advantage/mean": float(tokens.mean()) if tokens.size else 0.0,
        "advantage/std": float(tokens.std()) if tokens.size else 0.0,
        "advantage/abs_max": float(np.abs(tokens).max()) if tokens.size else 0.0,
        "advantage/zero_fraction": float((tokens == 0).mean()) if tokens.size else 0.0,
    }
    return Advantages(
        columns=tuple(back(part, values) for part, values in zip(step.parts, advantages, strict=True)),
        trainable=tuple(kept),
        returns=returns,
        metrics={**figures, **(metrics or {})},
    )


def finish_compared(step: RewardBatch, compared: Compared, *, config: AdvantageSection) -> Advantages:
    """As `finish`, with one number for all tokens of a part."""
    return finish(
        step,
        [
            np.full(len(trajectory(part)[0]), value)
            for part, value in zip(step.parts, compared.advantages, strict=True)
        ],
        config=config,
        trainable=compared.trainable,
        metrics=compared.metrics,
    )


def whiten(advantages: Sequence[Float64], trainable: Sequence[bool]) -> list[Float64]:
    """(A - mean) / standard deviation, both over all tokens of the parts that are trained on, n - 1 in the latter.

    Advantages that do not differ become exactly 0.
    """
    tokens = _tokens(advantages, trainable)
    if tokens.size < 2 or np.ptp(tokens) == 0.0:
        return [np.zeros_like(values) for values in advantages]
    mean, scale = tokens.mean(), tokens.std(ddof=1) + WHITENING_EPSILON
    return [(values - mean) / scale for values in advantages]


def _tokens(advantages: Sequence[Float64], trainable: Sequence[bool]) -> Float64:
    kept = [values for values, keep in zip(advantages, trainable, strict=True) if keep]
    return np.concatenate(kept) if kept else np.zeros(0)
