"""A value head in place of a model's output layer.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.nn import functional

from polyturn.trainer.megatron.logprob_head import LogprobRequest


class ValueHead(torch.nn.Module):
    """One number for each token that is asked for: the value of having read everything before it.

    The value of token t comes from the hidden state at t - 1, from which the policy predicts it. The head is whole on
    every tensor-parallel rank, and all of them compute all values. Set `request` before each forward pass; the output
    is [1, N, 1], float32.
    """

    def __init__(self, model: GPTModel, *, seed: int) -> None:
        """Draw the weight from N(0, 1 / (hidden size + 1)²), the same at any layout, and start the bias at 0."""
        super().__init__()
        config = model.config
        self.request: LogprobRequest | None = None
        self._sequence_parallel = bool(config.sequence_parallel)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, config.hidden_size, generator=generator) / (config.hidden_size + 1)
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda")
        self.weight = torch.nn.Parameter(weight.to(device, config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype, device=device))
        for param in (self.weight, self.bias):
            param.tensor_model_parallel = False  # type: ignore[attr-defined]
            param.partition_dim = -1  # type: ignore[attr-defined]
            param.partition_stride = 1  # type: ignore[attr-defined]

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, **_kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """[T, 1, H], of this rank's tokens under sequence parallelism -> [N, 1, 1]."""
        assert weight is None, "a value head shares no weight with the embedding"
        assert self.request is not None, "the forward pass was not told which tokens to score"
        if self._sequence_parallel:
            # Every rank has the whole gradient: each takes its tokens' part of it.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = hidden.squeeze(1).index_select(0, self.request.rows).float()
        return functional.linear(rows, self.weight.float(), self.bias.float())[:, None], None


def attach_value_head(model: GPTModel, *, seed: int) -> None:
    """Replace the output layer of the last pipeline stage, before anything wraps the model."""
    assert not model.share_embeddings_and_output_weights
    if model.post_process:
        model.output_layer = ValueHead(model, seed=seed)
