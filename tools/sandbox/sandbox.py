"""A sandbox as an episode holds it, whatever its runner lives in: limits, results, and the connection to the runner."""

from __future__ import annotations

import abc
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from polyturn.tools.closing import Closing
from polyturn.tools.sandbox.runner.framing import Decoder, FramingError, encode

Status = Literal["ok", "timeout", "oom", "output_limit", "sandbox_died", "setup_error"]
"""How an execution ended.

- `ok`: the code ran to its end, whatever its exit status (an uncaught exception is `ok` with exit code 1).
- `timeout`: the deadline, or the limit of CPU seconds, ended it.
- `oom`: the memory limit ended it (a `MemoryError` that the code itself raised and did not catch counts too).
- `output_limit`: it wrote more than it may; what came before the limit is kept.
- `sandbox_died`: the sandbox itself went away; `reset` or a new sandbox is needed when `alive()` is False.
- `setup_error`: the execution could not be set up, so the code did not run. Says nothing about the code.
"""

MIB = 1 << 20


class SandboxUnavailable(RuntimeError):
    """No isolation can be had on this machine; the message names the probe that failed and what would help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one sandbox may use. Every value is a maximum; all are enforced outside the code's reach."""

    wall_s: float = 10.0
    """Seconds on the clock for one execution, where `exec` is not given a timeout."""
    cpu_s: int = 10
    """CPU seconds of one process."""
    memory_bytes: int = 256 * MIB
    """Memory of the code: address space per process, and of all processes together where cgroups are writable."""
    output_bytes: int = 64 * 1024
    """Bytes of stdout, and as many of stderr, that an execution may write."""
    num_processes: int = 32
    """Processes and threads of the code that live at a time."""
    file_bytes: int = 16 * MIB
    """Size of a file."""
    disk_bytes: int = 64 * MIB
    """Size of the work folder, which lives in memory."""
    num_files: int = 4096
    """Files and folders in the work folder."""
    num_open_files: int = 256
    """File descriptors of one process."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"Limits.{field.name} must be positive, got {getattr(self, field.name)!r}")

    @property
    def of_an_execution(self) -> dict[str, int]:
        """Those that the runner puts on each execution, as its `configure` takes them."""
        names = ("memory_bytes", "cpu_s", "output_bytes", "num_processes", "file_bytes", "num_open_files")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecResult:
    """What an execution did, seen from outside the sandbox."""

    status: Status
    stdout: str
    """What the code wrote, decoded as UTF-8 with replacement characters, at most `Limits.output_bytes`."""
    stderr: str
    exit_code: int | None
    """The exit status; minus the signal's number where a signal ended the process; None where it did not end."""
    seconds: float
    """Wall-clock seconds from the request to the result, as the host measured them."""
    detail: str = ""
    """One sentence for a person (or a model) about a status other than `ok`; empty otherwise."""
    left_files: bool = False
    """Whether there is anything now in the folders that code may write to, which the next execution would find."""

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end and exited with 0."""
        return self.status == "ok" and self.exit_code == 0


GRACE_S = 5.0
"""How much later than the runner the host gives up; the runner may be slow where the machine is busy."""
FILE_TIMEOUT_S = 30.0
SIGKILL_STATUS = -9


class Sandbox(Closing):
    """One isolated place to run Python, with a work folder of its own that lives until `reset` or `close`.

    One execution at a time: calls from several threads wait for each other.
    """

    def __init__(self, limits: Limits, start_runner: Callable[[Limits], Runner]) -> None:
        self._limits = limits
        self._start_runner = start_runner
        self._lock = threading.Lock()
        self._closed = False
        self._runner = start_runner(limits)

    def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        arguments: Sequence[str] = (),
        timeout_s: float | None = None,
        fresh: bool = True,
    ) -> ExecResult:
        """Runs Python source in the work folder.

        `fresh=True` takes a new interpreter process. `fresh=False` takes the sandbox's persistent interpreter, whose
        names live on from one such call to the next; when it is killed (a timeout, say) its names are lost, `detail`
        says so and the next call starts a new one. Files live on either way.

        Never raises for what the code does. Raises ValueError for a closed sandbox or arguments that make no sense.
        """
        timeout_s = self._limits.wall_s if timeout_s is None else timeout_s
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        if isinstance(arguments, str) or any("\0" in argument for argument in arguments):
            raise ValueError("arguments must be a sequence of strings without zero bytes")
        program = encode({"code": code, "arguments": list(arguments)})
        question = {
            "op": "exec",
            "program_bytes": len(program),
            "timeout_s": timeout_s,
            "fresh": fresh,
        }
        with self._lock:
            runner = self._open_runner()
            start = time.monotonic()
            if not runner.alive():
                return _died("the sandbox has ended; `reset` makes a new one", start)
            mark = runner.memory_mark()
            try:
                header, body = runner.ask(
                    question,
                    program + stdin.encode("utf-8", "surrogatepass"),
                    within_s=timeout_s + GRACE_S,
                    max_body_bytes=2 * self._limits.output_bytes,
                )
            except LinkEnded as ended:
                runner.close()
                return _died(str(ended), start)
            seconds = time.monotonic() - start
            was_killed = header["status"] == "ok" and header["exit_code"] == SIGKILL_STATUS
            if was_killed and runner.ran_out_of_memory(mark):
                header |= {
                    "status": "oom",
                    "detail": _join("the sandbox ran out of memory", header["detail"]),
                }
        return ExecResult(
            status=header["status"],
            stdout=body[: header["stdout"]].decode("utf-8", "replace"),
            stderr=body[header["stdout"] :].decode("utf-8", "replace"),
            exit_code=header["exit_code"],
            seconds=seconds,
            detail=header["detail"],
            left_files=header["left_files"],
        )

    def read_file(self, path: str, *, max_bytes: int = MIB) -> bytes:
        """The contents of a regular file, `path` relative to the work folder.

        Raises FileNotFoundError, IsADirectoryError, PermissionError (the code took the permission away), or
        ValueError where the path leaves the work folder (by `..`, an absolute path or any symbolic link), is not a
        regular file, or the file is larger than `max_bytes`.
        """
        question = {"op": "read", "path": path, "max_bytes": max_bytes}
        return self._ask_about_file(question, b"", max_body_bytes=max_bytes)

    def write_file(self, path: str, data: bytes) -> None:
        """Writes a file, making its parent folders; `path` relative to the work folder.

        Raises ValueError where the path leaves the work folder, and OSError where the file does not fit.
        """
        self._ask_about_file({"op": "write", "path": path}, bytes(data), max_body_bytes=0)

    def reset(self) -> None:
        """Kills whatever runs, and empties the work folder; a sandbox that died is alive again afterwards.

        Raises SandboxUnavailable where a new one cannot be had.
        """
        with self._lock:
            self._open_runner().close()
            self._runner = self._start_runner(self._limits)

    def alive(self) -> bool:
        """Whether the next `exec` can run."""
        return not self._closed and self._runner.alive()

    def close(self) -> None:
        """Kills whatever runs and frees everything; again is harmless."""
        # Not under the lock: an execution in another thread ends because its runner does.
        self._closed = True
        self._runner.close()
        with self._lock:
            self._runner.close()  # the one that a `reset` may have made meanwhile

    def _open_runner(self) -> Runner:
        if self._closed:
            raise ValueError("the sandbox is closed")
        return self._runner

    def _ask_about_file(self, question: dict[str, Any], data: bytes, *, max_body_bytes: int) -> bytes:
        with self._lock:
            runner = self._open_runner()
            try:
                header, body = runner.ask(
                    question, data, within_s=FILE_TIMEOUT_S, max_body_bytes=max_body_bytes
                )
            except LinkEnded as ended:
                runner.close()
                raise BrokenPipeError(f"the sandbox has ended ({ended}); `reset` makes a new one") from None
        if header.get("error") == "value":
            raise ValueError(header["message"])
        if header.get("error") == "os":
            raise OSError(header["errno"], header["message"], question["path"])
        return body


def _died(detail: str, start: float) -> ExecResult:
    seconds = time.monotonic() - start
    return ExecResult(
        status="sandbox_died", stdout="", stderr="", exit_code=None, seconds=seconds, detail=detail
    )


def _join(*sentences: str) -> str:
    return "; ".join(sentence for sentence in sentences if sentence)


class LinkEnded(Exception):
    """The runner is gone, does not answer in time, or does not speak the protocol; the message says which."""


class Link:
    """Questions to a runner and its answers over a stream socket. Not for several threads at a time."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        # The runner's answers are small beside their body; what is inside may try to make it say something else.
        self._decoder = Decoder(max_header_bytes=1 << 16)

    def ask(
        self, question: dict[str, Any], body: bytes = b"", *, within_s: float, max_body_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        """The answer to a question, whose body has at most so many bytes.

        Raises LinkEnded. The link is of no use then: a late answer would be taken for the next question's.
        """
        deadline = time.monotonic() + within_s
        self._decoder.max_body_bytes = max_body_bytes
        try:
            self._stream.settimeout(within_s)
            self._stream.sendall(encode(question, body))
            while (frame := self._decoder.next_frame()) is None:
                self._stream.settimeout(max(deadline - time.monotonic(), 0.001))
                self._receive()
        except TimeoutError:
            raise LinkEnded(f"the sandbox did not answer within {within_s:g} s") from None
        except (OSError, EOFError, ValueError):  # ValueError: closed by another thread
            raise LinkEnded(f"the sandbox ended {self.said}".rstrip()) from None
        except FramingError as error:
            raise LinkEnded(f"the sandbox broke the protocol: {error}") from None
        return frame

    @property
    def said(self) -> str:
        """What the runner complained of, where that can be known."""
        return ""

    def is_open(self) -> bool:
        """Whether the other end is there; it says nothing unless it is asked."""
        try:
            self._stream.settimeout(0)
            self._receive()
        except (BlockingIOError, ssl.SSLWantReadError):  # a daemon may be reached over TLS
            return True
        except (OSError, EOFError, ValueError):
            return False
        return False

    def interrupt(self) -> None:
        """Ends an `ask` that waits in another thread, and all later ones."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection, on which the runner ends."""
        self._stream.close()

    def _receive(self) -> None:
        """Reads once. Raises EOFError at the end, and OSError."""
        data = self._stream.recv(1 << 18)
        if not data:
            raise EOFError
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        self._decoder.feed(data)


class Runner(abc.ABC):
    """What a backend gives a sandbox: a runner that can be asked, and that ends.

    `close` may come from any thread; it ends an `ask` that waits in another.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._state = threading.Lock()
        self._asking = threading.Lock()
        self._closed = False

    def ask(
        self, question: dict[str, Any], body: bytes = b"", *, within_s: float, max_body_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        """Asks the runner. Raises LinkEnded."""
        with self._asking:
            if self._closed:
                raise LinkEnded("the sandbox has ended")
            return self._link.ask(question, body, within_s=within_s, max_body_bytes=max_body_bytes)

    def alive(self) -> bool:
        """Whether the runner is there."""
        if self._closed:
            return False
        if not self._asking.acquire(blocking=False):
            return True
        try:
            return self._link.is_open()
        finally:
            self._asking.release()

    def close(self) -> None:
        """Kills everything inside and frees the rest; again is harmless."""
        with self._state:
            if self._closed:
                return
            self._closed = True
        self._end()

    @abc.abstractmethod
    def _end(self) -> None: ...

    @abc.abstractmethod
    def memory_mark(self) -> float:
        """Where things stand before an execution, for `ran_out_of_memory` after it."""

    @abc.abstractmethod
    def ran_out_of_memory(self, mark: float) -> bool:
        """Whether the kernel has killed something in there, since the mark, for want of memory."""
