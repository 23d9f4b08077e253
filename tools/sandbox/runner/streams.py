"""The three streams of an execution: stdin is fed, stdout and stderr are read up to a bound."""

from __future__ import annotations

import contextlib
import os
import select

CHUNK_BYTES = 1 << 16


class Streams:
    """Pipes to one process. The process takes `theirs`; the runner keeps the other ends."""

    def __init__(self, stdin: bytes, max_bytes: int) -> None:
        """`max_bytes` bounds stdout, and as much stderr. Raises OSError."""
        stdin_theirs, self._stdin = os.pipe()
        self._stdout, stdout_theirs = os.pipe()
        self._stderr, stderr_theirs = os.pipe()
        self.theirs: tuple[int, ...] = (stdin_theirs, stdout_theirs, stderr_theirs)
        for fd in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(fd, False)
        self._input = memoryview(stdin)
        self._max_bytes = max_bytes
        self._captured = {self._stdout: bytearray(), self._stderr: bytearray()}
        self._open = {self._stdin, self._stdout, self._stderr}
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)
        self._poll.register(self._stderr, select.POLLIN)
        self.overflowed = False

    def after_fork(self) -> None:
        """Closes the process's ends here, and starts to feed stdin."""
        self._close_theirs()
        if self._input:
            self._poll.register(self._stdin, select.POLLOUT)
        else:
            self._close(self._stdin)

    @property
    def stdout(self) -> bytes:
        return bytes(self._captured[self._stdout])

    @property
    def stderr(self) -> bytes:
        return bytes(self._captured[self._stderr])

    def watch(self, fd: int, events: int) -> None:
        """Lets `step` wake for another descriptor."""
        self._poll.register(fd, events)

    def step(self, timeout_s: float) -> set[int]:
        """Waits for something to happen and moves bytes; the watched descriptors that something happened to."""
        others = set()
        for fd, _ in self._poll.poll(max(timeout_s, 0) * 1000):
            if fd == self._stdin:
                self._feed()
            elif fd in self._captured:
                self._read(fd)
            else:
                others.add(fd)
        return others

    def drain(self) -> None:
        """Reads what is in the pipes; whoever wrote there is gone."""
        for fd in self._captured:
            while fd in self._open and not self.overflowed and self._read(fd):
                pass

    def close(self) -> None:
        """Closes every end that is still open here."""
        self._close_theirs()
        for fd in tuple(self._open):
            self._close(fd)

    def _close_theirs(self) -> None:
        for fd in self.theirs:
            os.close(fd)
        self.theirs = ()

    def _feed(self) -> None:
        try:
            self._input = self._input[os.write(self._stdin, self._input[:CHUNK_BYTES]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._input = self._input[:0]
        if not self._input:
            self._close(self._stdin)

    def _read(self, fd: int) -> bool:
        """Whether there may be more."""
        captured = self._captured[fd]
        try:
            data = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close(fd)
            return False
        room = self._max_bytes - len(captured)
        captured += data[:room]
        if len(data) > room:
            self.overflowed = True
        return True

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
            os.close(fd)
