"""Weight sync by tensors that trainer and engine both reach: on one GPU by a handle, on one host's CPU by value.

For engines that share the trainer's GPUs (`engines.placement: shared`) nothing has to be sent: every rank has each
weight whole after it was gathered, and an engine's rank opens that of the trainer's rank on its own GPU (CUDA IPC).
On a CPU the values themselves go to the engine, over loopback: SGLang shares descriptors of shared memory between
processes of one parent alone, and an engine that is given another's dies.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from polyturn.rollout.engines.checksums import EngineChecksums
from polyturn.trainer.weight_sync import SyncReport, WeightSyncError
from polyturn.trainer.weight_sync.buckets import Bucket, make_buckets
from polyturn.trainer.weight_sync.engine_calls import EngineCalls
from polyturn.trainer.weight_sync.tally import Tally


class Carrier(Protocol):
    """How a bucket gets from a trainer's rank to an engine's."""

    load_format: str | None
    """How SGLang is to read it."""

    def payloads(self, bucket: Bucket) -> list[str]:
        """What each rank of the trainer has for the engines, base64; all ranks call it, and rank 0 gets all."""
        ...

    def release(self) -> None:
        """All ranks: the engines have loaded the bucket, and its memory may be used for other things."""
        ...


class ByValue:
    """The bytes of CPU tensors."""

    load_format: str | None = None

    def payloads(self, bucket: Bucket) -> list[str]:
        # A view would take all of the memory that it is a view of along.
        values = [
            (name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format))
            for name, tensor in bucket
        ]
        return [base64.b64encode(pickle.dumps(values)).decode()]

    def release(self) -> None: ...


class ByHandle:
    """CUDA IPC handles of flattened buckets: the trainer's rank r gives one to what shares its GPU."""

    load_format: str | None = "flattened_bucket"

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group`: of all ranks of the trainer, on the CPU."""
        self._group = group
        self._held: object = None

    def payloads(self, bucket: Bucket) -> list[str]:
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        # Devices are named by their UUID: each process counts those that it sees from 0.
        monkey_patch_torch_reductions()
        flat = FlattenedTensorBucket(
            named_tensors=[(name, tensor.detach().contiguous()) for name, tensor in bucket]
        )
        content = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
        self._held = content
        mine: str = MultiprocessingSerializer.serialize(content, output_str=True)
        every: list[str] = [""] * self._group.size()
        dist.all_gather_object(every, mine, group=self._group)
        return every

    def release(self) -> None:
        dist.barrier(group=self._group)
        self._held = None


class TensorPublisher:
    """Publishes to engines on the trainer's own GPUs, or on its host's CPU.

    With `ByHandle` every rank of the trainer has one, and only rank 0's has engines.
    """

    def __init__(
        self,
        *,
        carrier: Carrier,
        tensor_parallel: int,
        bucket_bytes: int,
        timeout_s: float,
        new_checksums: Callable[[], EngineChecksums] | None,
        flush_cache: bool = True,
    ) -> None:
        """`tensor_parallel`: ranks of each engine."""
        self._carrier = carrier
        self._tensor_parallel = tensor_parallel
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._new_checksums = new_checksums
        self._flush_cache = flush_cache
        self._engines = EngineCalls([], timeout_s=timeout_s)
        self._prepared: tuple[Iterable[tuple[str, torch.Tensor]], int] | None = None

    def set_engines(self, urls: Sequence[str]) -> None:
        """In the order of their places: see `share_of_engine`; and see `WeightPublisher.set_engines`."""
        self._engines.close()
        self._engines = EngineCalls(urls, timeout_s=self._timeout_s)

    def prepare(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Nothing is sent while engines serve: they load at once what they are given."""
        self._prepared = (named_tensors, version)

    def activate(self) -> SyncReport:
        """Have every engine load every bucket; see `WeightPublisher.activate`."""
        assert self._prepared is not None, "prepare comes first"
        (named_tensors, version), self._prepared = self._prepared, None
        started = time.perf_counter()
        tally = Tally(self._new_checksums if len(self._engines) else None)
        failure: WeightSyncError | None = None
        try:
            self._engines.begin_update(version)
        except WeightSyncError as fault:
            failure = fault
        for bucket in make_buckets(named_tensors, bucket_bytes=self._bucket_bytes):
            # The other ranks go through all buckets, whatever becomes of the engines.
            payloads = self._carrier.payloads(bucket)
            for name, tensor in bucket:
                tally.add(name, tensor)
            if failure is None:
                failure = self._load(payloads)
            self._carrier.release()
        if failure is not None:
            raise failure
        self._engines.end_update(version)
        seconds = time.perf_counter() - started
        return tally.report(version=version, seconds=seconds, pause_seconds=seconds)

    def _load(self, payloads: Sequence[str]) -> WeightSyncError | None:
        """Have every engine load its share of a bucket; what went wrong."""
        shares = {
            url: share_of_engine(payloads, index, tensor_parallel=self._tensor_parallel)
            for index, url in enumerate(self._engines.urls)
        }
        try:
            self._engines.ask(
                lambda engine: engine.update_weights_from_tensor(
                    serialized=shares[engine.url],
                    load_format=self._carrier.load_format,
                    flush_cache=self._flush_cache,
                ),
                doing="take a bucket of weights",
            )
        except WeightSyncError as fault:
            return fault
        return None

    def close(self) -> None:
        """Nothing is held open."""
        self._engines.close()


def share_of_engine(payloads: Sequence[str], index: int, *, tensor_parallel: int) -> list[str]:
    """What the engine of a number is given, one for each of its ranks.

    Engines and the trainer's ranks lie on the same GPUs in the same order: rank t of engine e where the trainer's rank
    e · tensor_parallel + t is. One payload for all is one by value.
    """
    if len(payloads) == 1:
        return list(payloads) * tensor_parallel
    return list(payloads[index * tensor_parallel : (index + 1) * tensor_parallel])
