"""On-policy distillation: what teachers say of the tokens that the policy sampled, as a part of their advantages.

At a token with the tokens before it the reverse KL of the policy to a teacher is the expectation, over what the policy
draws there, of log policy - log teacher. A reward of minus that for each token, without regard to what comes after it,
has its gradient as policy gradient; MiniLLM (arXiv 2306.08543, section 2.2) calls it the single-step part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from polyturn.configs.schema.algorithm import DistillationInAdvantage
from polyturn.trainer.algorithms.advantages import Advantages, Float32
from polyturn.trainer.data.samples import TrainSample


def add_distillation(
    found: Advantages, samples: Sequence[Sequence[TrainSample]], config: DistillationInAdvantage
) -> Advantages:
    """The advantages with coefficient (log teacher - log proximal) at every sampled token.

    Args:
        samples: scored, by part as `found.columns`.

    Raises:
        ValueError: a sample has no logprobs of a teacher.
    """
    columns = tuple(
        tuple(
            column + np.float32(config.coefficient) * _bounded(differences(sample), config.max_difference)
            for column, sample in zip(of_part, scored, strict=True)
        )
        for of_part, scored in zip(found.columns, samples, strict=True)
    )
    return replace(found, columns=columns)


def differences(sample: TrainSample) -> Float32:
    """log teacher - log proximal at the sampled tokens, [T], 0 elsewhere. Raises `ValueError` without a teacher's."""
    if sample.teacher_logprobs is None:
        raise ValueError(
            f"sample {sample.sample_id} has no teacher_logprobs: was it played before there were teachers?"
        )
    assert sample.proximal_logprobs is not None, f"{sample.sample_id} has not been scored"
    zeros = np.zeros(len(sample), dtype=np.float32)
    return np.subtract(sample.teacher_logprobs, sample.proximal_logprobs, out=zeros, where=sample.sampled)


def distillation_figures(samples: Sequence[TrainSample]) -> dict[str, float]:
    """How far the policy at the step's start is from its teachers, over the trainable tokens that have one.

    `distillation/kl` estimates KL(policy, teacher) by the mean of log policy - log teacher. No figures where no token
    has a teacher.
    """
    taught = [-differences(s)[s.sampled] for s in samples if s.teacher_logprobs is not None]
    gaps = np.concatenate([np.zeros(0, dtype=np.float32), *taught]).astype(np.float64)
    if not len(gaps):
        return {}
    return {
        "distillation/tokens": float(len(gaps)),
        "distillation/kl": float(gaps.mean()),
        "distillation/difference_mean": float(np.abs(gaps).mean()),
        "distillation/difference_max": float(np.abs(gaps).max()),
    }


def _bounded(values: Float32, most: float | None) -> Float32:
    return values if most is None else values.clip(-most, most)
