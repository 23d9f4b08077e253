"""How far the sampler is from the trainer, in figures.

rho = proximal / behavior of a token. Figures that need an expectation under the sampler are taken as they are: tokens
were drawn by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from polyturn.trainer.algorithms.tokens import MAX_LOG_RATIO

Float64 = npt.NDArray[np.float64]


def mismatch(behavior: Float64, proximal: Float64) -> dict[str, float]:
    """Figures of N trainable tokens, from their logprobs [N] under sampler and trainer; all 0, and ess 1, without any.

    logprob_difference_mean, logprob_difference_max: of |log rho|. kl: the mean of rho - 1 - log rho, an estimate of
    KL(behavior || proximal) (k3). chi2: the mean of rho^2, less 1: an estimate of the chi-square divergence. ess: the
    effective sample size (sum rho)^2 / (N sum rho^2), from 1 / N to 1. perplexity_ratio: the trainer's perplexity of
    the tokens over the sampler's.
    """
    if behavior.size == 0:
        return {
            "logprob_difference_mean": 0.0,
            "logprob_difference_max": 0.0,
            "kl": 0.0,
            "chi2": 0.0,
            "ess": 1.0,
            "perplexity_ratio": 1.0,
        }
    logs = proximal - behavior
    bounded = np.clip(logs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratios = np.exp(bounded)
    squares = float(np.mean(ratios**2))
    return {
        "logprob_difference_mean": float(np.mean(np.abs(logs))),
        "logprob_difference_max": float(np.max(np.abs(logs))),
        "kl": float(np.mean(np.expm1(bounded) - bounded)),
        "chi2": squares - 1,
        "ess": float(np.mean(ratios)) ** 2 / squares,
        "perplexity_ratio": math.exp(min(max(-float(np.mean(logs)), -MAX_LOG_RATIO), MAX_LOG_RATIO)),
    }


def mismatch_by(
    groups: npt.NDArray[np.integer],
    behavior: Float64,
    proximal: Float64,
    flags: Mapping[str, npt.NDArray[np.bool_]],
) -> dict[str, dict[str, float]]:
    """The same of each group of tokens, with `tokens` and, of each flag, the fraction of tokens that have it.

    `groups` numbers them, from 0. Groups from 4 on are put together by powers of 2, `4_to_7`, `8_to_15` and so on, so
    that there are never many.
    """
    figures: dict[str, dict[str, float]] = {}
    floor = np.where(groups < 4, groups, 2 ** np.log2(np.maximum(groups, 4)).astype(np.int64))
    for low in np.unique(floor).tolist():
        here = floor == low
        name = str(low) if low < 4 else f"{low}_to_{2 * low - 1}"
        figures[name] = {
            "tokens": float(here.sum()),
            **{flag: float(found[here].mean()) for flag, found in flags.items()},
            **mismatch(behavior[here], proximal[here]),
        }
    return figures
