"""The way that a run's config says weights go to its engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from polyturn.configs.addresses import LOOPBACK
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.weight_sync import AdapterSync, BroadcastSync, DeltaSync, DiskSync, TensorSync
from polyturn.rollout.engines.checksums import EngineChecksums, EngineLayout
from polyturn.trainer.ranks.remote_mirror import RemoteMirror
from polyturn.trainer.weight_sync import WeightPublisher
from polyturn.trainer.weight_sync.adapters import AdapterPublisher
from polyturn.trainer.weight_sync.broadcast import BroadcastPublisher
from polyturn.trainer.weight_sync.delta_publisher import DeltaPublisher
from polyturn.trainer.weight_sync.disk import DiskPublisher
from polyturn.trainer.weight_sync.mirror import Mirror, files_beside_weights
from polyturn.trainer.weight_sync.tensors import ByHandle, ByValue, Carrier, TensorPublisher


def make_publisher(
    config: RunConfig,
    hf_config: Mapping[str, Any],
    *,
    served_model: Path,
    weights_directory: Path,
    address: str,
    adapter_config: Callable[[Sequence[str]], Mapping[str, Any]],
) -> WeightPublisher:
    """What rank 0 publishes with; it has no engines yet.

    Args:
        served_model: the directory that engines were started from.
        weights_directory: where versions go on disks, unless the config says where.
        address: this host's.
        adapter_config: PEFT's config of adapters whose tensors have these names.
    """
    sync = config.weight_sync
    flush_cache = config.rollout.kv_after_update == "recompute"
    new_checksums = _checksums(config, hf_config)
    match sync:
        case BroadcastSync():
            return BroadcastPublisher(
                tensor_parallel=config.engines.tensor_parallel,
                address=address,
                backend="gloo" if config.trainer.device == "cpu" else "nccl",
                bucket_bytes=sync.bucket_bytes_on(config.trainer.device),
                timeout_s=sync.timeout_s,
                hung_after_s=config.engines.replace.hung_after_s,
                new_checksums=new_checksums,
                flush_cache=flush_cache,
            )
        case TensorSync():
            return TensorPublisher(
                carrier=_carrier(config),
                tensor_parallel=config.engines.tensor_parallel,
                bucket_bytes=sync.bucket_bytes,
                timeout_s=sync.timeout_s,
                new_checksums=new_checksums,
                flush_cache=flush_cache,
            )
        case AdapterSync():
            return AdapterPublisher(
                adapter_config=adapter_config,
                tensor_parallel=config.engines.tensor_parallel,
                timeout_s=sync.timeout_s,
            )
        case DeltaSync():
            directory, files = sync.directory or weights_directory, files_beside_weights(served_model)
            return DeltaPublisher(
                mirror=Mirror(directory / "mirror", files),
                is_here=lambda host: host in (address, LOOPBACK, "localhost", "::1"),
                open_mirror=lambda host: RemoteMirror(host, directory / f"mirror-{host}", files),
                block_bytes=sync.block_bytes,
                bucket_bytes=sync.bucket_bytes,
                full_every=sync.full_every,
                new_checksums=new_checksums,
                flush_cache=flush_cache,
            )
        case DiskSync():
            return DiskPublisher(
                model_path=served_model,
                directory=sync.directory or weights_directory,
                new_checksums=new_checksums,
                flush_cache=flush_cache,
            )


def all_ranks_publish(config: RunConfig) -> bool:
    """Whether every rank of the trainer hands something to engines, and not the first one alone."""
    return config.weight_sync.kind == "tensors" and config.trainer.device == "cuda"


def _carrier(config: RunConfig) -> Carrier:
    if not all_ranks_publish(config):
        return ByValue()
    return ByHandle(dist.new_group(backend="gloo"))


def _checksums(config: RunConfig, hf_config: Mapping[str, Any]) -> Callable[[], EngineChecksums] | None:
    """Makes what sums up one update; None where nobody compares."""
    if not config.checks.compares_weights:
        return None
    return partial(
        EngineChecksums,
        EngineLayout.of_config(hf_config),
        device=config.engines.device,
        tensor_parallel=config.engines.tensor_parallel,
    )
