"""What every contestant is given, and what each gives back."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from polyturn.trainer.data.samples import TrainSample

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.98)
CLIP_GRAD = 1.0
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every contestant is given."""

    model_path: Path
    num_episodes: int
    vocab_size: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    cpu_s: float
    grad_norm: float
    parts: dict[str, float]
    """CPU seconds by part, where they are taken."""


def make_batch(job: Job) -> list[TrainSample]:
    """Multi-turn episodes: lengths are log-normal, about a third of the tokens are the policy's."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(job.num_episodes):
        length = int(np.clip(rng.lognormal(6.0, 0.5), 64, 1024))
        turns = np.arange(length) // 60
        sampled = (np.arange(length) % 60 >= 40) & (turns > 0)
        sampled[-1] = True
        samples.append(
            TrainSample(
                sample_id=f"s{index}",
                group_id=f"g{index // 8}",
                sequence_id=f"s{index}",
                token_ids=rng.integers(3, job.vocab_size, length),
                sampled=sampled,
                behavior_logprobs=np.zeros(length, dtype=np.float32),
                policy_versions=np.zeros(length, dtype=np.int32),
                turns=turns.astype(np.int32),
                advantages=np.full(length, rng.normal(), dtype=np.float32),
            )
        )
    return samples


def padded(samples: list[TrainSample]) -> dict[str, torch.Tensor]:
    """Right-padded to the longest. The first token is the prompt, all others the completion with its mask."""
    longest = max(map(len, samples))

    def rows(column: Callable[[TrainSample], np.ndarray]) -> torch.Tensor:
        table = np.zeros((len(samples), longest), dtype=column(samples[0]).dtype)
        for row, sample in zip(table, samples, strict=True):
            row[: len(sample)] = column(sample)
        return torch.from_numpy(table)

    return {
        "token_ids": rows(lambda sample: sample.token_ids),
        "real": rows(lambda sample: np.ones(len(sample), dtype=np.int64)),
        "sampled": rows(lambda sample: sample.sampled.astype(np.int64)),
        "advantages": torch.tensor([float(sample.advantages[0]) for sample in samples]),
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
