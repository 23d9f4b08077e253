"""A command that runs in a container: what it wrote, how it ended, and how it is ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from polyturn.tools.sandbox.docker_container import STDOUT, Pieces
from polyturn.tools.sandbox.sandbox import MIB

CommandStatus = Literal["ended", "timeout", "output_limit", "disk_limit", "broken"]
"""How a command ended.

- `ended`: by itself, whatever its exit code.
- `timeout`, `output_limit`, `disk_limit`: it was ended: it took longer, wrote more, or filled more disk than it may.
- `broken`: it could not be started, because of what was done in the container before (its `sh` is gone, say).
"""

REPORT_AND_RUN = 'echo $$; exec "$@"'
REPORT_AND_RUN_WITH_STDIN = 'echo $$; input=$1; shift; exec "$@" <"$input"'
_FIRST_LOOK_S, _LAST_LOOK_S = 0.1, 2.0
"""How often a silent command is looked after: ever more rarely, since each look is a question to the daemon."""
_REST_S = 0.2
"""How long the last output may take to come after a command has ended, where something else still holds its pipe."""
KILL_S = 10.0


class ContainerFailed(RuntimeError):
    """The daemon does not do what it is asked to. What runs in the container is not to blame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandResult:
    """What a command did."""

    status: CommandStatus
    exit_code: int | None
    """None where it did not end by itself. Above 128: the number of a signal more than that."""
    output: str
    """Standard output and error as they came; of much, the beginning and the end."""
    num_output_bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ran to its end and exited with 0."""
        return self.status == "ended" and self.exit_code == 0


class Kept:
    """The beginning and the end of what was written."""

    def __init__(self, max_bytes: int) -> None:
        self._half = max(1, max_bytes // 2)
        self._head, self._tail = bytearray(), bytearray()
        self.num_bytes = 0

    def add(self, data: bytes) -> None:
        self.num_bytes += len(data)
        room = self._half - len(self._head)
        self._head += data[: max(0, room)]
        self._tail += data[max(0, room) :]
        del self._tail[: max(0, len(self._tail) - self._half)]

    def text(self) -> str:
        left_out = self.num_bytes - len(self._head) - len(self._tail)
        between = f"\n[... {left_out} bytes left out ...]\n" if left_out else ""
        return f"{self._head.decode('utf-8', 'replace')}{between}{self._tail.decode('utf-8', 'replace')}"


class Command:
    """A command that runs in a container."""

    def __init__(
        self, api: Any, container_id: str, exec_id: str, attached: Any, is_disk_full: Callable[[], bool]
    ) -> None:
        """`attached` is what the SDK's `exec_start(socket=True)` gives; `is_disk_full` is asked now and then."""
        self._api, self._container_id = api, container_id
        self._exec_id, self._attached, self._is_disk_full = exec_id, attached, is_disk_full
        self._stream = getattr(attached, "_sock", attached)
        self._pieces = Pieces()
        self._pid: bytes = b""
        self._has_pid = threading.Event()
        self._stopped = threading.Event()

    def wait(
        self,
        timeout_s: float,
        *,
        max_output_bytes: int = 64 * 1024,
        max_written_bytes: int = 64 * MIB,
        grace_s: float = 0.0,
    ) -> CommandResult:
        """Waits for its end, and ends it where it takes longer, or writes more than `max_written_bytes`.

        Of what it writes, `max_output_bytes` are kept. `grace_s` is how long it has between SIGTERM and SIGKILL.
        Raises ContainerFailed.
        """
        start = time.monotonic()
        kept = Kept(max_output_bytes)
        with docker_errors("running a command"), contextlib.closing(self):
            status = self._read(kept, start + timeout_s, max_written_bytes)
            if status != "ended":
                self.stop(grace_s)
            exit_code = self._exit_code() if status == "ended" else None
        if not self._pid.isdigit() and status == "ended":  # `sh` was not to be had
            status, exit_code = "broken", None
            kept.add(b"" if self._has_pid.is_set() else self._pid)
        return CommandResult(
            status=status,
            exit_code=exit_code,
            output=kept.text(),
            num_output_bytes=kept.num_bytes,
            seconds=time.monotonic() - start,
        )

    def stop(self, grace_s: float = 0.0) -> None:
        """Ends it and its process group: by SIGTERM, and by SIGKILL after `grace_s`. From any thread.

        What has left its group goes on, until `Container.end_processes` or the container's end.
        """
        self._stopped.set()
        if not self._has_pid.is_set():
            return
        if grace_s > 0:
            self._signal("TERM")
            end = time.monotonic() + grace_s
            while time.monotonic() < end and self._is_running():
                time.sleep(0.05)
        self._signal("KILL")

    def close(self) -> None:
        """Lets go of its output."""
        # The response's own buffer has to go before the socket that it reads from.
        response = getattr(self._attached, "_response", None)
        if response is not None:
            response.close()
        self._attached.close()

    def _read(self, kept: Kept, deadline: float, max_written_bytes: int) -> CommandStatus:
        look_s, next_look, ended_at = _FIRST_LOOK_S, time.monotonic() + _LAST_LOOK_S, None
        while True:
            now = time.monotonic()
            if ended_at is not None and now > ended_at + _REST_S:
                return "ended"
            if now >= deadline:
                return "timeout"
            self._stream.settimeout(min(look_s, max(deadline - now, 0.001)))
            try:
                data = self._stream.recv(1 << 18)
                if not data:
                    return "ended"
                for stream, piece in self._pieces.feed(data):
                    self._take(kept, stream, piece)
                if kept.num_bytes > max_written_bytes:
                    return "output_limit"
            except TimeoutError:
                look_s = min(_LAST_LOOK_S, 1.5 * look_s)
                # What it left in the background may hold its output for ever.
                if ended_at is None and not self._is_running():
                    ended_at, look_s = time.monotonic(), _FIRST_LOOK_S
            if time.monotonic() >= next_look:
                if self._is_disk_full():
                    return "disk_limit"
                next_look = time.monotonic() + _LAST_LOOK_S

    def _take(self, kept: Kept, stream: int, piece: bytes) -> None:
        """The first line of the standard output is the number of the process."""
        if not self._has_pid.is_set() and stream == STDOUT:
            self._pid += piece
            line, newline, piece = self._pid.partition(b"\n")
            if not newline:
                return
            if not line.strip().isdigit():
                line, piece = b"", self._pid  # the runtime's own complaint
            self._pid = line.strip()
            self._has_pid.set()
        kept.add(piece)

    def _signal(self, name: str) -> None:
        if not self._pid.isdigit():
            return
        kill = ["sh", "-c", f"kill -s {name} -- -{int(self._pid)}"]
        with docker_errors("ending a command"):
            if self._api.inspect_container(self._container_id)["State"]["Running"]:
                created = self._api.exec_create(self._container_id, kill, user="0")
                self._api.exec_start(created["Id"])

    def _is_running(self) -> bool:
        with docker_errors("asking for a command"):
            return bool(self._api.exec_inspect(self._exec_id)["Running"])

    def _exit_code(self) -> int | None:
        end = time.monotonic() + KILL_S
        while True:
            found = self._api.exec_inspect(self._exec_id)
            if not found["Running"] or time.monotonic() > end:
                code = found["ExitCode"]
                return code if isinstance(code, int) else None
            time.sleep(0.01)


@contextlib.contextmanager
def docker_errors(what: str) -> Iterator[None]:
    """Around calls of the SDK: what it raises becomes ContainerFailed, and says at what."""
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        yield
    except (DockerException, RequestException, OSError) as error:
        raise ContainerFailed(f"{what}: {error}") from error
