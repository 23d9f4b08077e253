"""The frozen reference policy that a KL penalty compares with.

It has no model of its own: its weights wait on the CPU and change places with the policy's for as long as they are
needed, one tensor at a time. With LoRA there is nothing to keep: the reference is the policy without its adapters.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from polyturn.trainer.megatron.lora import BaseWeights, adapters_off


class Reference:
    """The reference's weights of this rank. Starts as what the models hold when it is made."""

    def __init__(self, models: Sequence[GPTModel], *, keep_weights: bool = True) -> None:
        """`keep_weights=False`: the policy's own base weights, which then must be frozen, without its adapters."""
        self._models = models
        self._waiting: list[torch.Tensor] = []
        if keep_weights:
            self._waiting = [_on_cpu(param) for param in self._params()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The models are the reference for as long as the context lasts, then bitwise what they were."""
        with adapters_off(self._models):
            self._swap()
            try:
                yield
            finally:
                self._swap()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the policy as it is for the reference from now on."""
        assert self._waiting, "with adapters the reference is the base model"
        for waiting, param in zip(self._waiting, self._params(), strict=True):
            waiting.copy_(param)

    @torch.no_grad()
    def _swap(self) -> None:
        if not self._waiting:
            return
        for waiting, param in zip(self._waiting, self._params(), strict=True):
            present = param.detach().clone()
            param.copy_(waiting)
            waiting.copy_(present)

    def _params(self) -> list[torch.Tensor]:
        return [param for model in self._models for _, param in BaseWeights(model).named_parameters()]


def _on_cpu(param: torch.Tensor) -> torch.Tensor:
    copy = param.detach().cpu().clone()
    # Pinned memory is what a GPU reads and writes at full speed.
    return copy.pin_memory() if param.is_cuda else copy
