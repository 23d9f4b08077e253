"""The critic of advantage estimators that need one."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from polyturn.configs.optimizer import OptimizerConfig
from polyturn.configs.parallel import ParallelConfig
from polyturn.configs.section import Section


class CriticOptimizerConfig(OptimizerConfig):
    """The critic's optimizer and learning rate."""

    learning_rate: PositiveFloat = 1e-5
    """After the warm-up."""


class CriticConfig(Section):
    """A value model for PPO (arXiv 1707.06347). Only used where `advantage` needs one (`ppo_gae`)."""

    path: str | None = None
    """The Hugging Face directory whose backbone it starts from, written like `model.path`; null: the policy's."""
    placement: Literal["shared", "own"] = "shared"
    """shared: in the processes of the policy's ranks, in their layout; own: ranks of its own, in `critic.parallel`."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout of ranks of its own."""
    optimizer: CriticOptimizerConfig = CriticOptimizerConfig()
    max_tokens_per_gpu: PositiveInt | None = None
    """Tokens packed into one forward pass of a rank; null: as many as the policy's."""
    value_clip: PositiveFloat | None = 0.2
    """The loss counts a value as moved by at most so much in one step, unless it moved away; null: any change."""
    warmup_steps: NonNegativeInt = 0
    """Steps at the beginning in which the critic is trained and the policy is not."""
