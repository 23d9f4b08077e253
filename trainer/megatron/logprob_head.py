"""The output layer of a model, asked for logprobs instead of logits.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from polyturn.trainer.megatron.logprobs import Entropy, VocabularySlice, token_logprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobRequest:
    """What one forward pass is asked for."""

    rows: torch.Tensor
    """[N]: positions in the pack whose next token is scored."""
    targets: torch.Tensor
    """[N]: those tokens."""
    temperature: float
    entropy: Entropy = "none"


class LogprobHead:
    """Makes a model's forward pass return logprobs (and entropies) at chosen positions of a pack, never logits.

    Most tokens of a multi-turn episode are observations, whose logits nobody reads, and the logits of the others are
    used up as they are made: see `token_logprobs`. Set `request` before each forward pass. The output is
    [1, N, 1 or 2], float32: logprobs, then entropies; `split_scores` takes it apart.

    A pipeline stage without the output layer needs no head.
    """

    def __init__(self, model: GPTModel, *, vocab_size: int) -> None:
        self.request: LogprobRequest | None = None
        self._layer = model.output_layer
        self._sequence_parallel = bool(model.config.sequence_parallel)
        self._vocab_size = vocab_size
        # The layer is still called as a module, so that hooks that gather its weight run.
        self._layer.forward = self._score

    def _score(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, **_kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """[T, 1, H], of this rank's tokens under sequence parallelism -> [N, 1, 1 or 2]."""
        request = self.request
        assert request is not None, "the forward pass was not told which tokens to score"
        weight = self._layer.weight if weight is None else weight
        # Each rank has the gradient of its columns: the backward pass of either call sums them up.
        if self._sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        logprobs, entropies = token_logprobs(
            hidden.squeeze(1).index_select(0, request.rows),
            weight,
            request.targets,
            columns=vocabulary_slice(weight.size(0), self._vocab_size),
            temperature=request.temperature,
            entropy=request.entropy,
        )
        scores = [logprobs] if entropies is None else [logprobs, entropies]
        return torch.stack(scores, -1)[:, None], None


def vocabulary_slice(num_columns: int, vocab_size: int) -> VocabularySlice:
    """The columns of this tensor-parallel rank, which holds `num_columns` of the padded vocabulary."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * num_columns
    return VocabularySlice(
        first=first,
        num_real=min(max(vocab_size - first, 0), num_columns),
        group=parallel_state.get_tensor_model_parallel_group() if size > 1 else None,
    )


def split_scores(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output of a model with a `LogprobHead` -> logprobs [N] and, where they were asked for, entropies [N]."""
    columns = scores.squeeze(0).unbind(-1)
    return columns[0], columns[1] if len(columns) > 1 else None
