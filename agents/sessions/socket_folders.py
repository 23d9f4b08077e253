"""Where the Unix sockets of session endpoints are, and the end of those that killed processes have left."""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
import time
from pathlib import Path

PREFIX = "polyturn-sessions-"
SOCKET = "endpoint.sock"
_EMPTY_S = 3600.0
"""A folder without a socket that is younger may be one of an endpoint that begins."""


def new_socket_path() -> Path:
    """A path in a folder of its own, which is not made yet; folders that nobody listens in any more are removed."""
    parent = Path(tempfile.gettempdir())
    for folder in parent.glob(f"{PREFIX}*"):
        # Another's may not be looked at, and one that others remove at the same time is gone.
        with contextlib.suppress(OSError):
            if _is_left_over(folder):
                (folder / SOCKET).unlink(missing_ok=True)
                folder.rmdir()
    return parent / f"{PREFIX}{secrets.token_hex(6)}" / SOCKET


def _is_left_over(folder: Path) -> bool:
    """Whether nobody listens: told by the socket, since the owner may be in another container with the same folder."""
    path = folder / SOCKET
    if not path.exists():
        return folder.stat().st_mtime < time.time() - _EMPTY_S
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False
