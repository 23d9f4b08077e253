"""Tensors gathered into buckets of bytes, in memory that is used again for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
        num_bytes = tensor.numel() * tensor.element_size()
        bucket = open_buckets.setdefault(tensor.dtype, [])
        if bucket and sizes[tensor.dtype] + num_bytes > bucket_bytes:
            yield open_buckets.pop(tensor.dtype)
            bucket = open_buckets.setdefault(tensor.dtype, [])
        sizes[tensor.dtype] = num_bytes + (sizes[tensor.dtype] if bucket else 0)
        bucket.append((name, tensor))
    yield from open_buckets.values()
