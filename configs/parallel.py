"""How the trainer's ranks share one model."""

from __future__ import annotations

from pydantic import PositiveInt

from polyturn.configs.section import Section


class ParallelConfig(Section):
    """The layout of the trainer's ranks: tensor x data."""

    tensor: PositiveInt = 1
    """Ranks that share one copy of the weights."""
    data: PositiveInt = 1
    """Copies of the weights, each trained on a part of the batch."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.data
