"""The host's side of the nursery: its process and its questions (see `runner/nursery.py`)."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyturn.tools.children import end_child, start_child
from polyturn.tools.sandbox.runner.nursery import MAX_MESSAGE_BYTES
from polyturn.tools.sandbox.sandbox import SandboxUnavailable


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """Which walls stand. For tests alone, which show that without a wall some snippet gets through.

    Nothing that a user writes leads here: only the constructor of `EmbeddedBackend` takes it.
    """

    user_namespace: bool = True
    """A user namespace below each sandbox's user. Without it root makes the other namespaces."""
    uid_drop: bool = True
    """Where the owner is root: a user of its own for each sandbox, taken before anything else."""
    network_namespace: bool = True
    fresh_tmpfs: bool = True
    """The work folder, /tmp and /dev/shm in memory, with bounds, for each sandbox. Without it all share them."""
    drop_capabilities: bool = True
    cgroup: bool = True
    """A memory and a pids cgroup for each sandbox, where they can be written."""
    rlimits: bool = True
    landlock: bool = True
    seccomp: bool = True
    kill_all: bool = True
    """Killing, after each execution, all that it left behind."""
    oom_score: bool = True
    """Code is what the kernel kills first when memory runs out."""


START = Path(__file__).resolve().parent / "runner" / "start.py"
ANSWER_TIMEOUT_S = 30.0
PREPARE_TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0
FIRST_HOST_ID = 2_000_000_000
"""Users that nobody has: sandboxes of root take theirs, by chance, from the 2 ** 27 that start here, or as many of them
as there are."""

ENVIRONMENT = {
    "HOME": "/work",
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "2",  # or every thread reserves 64 MiB of address space, which is limited
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",  # the order of a set is the same in every episode
}
"""All that code finds in `os.environ`."""


class NurseryGone(Exception):
    """The nursery ended, and with it every sandbox."""


class Nursery:
    """The nursery's process, a child that ends with this process. Thread-safe."""

    def __init__(self) -> None:
        """Raises OSError where the process cannot be started."""
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            python = os.path.realpath(sys.executable)
            try:
                self._process = start_child(
                    [python, "-s", "-S", "-P", str(START), "nursery", str(fd), str(os.getpid())],
                    env=ENVIRONMENT,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(fd,),
                )
            except OSError:
                self._socket.close()
                raise

    def prepare(
        self, *, launcher: str, folders: Sequence[str], preload: Sequence[str], layers: Layers
    ) -> dict[str, Any]:
        """Has the jail built, once. Raises SandboxUnavailable, naming the step that failed."""
        question = {
            "op": "prepare",
            "launcher": launcher,
            "folders": list(folders),
            "preload": list(preload),
            "layers": dataclasses.asdict(layers),
            "first_id": FIRST_HOST_ID,
        }
        return self._ask(question, timeout_s=PREPARE_TIMEOUT_S)

    def create(self, number: int, link: socket.socket, *, disk_bytes: int, num_files: int) -> int:
        """The pid of a process that waits for a byte on `link` to become a sandbox. Raises SandboxUnavailable."""
        question = {"op": "create", "id": number, "disk_bytes": disk_bytes, "num_files": num_files}
        return self._ask(question, fds=[link.fileno()])["pid"]

    def kill(self, number: int) -> str:
        """Kills a sandbox and waits until it is gone; one that is gone already is no error.

        Gives what bubblewrap, if it was there, complained of.
        """
        return self._ask({"op": "kill", "id": number})["said"]

    def close(self) -> None:
        """Ends the process, and with it all sandboxes that are left."""
        with self._lock:
            self._socket.close()
        end_child(self._process, wait_s=END_TIMEOUT_S)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None and self._socket.fileno() >= 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def _ask(
        self, question: dict[str, Any], *, fds: Sequence[int] = (), timeout_s: float = ANSWER_TIMEOUT_S
    ) -> dict[str, Any]:
        with self._lock:
            try:
                self._socket.settimeout(timeout_s)
                socket.send_fds(self._socket, [json.dumps(question).encode()], fds)
                data = self._socket.recv(MAX_MESSAGE_BYTES)
            except OSError as error:
                # A late answer would be taken for the next question's.
                self._socket.close()
                raise NurseryGone(str(error)) from None
            if not data:
                self._socket.close()
                raise NurseryGone("it ended")
        answer: dict[str, Any] = json.loads(data)
        if "failed" in answer:
            raise SandboxUnavailable(f"{answer['failed']}: {answer['message']}")
        return answer
