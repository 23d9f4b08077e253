"""Buckets of weights through a process group of NCCL (gloo on a CPU), as a weight sync sends them: what arrives has the
same bytes, and how fast it comes.

Two ranks where there are two GPUs. NCCL refuses two ranks on one GPU, so with one the group has one rank: that NCCL
starts, that buckets are laid flat and apart on the GPU, and the checksums; no transfer.
"""

from __future__ import annotations

import multiprocessing
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_check.parts import Device, Failure
from benchmarks.gpu_check.timing import wait
from polyturn.rollout.engines.checksums import cuda_tensor_hash
from polyturn.rollout.engines.placement import free_port
from polyturn.trainer.weight_sync.broadcast import make_buckets
from polyturn.trainer.weight_sync.process_group import join_process_group

ADDRESS = "127.0.0.1"
SIZES = {"cuda": (64, 2**25, 2**29), "cpu": (6, 1000, 2**13)}
"""Tensors, numbers of each in bfloat16, bytes of a bucket."""
HASHED = 3
"""Tensors whose hashes on this device and on the CPU are compared."""


def run(device: Device) -> dict[str, Any]:
    ranks = 2 if device == "cpu" else min(torch.cuda.device_count(), 2)
    port = free_port(ADDRESS)
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    ends: list[tuple[Connection, Any]] = []
    for rank in range(1, ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_receive, args=(device, rank, ranks, port, theirs), daemon=True)
        process.start()
        ends.append((ours, process))
    hashes, seconds, num_bytes = _exchange(device, 0, ranks, port)
    received = [pipe.recv() for pipe, _ in ends]
    for _, process in ends:
        process.join()
    figures: dict[str, Any] = {
        "ranks": ranks,
        "gigabytes": num_bytes / 1e9,
        "gigabytes_per_s": num_bytes / 1e9 / seconds,
    }
    tensors = _tensors(device, 0)[:HASHED]
    if any(cuda_tensor_hash(tensor.cpu()) != hashes[index] for index, tensor in enumerate(tensors)):
        raise Failure("the checksum of a tensor is another one on this device", **figures)
    if any(other != hashes for other in received):
        raise Failure("what arrived is not what was sent", **figures)
    if ranks == 1:
        figures["transfer"] = "one GPU: nothing was sent to another"
    return figures


def _receive(device: Device, rank: int, ranks: int, port: int, pipe: Connection) -> None:
    pipe.send(_exchange(device, rank, ranks, port)[0])


def _exchange(device: Device, rank: int, ranks: int, port: int) -> tuple[list[int], float, int]:
    """Send as rank 0, or receive: the hashes of all tensors, seconds and bytes."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    group = join_process_group(
        address=ADDRESS,
        port=port,
        world_size=ranks,
        rank=rank,
        name="gpu-check",
        backend="nccl" if device == "cuda" else "gloo",
        timeout=timedelta(seconds=30),
    )
    tensors = _tensors(device, rank)
    # The first collective sets up NCCL's channels.
    dist.broadcast(torch.zeros(1, device=device), src=0, group=group)
    wait(device)
    started, num_bytes = time.perf_counter(), 0
    named = [(str(index), tensor) for index, tensor in enumerate(tensors)]
    for bucket in make_buckets(named, bucket_bytes=SIZES[device][2]):
        flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
        dist.broadcast(flat, src=0, group=group)
        parts = flat.split([tensor.numel() * tensor.element_size() for _, tensor in bucket])
        for (_, tensor), part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view(tensor.dtype).view_as(tensor))
        num_bytes += flat.numel()
    wait(device)
    seconds = time.perf_counter() - started
    hashes = [cuda_tensor_hash(tensor) for tensor in tensors]
    dist.destroy_process_group(group)
    return hashes, seconds, num_bytes


def _tensors(device: Device, rank: int) -> list[torch.Tensor]:
    count, numel, _ = SIZES[device]
    generator = torch.Generator(device).manual_seed(0)
    filled = [
        torch.randn(numel // 8, 8, device=device, generator=generator).to(torch.bfloat16)
        for _ in range(count)
    ]
    return filled if rank == 0 else [torch.zeros_like(tensor) for tensor in filled]
