"""Logprobs and entropies of tokens from logits that are split over the vocabulary.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits worked on at a time: on a CPU what fits its cache, on a GPU what keeps temporary memory small."""


class _TokenLogprobs(torch.autograd.Function):
    """logits [N, V of this rank] float32 -> logprobs [N], entropies [N]. Destroys the logits, to save their memory.

    With p = softmax(z): d logp_t / dz = [target] - p, and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        first: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        peak = logits.amax(-1)
        if group is not None:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        here = (targets >= first) & (targets < first + logits.size(-1))
        columns = torch.where(here, targets - first, 0)
        chosen = torch.where(here, logits.gather(1, columns[:, None]).squeeze(1) - peak, 0.0)
        total, weighted = torch.empty_like(peak), torch.empty_like(peak)
        for rows in _row_chunks(logits):
            shifted = logits[rows].sub_(peak[rows, None])
            exponentials = shifted.exp()
            total[rows] = exponentials.sum(-1)
            weighted[rows] = torch.linalg.vecdot(exponentials, shifted)
            shifted.copy_(exponentials)
        if group is not None:
            sums = torch.stack([chosen, total, weighted])
            dist.all_reduce(sums, group=group)
            chosen, total, weighted = sums.unbind()
        log_total = total.log()
        entropies = log_total - weighted / total
        ctx.exponentials = logits
        ctx.save_for_backward(columns, here, total, entropies)
        ctx.set_materialize_grads(False)
        return chosen - log_total, entropies

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None]:
        columns, here, total, entropies = ctx.saved_tensors
        # The exponentials become the gradient in place, so there is one backward pass.
        grad, ctx.exponentials = ctx.exponentials, None
        assert grad is not None, "a second backward pass through the same logits"
        from_logprobs = torch.zeros_like(total) if grad_logprobs is None else grad_logprobs
        for rows in _row_chunks(grad):
            probabilities = grad[rows].div_(total[rows, None])
            scale = -from_logprobs[rows, None]
            if grad_entropies is not None:
                # xlogy: a probability of 0 has no part in the entropy.
                from_entropy = torch.special.xlogy(probabilities, probabilities)
                from_entropy.addcmul_(probabilities, entropies[rows, None]).mul_(grad_entropies[rows, None])
                probabilities.mul_(scale).sub_(from_entropy)
            else:
                probabilities.mul_(scale)
        grad.scatter_add_(1, columns[:, None], torch.where(here, from_logprobs, 0.0)[:, None])
        return grad, None, None, None


def _row_chunks(logits: torch.Tensor) -> Iterator[slice]:
    num_rows = max(CHUNK_ELEMENTS[logits.device.type] // logits.size(-1), 1)
    for start in range(0, logits.size(0), num_rows):
        yield slice(start, start + num_rows)


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, *, vocab_size: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies [N], float32, of the softmax of logits / temperature.

    Args:
        logits: [N, V'], this tensor-parallel rank's columns of the padded vocabulary, of any float dtype. Destroyed.
        targets: [N] token ids.
        vocab_size: the columns behind it are padding and take no part.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * logits.size(-1)
    num_real = min(logits.size(-1), vocab_size - first)
    assert num_real > 0, "a rank without a column of the vocabulary"
    scaled = logits[:, :num_real].float()
    if temperature != 1.0:
        scaled = scaled / temperature
    group = parallel_state.get_tensor_model_parallel_group() if size > 1 else None
    return _TokenLogprobs.apply(scaled, targets, first, group)
