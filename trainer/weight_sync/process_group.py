"""A process group beside the default one, shared by processes that have different default groups.

`torch.distributed.new_group` only makes subgroups of the default group; trainer and engines have none in common, so
the group is made from a rendezvous of its own, as SGLang's `/init_weights_update_group` does on the other side.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from polyturn.trainer.rendezvous import open_store


def join_process_group(
    *, address: str, port: int, world_size: int, rank: int, name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Join the group `name` at tcp://address:port; rank 0 hosts the store. Blocks until all have joined."""
    store = open_store(address=address, port=port, world_size=world_size, rank=rank, timeout=timeout)
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=c10d.GroupName(name) if hasattr(c10d, "GroupName") else name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {index: index for index in range(world_size)}
    return group
