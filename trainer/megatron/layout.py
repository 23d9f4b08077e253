"""How the ranks that form one copy of a model share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from megatron.core import parallel_state


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayout:
    """Sizes of Megatron-core's groups; data parallelism, which copies, is none of them."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    """Stages that each pipeline rank holds; None: one, without interleaving."""
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @classmethod
    def current(cls) -> Self:
        """Of the groups that are up."""
        return cls(
            tensor=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
            virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
            context=parallel_state.get_context_parallel_world_size(),
            expert=parallel_state.get_expert_model_parallel_world_size(),
            expert_tensor=parallel_state.get_expert_tensor_parallel_world_size(),
        )
