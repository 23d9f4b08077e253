"""Weight sync by process-group broadcast, in buckets.

Rank 0 of the trainer and every rank of every engine share one process group. A bucket is one flat tensor of bytes:
the engines are told the names, types and shapes by HTTP and receive the bytes by broadcast.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from polyturn.rollout.engines.checksums import EngineChecksums
from polyturn.rollout.engines.control import EngineControl
from polyturn.trainer.weight_sync import SyncReport, WeightSyncError
from polyturn.trainer.weight_sync.process_group import join_process_group

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


class BroadcastPublisher:
    """Publishes to engines that are reachable by HTTP and by a process group."""

    def __init__(
        self,
        *,
        engines: Sequence[EngineControl],
        tensor_parallel: int,
        address: str,
        port: int,
        backend: str,
        bucket_bytes: int,
        timeout_s: float,
        new_checksums: Callable[[], EngineChecksums],
        flush_cache: bool = True,
    ) -> None:
        """Join the group with all engines.

        Args:
            tensor_parallel: Ranks of each engine.
            address: With `port`, where rank 0 hosts the group's store.
            backend: "gloo" or "nccl".
            bucket_bytes: The most that is sent at once, unless one tensor is larger.
            timeout_s: Of each broadcast and each reply.
            new_checksums: Makes what computes the checksums of one update.
            flush_cache: Whether the engines drop the KV that the old weights made.
        """
        self._engines = engines
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._new_checksums = new_checksums
        self._flush_cache = flush_cache
        # A name of its own per trainer process: an engine remembers the names of groups whose trainer has died.
        self._name = f"polyturn-{uuid.uuid4().hex[:12]}"
        self._threads = ThreadPoolExecutor(max_workers=len(engines), thread_name_prefix="weight-sync")
        world_size = 1 + len(engines) * tensor_parallel

        def join(engine: EngineControl, index: int) -> None:
            engine.init_weights_update_group(
                master_address=address,
                master_port=port,
                rank_offset=1 + index * tensor_parallel,
                world_size=world_size,
                group_name=self._name,
                backend=backend,
            )

        joins = [self._threads.submit(join, engine, index) for index, engine in enumerate(engines)]
        self._group = join_process_group(
            address=address,
            port=port,
            world_size=world_size,
            rank=0,
            name=self._name,
            backend=backend,
            timeout=timedelta(seconds=timeout_s),
        )
        for future in joins:
            future.result(timeout=timeout_s)

    def publish(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> SyncReport:
        """Send every tensor inside one begin/end update; see `WeightPublisher.publish`."""
        started = time.perf_counter()
        checksums = self._new_checksums()
        num_tensors = num_bytes = 0
        # The reply to `begin` is read before anything is broadcast: an engine that refuses would never receive.
        self._on_all(lambda engine: engine.begin_weight_update())
        for bucket in make_buckets(named_tensors, bucket_bytes=self._bucket_bytes):
            self._send(bucket, version=version)
            for name, tensor in bucket:
                checksums.add(name, tensor)
                num_tensors += 1
                num_bytes += tensor.numel() * tensor.element_size()
        self._on_all(lambda engine: engine.end_weight_update())
        return SyncReport(
            version=version,
            num_tensors=num_tensors,
            num_bytes=num_bytes,
            seconds=time.perf_counter() - started,
            checksums=checksums.finish(),
        )

    def close(self) -> None:
        """Leave the group on both sides."""
        self._on_all(lambda engine: engine.destroy_weights_update_group(self._name))
        dist.destroy_process_group(self._group)
        self._threads.shutdown()

    def _send(self, bucket: Bucket, *, version: int) -> None:
        flat = torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for _, tensor in bucket])
        replies = [
            self._threads.submit(
                engine.update_weights_from_distributed,
                names=[name for name, _ in bucket],
                dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                shapes=[list(tensor.shape) for _, tensor in bucket],
                group_name=self._name,
                weight_version=version,
                flush_cache=self._flush_cache,
            )
            for engine in self._engines
        ]
        work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        assert work is not None
        self._await_broadcast(work, replies)
        for reply in replies:
            reply.result(timeout=self._timeout_s)

    def _await_broadcast(self, work: dist.Work, replies: Sequence[Future[Any]]) -> None:
        """Wait for the broadcast, but not for an engine that has already refused it."""
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            for reply in replies:
                if reply.done() and (fault := reply.exception()) is not None:
                    raise WeightSyncError(f"an engine refused a weight update: {fault}") from fault
            if time.monotonic() > deadline:
                raise WeightSyncError(f"the weight broadcast did not finish within {self._timeout_s:g} s")
            time.sleep(0.0005)
        work.wait()

    def _on_all(self, call: Callable[[EngineControl], Any]) -> None:
        futures = [self._threads.submit(call, engine) for engine in self._engines]
        for future in futures:
            future.result(timeout=self._timeout_s)
