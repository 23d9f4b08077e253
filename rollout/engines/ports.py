"""Ports for servers that we start: a free one, or the one asked for if it is free."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection

# Below the range that Linux takes outgoing connections' ports from (32768 and up): a server takes seconds to
# bind.
FREE_RANGE = range(20000, 32768)


def is_free(host: str, port: int) -> bool:
    """Whether a server could bind `host:port` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # With SO_REUSEADDR two sockets may bind one port while neither listens.
            probe.listen(1)
        except OSError:
            return False
    return True


def free_port(host: str, *, avoid: Collection[int] = ()) -> int:
    """A port of `host` that is free now, not in `avoid`."""
    for _ in range(1000):
        port = random.choice(FREE_RANGE)
        if port not in avoid and is_free(host, port):
            return port
    raise ValueError(f"no free port found on {host} between {FREE_RANGE.start} and {FREE_RANGE.stop - 1}")


def claim_port(host: str, port: int, *, key: str, avoid: Collection[int] = ()) -> int:
    """`port` if it is free, or a free one for 0. `key` names the option in the error.

    Raises `ValueError` when the port is taken.
    """
    if port == 0:
        return free_port(host, avoid=avoid)
    if not is_free(host, port):
        raise ValueError(f"{key}: port {port} on {host} is taken; choose another, or 0 for a free one")
    return port
