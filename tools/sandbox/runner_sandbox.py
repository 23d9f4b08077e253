"""One sandbox, as an episode holds it, whatever its runner lives in: namespaces or a container."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from polyturn.tools.sandbox import MIB, ExecResult, Limits
from polyturn.tools.sandbox.runner.framing import encode

GRACE_S = 5.0
"""How much later than the runner the host gives up; the runner may be slow where the machine is busy."""
FILE_TIMEOUT_S = 30.0
SIGKILL_STATUS = -9


class LinkEnded(Exception):
    """The runner is gone, does not answer in time, or does not speak the protocol; the message says which."""


class Room(Protocol):
    """What a backend gives a sandbox: a runner that can be asked, and that ends. `close` may come from any thread."""

    def ask(
        self, question: dict[str, Any], body: bytes = b"", *, within_s: float, max_body_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        """Raises LinkEnded."""

    def memory_mark(self) -> float:
        """Where things stand before an execution, for `ran_out_of_memory` after it."""

    def ran_out_of_memory(self, mark: float) -> bool:
        """Whether the kernel has killed something in there, since the mark, for want of memory."""

    def alive(self) -> bool: ...

    def close(self) -> None: ...


class RunnerSandbox:
    """A `Sandbox`; see there."""

    def __init__(self, limits: Limits, make_room: Callable[[Limits], Room]) -> None:
        self._limits = limits
        self._make_room = make_room
        self._lock = threading.Lock()
        self._closed = False
        self._room = make_room(limits)

    def exec(
        self,
        code: str,
        *,
        stdin: str = "",
        arguments: Sequence[str] = (),
        timeout_s: float | None = None,
        fresh: bool = True,
    ) -> ExecResult:
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
            room = self._open_room()
            start = time.monotonic()
            if not room.alive():
                return _died("the sandbox has ended; `reset` makes a new one", start)
            mark = room.memory_mark()
            try:
                header, body = room.ask(
                    question,
                    program + stdin.encode("utf-8", "surrogatepass"),
                    within_s=timeout_s + GRACE_S,
                    max_body_bytes=2 * self._limits.output_bytes,
                )
            except LinkEnded as ended:
                room.close()
                return _died(str(ended), start)
            seconds = time.monotonic() - start
            was_killed = header["status"] == "ok" and header["exit_code"] == SIGKILL_STATUS
            if was_killed and room.ran_out_of_memory(mark):
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
        question = {"op": "read", "path": path, "max_bytes": max_bytes}
        return self._ask_about_file(question, b"", max_body_bytes=max_bytes)

    def write_file(self, path: str, data: bytes) -> None:
        self._ask_about_file({"op": "write", "path": path}, bytes(data), max_body_bytes=0)

    def reset(self) -> None:
        with self._lock:
            self._open_room().close()
            self._room = self._make_room(self._limits)

    def alive(self) -> bool:
        return not self._closed and self._room.alive()

    def close(self) -> None:
        # Not under the lock: an execution in another thread ends because its room does.
        self._closed = True
        self._room.close()
        with self._lock:
            self._room.close()  # the one that a `reset` may have made meanwhile

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_room(self) -> Room:
        if self._closed:
            raise ValueError("the sandbox is closed")
        return self._room

    def _ask_about_file(self, question: dict[str, Any], data: bytes, *, max_body_bytes: int) -> bytes:
        with self._lock:
            room = self._open_room()
            try:
                header, body = room.ask(
                    question, data, within_s=FILE_TIMEOUT_S, max_body_bytes=max_body_bytes
                )
            except LinkEnded as ended:
                room.close()
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
