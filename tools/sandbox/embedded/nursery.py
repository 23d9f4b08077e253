"""The host's side of the nursery: its process, and the questions it answers (see `runner/nursery.py`)."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyturn.tools.sandbox.embedded.layers import Layers
from polyturn.tools.sandbox.runner.nursery import MAX_MESSAGE_BYTES
from polyturn.tools.sandbox.types import SandboxUnavailable

START = Path(__file__).resolve().parents[1] / "runner" / "start.py"
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
    """The nursery's process. Thread-safe.

    A thread of its own starts it and waits for it, since it is to end when its parent does, and the kernel takes the
    thread that started it for the parent.
    """

    def __init__(self) -> None:
        """Raises OSError where the process cannot be started."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        started = threading.Event()
        self._keeper = threading.Thread(
            target=self._keep, args=(theirs, started), name="sandbox-nursery", daemon=True
        )
        self._keeper.start()
        started.wait()
        theirs.close()
        if self._error is not None:
            self._socket.close()
            raise self._error

    def _keep(self, theirs: socket.socket, started: threading.Event) -> None:
        fd = theirs.fileno()
        python = os.path.realpath(sys.executable)
        command = [python, "-s", "-S", "-P", str(START), "nursery", str(fd), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command,
                env=ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(fd,),
                start_new_session=True,
            )
        except OSError as error:
            self._error = error
        finally:
            started.set()
        if self._process is not None:
            self._process.wait()

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
        self._keeper.join(END_TIMEOUT_S)
        if self._keeper.is_alive() and self._process is not None:
            self._process.kill()
            self._keeper.join()

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._keeper.is_alive() and self._socket.fileno() >= 0

    @property
    def pid(self) -> int:
        assert self._process is not None
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
