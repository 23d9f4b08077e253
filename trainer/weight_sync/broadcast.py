"""Weight sync by process-group broadcast, in buckets.

Rank 0 of the trainer and every rank of every engine share one process group. A bucket is one flat tensor of bytes:
the engines are told the names, types and shapes by HTTP and receive the bytes by broadcast. An engine loads a bucket
as soon as it has it, so all of this is done while engines rest; the next bucket is gathered while one is under way.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from polyturn.rollout.engines.checksums import EngineChecksums
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.placement import free_port
from polyturn.trainer.weight_sync import SyncReport, WeightSyncError
from polyturn.trainer.weight_sync.buckets import FlatBucket, Flattener, make_buckets
from polyturn.trainer.weight_sync.engine_calls import BEGIN, EngineCalls, failed, faults_of
from polyturn.trainer.weight_sync.process_group import join_process_group
from polyturn.trainer.weight_sync.tally import Tally, TallyBeside

HELD_BYTES = {"gloo": 1 << 30, "nccl": 0}
"""Of tensors that wait to be summed up: on a CPU that takes longer than to send them, on a GPU no time to speak of."""
LEAVE_S = 2.0
"""How long an engine that does not remain has to leave a group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sending:
    """A bucket under way."""

    flat: FlatBucket
    """Held until it has arrived."""
    work: dist.Work
    replies: Mapping[str, Future[Any]]


