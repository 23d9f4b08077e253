"""How much memory the results of torch's operations held at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldBytes(TorchDispatchMode):
    """The most bytes that results of torch's operations held at once, each storage counted once."""

    def __init__(self, *, without: Iterable[torch.Tensor] = ()) -> None:
        """`without`: tensors whose memory was there before, of which results may be views."""
        super().__init__()
        self._held: list[weakref.ref[torch.Tensor]] = []
        self._without = {tensor.untyped_storage().data_ptr() for tensor in without}
        self.highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._held += [weakref.ref(each) for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        alive = [tensor for held in self._held if (tensor := held()) is not None]
        self._held = [weakref.ref(tensor) for tensor in alive]
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in alive)}
        held = sum(storage.nbytes() for at, storage in storages.items() if at not in self._without)
        self.highest = max(self.highest, held)
        return result
