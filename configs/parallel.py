"""How the trainer's ranks share one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import PositiveInt, model_validator

from polyturn.configs.section import Section


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """Where a rank stands on each axis of the layout."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    """The part of the experts that it holds."""


class ParallelConfig(Section):
    """The layout of the trainer's ranks: tensor x context x data x pipeline of them."""

    tensor: PositiveInt = 1
    """Ranks that share each layer's weights. Above 1 they share the sequence, too, where a layer is not split."""
    pipeline: PositiveInt = 1
    """Stages that the layers are divided into."""
    virtual_pipeline: PositiveInt = 1
    """Chunks of layers on each pipeline stage. More of them shorten the pipeline's idle time."""
    context: PositiveInt = 1
    """Ranks that share the tokens of each sequence."""
    expert: PositiveInt = 1
    """Parts that a layer's experts are divided into, over ranks of the tensor, context and data axes."""
    expert_tensor: PositiveInt = 1
    """Ranks that share one expert's weights."""
    data: PositiveInt = 1
    """Copies of the model, each trained on a part of the batch."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline is {self.virtual_pipeline}, but pipeline is 1: chunks take turns on the stages of a "
                "pipeline, so set pipeline to at least 2 or virtual_pipeline to 1"
            )
        if self._stage_size % (self.expert * self.expert_tensor):
            raise ValueError(
                f"expert x expert_tensor = {self.expert} x {self.expert_tensor} must divide tensor x context x data = "
                f"{self.tensor} x {self.context} x {self.data}, the ranks of one pipeline stage"
            )
        return self

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self._stage_size * self.pipeline

    def place(self, rank: int) -> RankPlace:
        """Where a rank stands, as Megatron-core numbers them: tensor fastest, then context, data, pipeline.

        The experts are laid over the ranks of a stage by themselves: expert_tensor fastest, then expert.
        """
        assert 0 <= rank < self.world_size, rank
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        expert = rank % self._stage_size // self.expert_tensor % self.expert
        return RankPlace(tensor=tensor, context=context, data=data, pipeline=pipeline, expert=expert)

    def first_ranks(self) -> list[int]:
        """Of each data-parallel copy, in order, the first rank."""
        return [data * self.tensor * self.context for data in range(self.data)]

    def sequence_multiple(self) -> int:
        """What every sequence of a pack is padded to a multiple of: two chunks for each rank that shares it."""
        return 2 * self.context if self.context > 1 else 1

    def pack_multiple(self) -> int:
        """What the tokens of a pack must be a multiple of, so that each rank holds as many of them."""
        return self.tensor * self.sequence_multiple()

    def micro_batch_multiple(self) -> int:
        """What the number of micro-batches must be a multiple of: interleaved stages take so many in turn."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    def describe(self) -> str:
        """The axes that are not 1, for people."""
        axes = (
            "tensor",
            "pipeline",
            "virtual_pipeline",
            "context",
            "expert",
            "expert_tensor",
            "data",
        )
        return (
            " x ".join(f"{axis} {getattr(self, axis)}" for axis in axes if getattr(self, axis) > 1)
            or "one rank"
        )

    @property
    def _stage_size(self) -> int:
        return self.tensor * self.context * self.data