class BroadcastPublisher:
    """Publishes to engines that are reachable by HTTP and by a process group."""

    def __init__(
        self,
        *,
        tensor_parallel: int,
        address: str,
        backend: str,
        bucket_bytes: int,
        timeout_s: float,
        hung_after_s: float,
        new_checksums: Callable[[], EngineChecksums] | None,
        flush_cache: bool = True,
    ) -> None:
        """It has no engines until it is told of some.

        Args:
            tensor_parallel: Ranks of each engine.
            address: Where rank 0 hosts the group's store.
            backend: "gloo" or "nccl".
            bucket_bytes: The most that is sent at once, unless one tensor is larger.
            timeout_s: Of each broadcast and each reply.
            hung_after_s: The same once an update has gone through, or ten times what it took then; see `Patience`.
            new_checksums: Makes what computes the checksums of one update; None: nobody asks for them.
            flush_cache: Whether the engines drop the KV that the old weights made.
        """
        self._tensor_parallel = tensor_parallel
        self._address = address
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._hung_after_s = hung_after_s
        self._new_checksums = new_checksums
        self._flush_cache = flush_cache
        self._flattener = Flattener()
        self._engines = EngineCalls([], timeout_s=timeout_s)
        self._group: dist.ProcessGroup | None = None
        self._name = ""
        self._prepared: tuple[Iterable[tuple[str, torch.Tensor]], int] | None = None

    def set_engines(self, urls: Sequence[str]) -> None:
        """Leave the group with the engines of before, and join one with these; see `WeightPublisher.set_engines`."""
        self._leave(remaining=urls)
        self._engines = EngineCalls(urls, timeout_s=self._timeout_s, hung_after_s=self._hung_after_s)
        # A name of its own each time: an engine remembers the names of groups whose trainer has died.
        self._name = f"polyturn-{uuid.uuid4().hex[:12]}"
        world_size = 1 + len(urls) * self._tensor_parallel
        offsets = {url: 1 + index * self._tensor_parallel for index, url in enumerate(urls)}
        port = free_port(self._address)

        def join(engine: EngineControl) -> None:
            engine.init_weights_update_group(
                master_address=self._address,
                master_port=port,
                rank_offset=offsets[engine.url],
                world_size=world_size,
                group_name=self._name,
                backend=self._backend,
            )

        joins = self._engines.start(join)
        try:
            self._group = join_process_group(
                address=self._address,
                port=port,
                world_size=world_size,
                rank=0,
                name=self._name,
                backend=self._backend,
                timeout=timedelta(seconds=self._timeout_s),
            )
        except dist.DistError as fault:
            failures = faults_of(joins) or dict.fromkeys(urls, "did not join in time")
            raise failed(failures, doing=f"join the trainer at {self._address}:{port}") from fault
        self._engines.answers(joins, doing=f"join the trainer at {self._address}:{port}")

    def prepare(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Nothing can be sent to engines that serve: they load at once what they receive."""
        self._prepared = (named_tensors, version)

    def activate(self) -> SyncReport:
        """Send every tensor inside one begin/end update; see `WeightPublisher.activate`."""
        assert self._prepared is not None, "prepare comes first"
        (named_tensors, version), self._prepared = self._prepared, None
        started = time.perf_counter()
        tally = Tally(self._new_checksums)
        begun = self._engines.start_update(version)
        under_way: _Sending | None = None
        with TallyBeside(tally, held_bytes=HELD_BYTES[self._backend]) as beside:
            for bucket in make_buckets(named_tensors, bucket_bytes=self._bucket_bytes):
                # While the engines take the bucket before.
                flat = self._flattener.flatten(bucket)
                beside.add(bucket)
                if under_way is None:
                    # Read before anything is broadcast: an engine that refuses would never receive.
                    self._engines.answers(begun, doing=BEGIN)
                else:
                    self._finish(under_way)
                under_way = self._start(flat)
            assert under_way is not None, "a model has tensors"
            self._finish(under_way)
            self._engines.end_update(version)
            seconds = time.perf_counter() - started
            # Both sides at once.
            sums = self._engines.start_sums() if self._new_checksums else {}
            beside.finish()
        served = self._engines.sums(sums)
        report = tally.report(version=version, seconds=seconds, pause_seconds=time.perf_counter() - started)
        return replace(report, served=served)

    def close(self) -> None:
        """Leave the group on both sides."""
        self._leave(remaining=self._engines.urls)

    def _start(self, flat: FlatBucket) -> _Sending:
        """Begin to send a bucket."""
        replies = self._engines.start(
            lambda engine: engine.update_weights_from_distributed(
                names=flat.names,
                dtypes=flat.dtypes,
                shapes=flat.shapes,
                group_name=self._name,
                flush_cache=self._flush_cache,
            )
        )
        work = dist.broadcast(flat.data, src=0, group=self._group, async_op=True)
        assert work is not None
        return _Sending(flat=flat, work=work, replies=replies)

    def _finish(self, sending: _Sending) -> None:
        """Wait until every engine has loaded the bucket, but not for a broadcast that an engine has refused."""
        doing = "take a bucket of weights"
        within_s = self._engines.patience.seconds
        deadline = time.monotonic() + within_s
        with self._engines.patience.noting():
            while not sending.work.is_completed():
                if failures := faults_of(sending.replies):
                    raise failed(failures, doing=doing)
                if time.monotonic() > deadline:
                    silent = [url for url, reply in sending.replies.items() if not reply.done()]
                    answer = f"the broadcast did not finish within {within_s:g} s"
                    raise failed(dict.fromkeys(silent, answer), doing=doing)
                time.sleep(0.0005)
        try:
            sending.work.wait()
        except RuntimeError as fault:
            # The group says that it broke, and not by whom: the engine that is gone fails to answer.
            self._engines.answers(sending.replies, doing=doing)
            raise WeightSyncError(f"the broadcast of a bucket of weights failed: {fault}") from fault
        self._engines.answers(sending.replies, doing=doing)

    def _leave(self, *, remaining: Sequence[str]) -> None:
        """Leave the group on both sides. Who does not remain may be gone, or only be left out of the next group: it is
        told, too, and not waited for in earnest."""
        if self._group is None:
            return
        name = self._name
        calls = self._engines.start(lambda engine: engine.destroy_weights_update_group(name))
        dist.destroy_process_group(self._group)
        self._group = None
        staying = {url: call for url, call in calls.items() if url in remaining}
        self._engines.answers(staying, doing="leave the trainer")
        wait([call for url, call in calls.items() if url not in staying], timeout=LEAVE_S)
        self._engines.close()
