"""The demonstration server of this process."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import subprocess
import sys
import time

from polyturn.envs.adapters.missing import require_installed
from polyturn.envs.adapters.openenv.connection import ServerFault

START_S = 60.0


def demo_server() -> str:
    """The URL of a server that plays the demonstration game. It ends with this process, however that ends.

    Raises:
        MissingPackage: `openenv` is not installed.
        ServerFault: it does not come up.
    """
    require_installed("openenv", extra="openenv")
    return _demo_server(os.getpid())


@functools.lru_cache(maxsize=1)
def _demo_server(owner: int) -> str:
    del owner  # a fork has a server of its own
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "polyturn.envs.adapters.openenv.demo", str(port)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    atexit.register(process.kill)
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"http://127.0.0.1:{port}"
        time.sleep(0.05)
    process.kill()
    raise ServerFault("the demonstration server of OpenEnv does not come up")
