"""Where processes meet to form process groups.

`torch.distributed`'s own TCP rendezvous listens on every interface of rank 0's host. Here rank 0 listens on the one
address that the others are given: loopback, unless the ranks are on several hosts. And `new_group` only makes subgroups
of the default group; trainer and engines have none in common, so theirs is made from a rendezvous of its own, as
SGLang's `/init_weights_update_group` does on the other side.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def open_store(*, address: str, port: int, world_size: int, rank: int, timeout: timedelta) -> dist.TCPStore:
    """The store at address:port, which rank 0 hosts. Blocks until all ranks have opened it.

    Others may join it by torch's own `tcp://address:port` rendezvous.
    """
    if rank != 0:
        return dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family)
    # The store owns the descriptor from here on.
    return dist.TCPStore(
        address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach()
    )


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
