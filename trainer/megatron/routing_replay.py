"""Routing replay (R3, arXiv 2510.11370): the trainer's routers choose the experts that the engine chose.

A mixture of experts amplifies what rounding leaves between engine and trainer: a token that is sent elsewhere gets
another logprob. Here the choice is taken from the engine's record, token by token and layer by layer; the weights of
the chosen experts are the trainer's own, with their gradients. Tokens without a record (the last one of a sample, what
an aborted request left) are routed by the trainer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter


class RoutingReplay:
    """Tells the routers of one rank what to choose. `begin` before each forward pass of a chunk."""

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        """Take the place of Megatron-core's own replay in every router.

        Raises:
            ValueError: the model has no experts, or its routing cannot be replayed.
        """
        config = chunks[0].config
        if config.num_moe_experts is None:
            raise ValueError("engines.routing_replay is on, but the model has no experts; turn it off")
        if config.moe_router_fusion:
            raise ValueError(
                "engines.routing_replay does not go with megatron.moe_router_fusion; turn one off"
            )
        self._num_layers, self._top_k = config.num_layers, config.moe_router_topk
        self._sequence_parallel = bool(config.sequence_parallel)
        self.record: torch.Tensor | None = None
        """[tokens of this rank, layers, experts per token] of the forward pass under way; -1 where there is none."""
        self.keeps_for_recomputation = False
        self._layers: list[_LayerReplay] = []
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    assert module.layer_number is not None
                    layer = _LayerReplay(self, module.layer_number - 1)
                    module.router_replay = layer
                    self._layers.append(layer)

    def begin(self, record: torch.Tensor | None) -> None:
        """What the next forward pass replays.

        Args:
            record: [tokens that this context-parallel rank holds, layers x experts per token]; None: nothing.

        Raises:
            ValueError: it was recorded with another model.
        """
        self.keeps_for_recomputation = torch.is_grad_enabled()
        self.record = None
        if record is None:
            return
        if record.size(1) != self._num_layers * self._top_k:
            raise ValueError(
                f"the engine recorded {record.size(1)} experts of a token, but {self._num_layers} layers with "
                f"{self._top_k} each are {self._num_layers * self._top_k}: it runs another model"
            )
        if self._sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            record = record.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        self.record = record.view(-1, self._num_layers, self._top_k)

    def clear(self) -> None:
        """Forget what recomputations would have asked for, before a new update."""
        for layer in self._layers:
            layer.waiting.clear()


class _LayerReplay:
    """One router's part, in the form of Megatron-core's `RouterReplay`."""

    def __init__(self, owner: RoutingReplay, layer: int) -> None:
        self._owner = owner
        self._layer = layer
        self.waiting: deque[torch.Tensor | None] = deque()
        """Records of forward passes that will be repeated for their gradients, in the order of the micro-batches."""

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and indices [tokens, k] of the experts to use, given the scores [tokens, experts]."""
        assert default_compute_topk is not None
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        record = self._take()
        if record is None:
            return values, own
        recorded = record[:, self._layer].long()
        assert recorded.shape == own.shape, f"a record of shape {recorded.shape} for choices of {own.shape}"
        known = (recorded >= 0).all(-1, keepdim=True)
        indices = torch.where(known, recorded, own)
        return scores.gather(1, indices), indices

    def _take(self) -> torch.Tensor | None:
        """The record of the micro-batch that this call is about.

        A layer whose activations are recomputed is run twice: first without gradients, when its micro-batch comes, then
        with them, in the order of the micro-batches but maybe after later ones have come.
        """
        owner = self._owner
        if not owner.keeps_for_recomputation:
            return owner.record
        if torch.is_grad_enabled():
            return self.waiting.popleft() if self.waiting else owner.record
        self.waiting.append(owner.record)
        return owner.record
