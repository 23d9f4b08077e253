"""Weight sync by changes: each host's copy of the weights is patched while the engines serve, then they load it.

What travels is the changed blocks of each tensor since the version before, compressed. Every host of engines has a
`Mirror` on its own disk; that of the trainer's rank 0 is also what changes are found against. Where hosts have no
directory in common the patches reach the others' mirrors through Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol
from urllib.parse import urlsplit

import torch

from polyturn.rollout.engines.checksums import EngineChecksums
from polyturn.trainer.weight_sync import SyncReport, WeightSyncError
from polyturn.trainer.weight_sync.buckets import make_buckets
from polyturn.trainer.weight_sync.delta import DeltaError, Patch, make_patch
from polyturn.trainer.weight_sync.engine_calls import EngineCalls
from polyturn.trainer.weight_sync.mirror import Mirror
from polyturn.trainer.weight_sync.tally import Tally

TIMEOUT_S = 600.0
"""How long an engine may take to load a version."""


class MirrorLike(Protocol):
    """A mirror, here or on another host."""

    @property
    def version(self) -> int | None: ...

    def begin(self, base: int | None) -> None: ...

    def take(self, patches: Sequence[Patch]) -> None: ...

    def finish(self, version: int) -> str: ...


class DeltaPublisher:
    """Publishes changes to a mirror on every host, from which its engines load."""

    def __init__(
        self,
        *,
        mirror: Mirror,
        is_here: Callable[[str], bool],
        open_mirror: Callable[[str], MirrorLike],
        block_bytes: int,
        bucket_bytes: int,
        full_every: int,
        new_checksums: Callable[[], EngineChecksums] | None,
        flush_cache: bool = True,
    ) -> None:
        """It has no engines until it is told of some.

        Args:
            mirror: This host's.
            is_here: Whether a host, as an engine's URL names it, is this one.
            open_mirror: Starts the mirror of another host.
            block_bytes: The grain of a change.
            bucket_bytes: Of how many tensors the changes are found and sent at once.
            full_every: After so many versions one is sent whole.
        """
        self._mirror = mirror
        self._is_here = is_here
        self._open_mirror = open_mirror
        self._block_bytes = block_bytes
        self._bucket_bytes = bucket_bytes
        self._full_every = full_every
        self._new_checksums = new_checksums
        self._flush_cache = flush_cache
        self._engines = EngineCalls([], timeout_s=TIMEOUT_S)
        self._others: dict[str, MirrorLike] = {}
        self._num_since_full = 0
        self._prepared: tuple[int, dict[str, str], Tally, int, float] | None = None

    def set_engines(self, urls: Sequence[str]) -> None:
        """A host that is new here gets the next version whole; see `WeightPublisher.set_engines`."""
        self._engines.close()
        self._engines = EngineCalls(urls, timeout_s=TIMEOUT_S)
        hosts = {host for host in map(_host, urls) if not self._is_here(host)}
        self._others = {host: self._others.get(host) or self._open_mirror(host) for host in sorted(hosts)}

    def prepare(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Bring every mirror to the version; see `WeightPublisher.prepare`."""
        started = time.perf_counter()
        tally = Tally(self._new_checksums)
        mirrors = [self._mirror, *self._others.values()]
        versions = {mirror.version for mirror in mirrors}
        base = versions.pop() if len(versions) == 1 else None
        if self._num_since_full + 1 >= self._full_every:
            base = None
        num_bytes = 0
        for mirror in mirrors:
            mirror.begin(base)
        for bucket in make_buckets(named_tensors, bucket_bytes=self._bucket_bytes):
            patches = [
                make_patch(
                    name,
                    tensor,
                    None if base is None else self._mirror.read(name),
                    block_bytes=self._block_bytes,
                )
                for name, tensor in bucket
            ]
            for name, tensor in bucket:
                tally.add(name, tensor)
            num_bytes += sum(patch.num_bytes for patch in patches)
            for mirror in mirrors:
                _take(mirror, patches)
        paths = {host: mirror.finish(version) for host, mirror in self._others.items()}
        paths[""] = self._mirror.finish(version)
        self._num_since_full = 0 if base is None else self._num_since_full + 1
        seconds = time.perf_counter() - started
        self._prepared = (version, paths, tally, num_bytes, seconds)

    def activate(self) -> SyncReport:
        """Have every engine load its host's mirror; see `WeightPublisher.activate`."""
        assert self._prepared is not None, "prepare comes first"
        version, paths, tally, num_bytes, seconds = self._prepared
        self._prepared = None
        started = time.perf_counter()
        self._engines.ask(
            lambda engine: engine.update_weights_from_disk(
                model_path=paths.get(_host(engine.url), paths[""]),
                weight_version=version,
                flush_cache=self._flush_cache,
            ),
            doing="load its host's copy of the weights",
        )
        self._engines.check_version(version)
        pause_seconds = time.perf_counter() - started
        return tally.report(
            version=version,
            seconds=seconds + pause_seconds,
            pause_seconds=pause_seconds,
            num_bytes=num_bytes,
        )

    def close(self) -> None:
        """Nothing is held open; the mirrors stay, since the engines serve from them."""
        self._engines.close()


def _take(mirror: MirrorLike, patches: Sequence[Patch]) -> None:
    try:
        mirror.take(patches)
    except DeltaError as fault:
        # That mirror has no version any more, so that what comes next comes whole.
        raise WeightSyncError(f"a host's copy of the weights was not what it should be: {fault}") from fault


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""
