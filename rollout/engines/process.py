"""A local process that cannot outlive its owner, with its output in a file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from polyturn.tools.children import how_it_ended

GRACE_S = 1.0
"""Seconds from SIGTERM to SIGKILL."""


class EngineError(RuntimeError):
    """An engine process or a request to one failed: infrastructure, never a reward."""

    @property
    def sentence(self) -> str:
        """The message in one line: of the end of a log below it the last line, which says what happened."""
        lines = [line.strip() for line in str(self).splitlines() if line.strip()] or [type(self).__name__]
        return lines[0] if len(lines) == 1 else f"{lines[0].rstrip(':')}: {lines[-1]}"


class SupervisedProcess:
    """A command under a supervisor of its own (see `supervisor.py`); one start, one stop."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` is added to ours; output goes to `log_path`; `name` is for error messages."""
        self.name = name
        self.log_path = log_path
        self.command = tuple(command)
        self.environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_fd: int | None = None

    def start(self) -> None:
        """Start the command; returns at once."""
        assert self._process is None, f"{self.name} was started before"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        read_end, write_end = os.pipe()
        supervisor = [sys.executable, "-m", "polyturn.rollout.engines.supervisor"]
        flags = ["--owner-fd", str(read_end), "--owner-pid", str(os.getpid()), "--grace-s", str(GRACE_S)]
        try:
            with self.log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [*supervisor, *flags, "--", *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    pass_fds=(read_end,),
                    # Ctrl-C in the owner's terminal is the owner's to handle: it drains before it stops us.
                    start_new_session=True,
                )
        finally:
            os.close(read_end)
        self._owner_fd = write_end
        self._started = time.monotonic()

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def alive(self) -> bool:
        """Whether the command is still running."""
        return self._process is not None and self._process.poll() is None

    def release(self) -> None:
        """Tell the supervisor to end the command, without waiting for it."""
        if self._owner_fd is not None:
            os.close(self._owner_fd)
            self._owner_fd = None

    def stop(self) -> None:
        """End the command and all of its descendants; returns when they are gone. Idempotent."""
        self.release()
        if self._process is None:
            return
        try:
            self._process.wait(timeout=GRACE_S + 10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the guard then ends the command
            self._process.wait()

    def log_tail(self, num_lines: int = 20) -> str:
        """The last lines of the log."""
        if not self.log_path.exists():
            return ""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def answers(self, url: str, *, timeout_s: float) -> bool:
        """Whether GET `url` answers 200.

        Raises `EngineError` with the log's tail when the command has ended, or has been running for `timeout_s`.
        """
        self.check()
        try:
            # Plain HTTP: a client that does not read certificates is made in a hundredth of the time.
            if httpx.get(url, timeout=5.0, trust_env=False, verify=False).status_code == 200:
                return True
        except httpx.TransportError:
            pass  # not listening yet
        if time.monotonic() > self._started + timeout_s:
            raise EngineError(f"{self.name} was not ready after {timeout_s:g} s; {self._where()}")
        return False

    def wait_until(self, url: str, *, timeout_s: float) -> None:
        """Wait until `answers`. Raises as it does."""
        while not self.answers(url, timeout_s=timeout_s):
            time.sleep(0.1)

    def ended(self) -> str | None:
        """How the command ended, as a sentence; None while it runs."""
        assert self._process is not None, f"{self.name} was not started"
        status = self._process.poll()
        return None if status is None else f"{self.name} {how_it_ended(status)}"

    def check(self) -> None:
        """Raise `EngineError` with the log's tail unless the command is running."""
        if (how := self.ended()) is not None:
            raise EngineError(f"{how}; {self._where()}")

    def _where(self) -> str:
        return f"the end of its log {self.log_path}:\n{self.log_tail()}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
