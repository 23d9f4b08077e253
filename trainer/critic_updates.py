"""What a step asks of the critic, beside the policy: values at its start, and an update for each of the policy's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from polyturn.configs.schema.run import RunConfig
from polyturn.trainer.batch import TrainSample

if TYPE_CHECKING:
    from polyturn.trainer.megatron.critic import MegatronCritic
    from polyturn.trainer.updates import ScoredColumns, UpdateReport, UpdateShare

Values = dict[str, npt.NDArray[np.float32]]
"""A column [T] by sample id."""
REPORTED = ("loss", "clip_fraction", "error", "error_max", "grad_norm", "learning_rate")
UNMOVED = {"policy_kl": 0.0}
"""The policy's metrics of an update that only the critic takes."""
SKIPPED = {**UNMOVED, "skipped": 1.0}
"""The metrics of an update that has nothing to train on: nobody takes it."""


def score_values(critic: MegatronCritic, samples: Sequence[TrainSample]) -> Values:
    """The values of this rank's samples."""
    columns = critic.values(samples)
    return {sample.sample_id: column for sample, column in zip(samples, columns, strict=True)}


def train_critic(critic: MegatronCritic, share: UpdateShare) -> dict[str, float]:
    """One update of the critic; its metrics."""
    metrics = critic.train(share.samples, global_counts=share.counts)
    return {f"critic/{name}": metrics[name] for name in REPORTED}


def in_warmup(config: RunConfig, *, num_critic_updates: int) -> bool:
    """Whether the step that follows so many updates of the critic trains the critic alone."""
    trainer = config.trainer
    return trainer.uses_critic and num_critic_updates < trainer.critic.warmup_steps * trainer.updates_per_step


def with_values(
    scores: Sequence[Mapping[str, ScoredColumns]], values: Sequence[Values]
) -> list[dict[str, ScoredColumns]]:
    """What the policy's ranks computed of the samples with what the critic's did."""
    found = {sample_id: column for part in values for sample_id, column in part.items()}
    return [
        {sample_id: replace(columns, values=found[sample_id]) for sample_id, columns in part.items()}
        for part in scores
    ]


def with_critic_metrics(
    reports: Sequence[UpdateReport], metrics: Sequence[Mapping[str, float]]
) -> list[UpdateReport]:
    """The policy's reports with the critic's metrics of the same updates."""
    return [
        replace(
            report,
            metrics=tuple({**ours, **theirs} for ours, theirs in zip(report.metrics, metrics, strict=True)),
        )
        for report in reports
    ]
