"""A rank's state in its host's memory while somebody else uses its GPU, and back, bit for bit.

What is moved is the memory behind tensors, not the tensors: a storage is copied to the host and resized to nothing, and
later resized and filled again. So every view of it (a parameter in its bucket, the optimizer's shard of a parameter, a
hook's reference) is what it was. Megatron-core's own `offload_to_cpu` of an optimizer replaces the tensors instead,
which in float32 parts the optimizer's shards from the weights that they are views of: the model would not be trained
any more. That of its buffers pins memory, which needs a GPU, and is all that it moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from polyturn.trainer.megatron.engine import Engine

StatePart = Literal["weights", "training"]
"""The weights that the model computes with; or what trains them: gradients and the state of the optimizer."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Away:
    """A storage that has no memory on its device."""

    storage: torch.UntypedStorage
    num_bytes: int
    host: torch.Tensor | None
    """Its bytes; None: they are not kept, and it comes back as zeros."""


class OffloadedState:
    """The state of a rank's engines, of which parts are away from the device. Nothing is moved twice."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = list(engines)
        self._device = self._engines[0].device.type
        self._away: dict[StatePart, list[_Away]] = {}
        self._spare: dict[tuple[StatePart, int], torch.Tensor] = {}
        """Pinned memory of earlier turns, which takes long to get, by part and place in it."""

    @torch.no_grad()
    def offload(self, part: StatePart) -> int:
        """Free the device of a part, between updates: gradients are dropped; the bytes that went to the host."""
        if part in self._away:
            return 0
        away = self._away[part] = []
        kept = self._storages(self._weights())
        if part == "training":
            for storage in self._storages(self._gradients()).values():
                away.append(_Away(storage=storage, num_bytes=storage.nbytes(), host=None))
            # In float32 the optimizer's weights are the model's.
            weights, state = kept, self._storages(self._optimizer_state())
            kept = {address: state[address] for address in state if address not in weights}
        for storage in kept.values():
            host = self._host_memory(part, len(away), storage)
            host.copy_(_bytes_of(storage), non_blocking=True)
            away.append(_Away(storage=storage, num_bytes=storage.nbytes(), host=host))
        self._wait_for_copies()
        for item in away:
            item.storage.resize_(0)
        if self._device == "cuda":
            torch.cuda.empty_cache()
        return sum(item.num_bytes for item in away if item.host is not None)

    @torch.no_grad()
    def reload(self) -> None:
        """Take back all that is away; gradients are zero."""
        for part in list(self._away):
            away = self._away[part]
            for index, item in enumerate(away):
                item.storage.resize_(item.num_bytes)
                if item.host is None:
                    _bytes_of(item.storage).zero_()
                    continue
                _bytes_of(item.storage).copy_(item.host, non_blocking=True)
                if item.host.is_pinned():
                    self._spare[part, index] = item.host
            self._wait_for_copies()
            del self._away[part]

    @property
    def is_away(self) -> bool:
        """Whether anything is."""
        return bool(self._away)

    def _host_memory(self, part: StatePart, index: int, storage: torch.UntypedStorage) -> torch.Tensor:
        spare = self._spare.pop((part, index), None)
        if spare is not None and spare.numel() == storage.nbytes():
            return spare
        return torch.empty(
            storage.nbytes(), dtype=torch.uint8, pin_memory=self._device == "cuda", device="cpu"
        )

    def _wait_for_copies(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _storages(self, tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
        """By its address each storage that has memory on the device; what is in a host's memory anyway stays there."""
        storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == self._device)
        return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}

    def _weights(self) -> Iterator[torch.Tensor]:
        """The model's, trained or frozen."""
        for engine in self._engines:
            for buffer in engine.grad_buffers:
                if buffer.param_data is not None:
                    yield buffer.param_data
            for chunk in engine.chunks:
                yield from chunk.parameters()

    def _gradients(self) -> Iterator[torch.Tensor]:
        for engine in self._engines:
            # The optimizer's shards refer to them.
            if engine.optimizer is not None:
                engine.optimizer.zero_grad()
            yield from (buffer.grad_data for buffer in engine.grad_buffers)

    def _optimizer_state(self) -> Iterator[torch.Tensor]:
        for engine in self._engines:
            for optimizer in engine.optimizers:
                inner = getattr(optimizer, "optimizer", None)
                if inner is None:
                    continue
                for group in inner.param_groups:
                    yield from group["params"]
                for state in inner.state.values():
                    yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload, no-any-return]
