"""Where processes meet to form a process group.

`torch.distributed`'s own TCP rendezvous listens on every interface of rank 0's host. Here rank 0 listens on the one
address that the others are told: loopback, unless the ranks are on several hosts.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist


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
