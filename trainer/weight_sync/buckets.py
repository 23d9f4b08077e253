"""Tensors gathered into buckets, and buckets flattened into memory that is used again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

Bucket = list[tuple[str, torch.Tensor]]


def make_buckets(named_tensors: Iterable[tuple[str, torch.Tensor]], *, bucket_bytes: int) -> Iterator[Bucket]:
    """Group tensors in order, at most `bucket_bytes` a bucket; a larger tensor has a bucket of its own.

    Tensors of one bucket have one dtype, so that each begins at an aligned offset of the flat bytes; a bucket of each
    dtype is filled at a time, so that scales and norms between matrices do not cut the matrices' short.
    """
    open_buckets: dict[torch.dtype, Bucket] = {}
    sizes: dict[torch.dtype, int] = {}
    for name, tensor in named_tensors:
        num_bytes = size_of(tensor)
        bucket = open_buckets.setdefault(tensor.dtype, [])
        if bucket and sizes[tensor.dtype] + num_bytes > bucket_bytes:
            yield open_buckets.pop(tensor.dtype)
            bucket = open_buckets.setdefault(tensor.dtype, [])
        sizes[tensor.dtype] = num_bytes + (sizes[tensor.dtype] if bucket else 0)
        bucket.append((name, tensor))
    yield from open_buckets.values()


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatBucket:
    """A bucket as engines receive it: the bytes of its tensors one behind the other."""

    data: torch.Tensor
    """uint8, [bytes]."""
    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]


class Flattener:
    """Flattens buckets into two stretches of memory by turns, so that one can be filled while the other is sent.

    A bucket is to be sent before the next but one is flattened.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self._turn = 0

    @property
    def held_bytes(self) -> int:
        """Of both stretches."""
        return sum(len(buffer) for buffer in self._buffers)

    def flatten(self, bucket: Bucket) -> FlatBucket:
        """A bucket's bytes in order; of a single tensor they are its own, which then must not change meanwhile."""
        parts = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in bucket]
        return FlatBucket(
            data=parts[0] if len(parts) == 1 else self._copy(parts),
            names=[name for name, _ in bucket],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            shapes=[list(tensor.shape) for _, tensor in bucket],
        )

    def _copy(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        num_bytes = sum(map(len, parts))
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        if len(buffer) < num_bytes or buffer.device != parts[0].device:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=parts[0].device)
            self._buffers[self._turn] = buffer
        return torch.cat(list(parts), out=buffer[:num_bytes])
