"""What a step asks of the critic, beside the policy: values at its start, and an update for each of the policy's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from polyturn.configs.schema import RunConfig
from polyturn.trainer.batch import TrainSample

if TYPE_CHECKING:
    from polyturn.trainer.megatron.critic import MegatronCritic
    from polyturn.trainer.updates import UpdateShare

Values = dict[str, npt.NDArray[np.float32]]
"""A column [T] by sample id."""
REPORTED = ("loss", "clip_fraction", "error", "error_max", "grad_norm", "learning_rate")
UNMOVED = {"policy_kl": 0.0}
"""The policy's metrics of an update that only the critic takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticReport:
    """What one data-parallel rank of a critic with ranks of its own did in a step."""

    metrics: tuple[Mapping[str, float], ...]
    """Per update, reduced over all ranks; their names begin with `critic/`."""


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
