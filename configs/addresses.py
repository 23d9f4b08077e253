"""Where servers listen, and under which address others find them: two things, decided on the host that runs them."""

from __future__ import annotations

import ipaddress
import socket

LOOPBACK = "127.0.0.1"


def without_brackets(host: str) -> str:
    """`[::1]` as `::1`; any other host as it is."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def bind_address(host: str) -> str:
    """The numeric address that a server binds for `host`: an address, or a name that this machine can resolve.

    Raises:
        ValueError: it is neither.
    """
    plain = without_brackets(host)
    try:
        return str(ipaddress.ip_address(plain))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(plain, None, type=socket.SOCK_STREAM) if plain else []
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise ValueError(f"'{host}' is no address, and no name that this machine can resolve")
    # A name may stand for addresses of both families; what is written without thought means the older.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def advertised_address(bound: str, *, own: str = LOOPBACK) -> str:
    """The numeric address under which others find a server.

    Args:
        bound: what it listens on, as `bind_address` gives it.
        own: this host's address as the others know it.

    An address that stands for all of a host's own is never one to connect to.
    """
    address = ipaddress.ip_address(bound)
    if not address.is_unspecified:
        return bound
    if address.version == 6 and own == LOOPBACK:
        return "::1"
    return own


def bracketed(host: str) -> str:
    """A host as it stands before `:port`: an IPv6 address is put in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def http_url(host: str, port: int) -> str:
    """`http://host:port`."""
    return f"http://{bracketed(host)}:{port}"
