"""The streams of an execution: its program and its stdin are handed on, its stdout and stderr kept up to a bound.

Whatever a process has in its memory, its forks have too. So nothing that passes through the runner enters memory that
a fork gets: what the host sends, the kernel moves from the connection to the code's pipes, and what code writes is kept
in memory that is given back before the next fork.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
from collections import deque

CHUNK_BYTES = 1 << 16
SPLICE_F_NONBLOCK = 2


class Body:
    """The body of a question, still on the connection: so many bytes for one descriptor, so many for the next."""

    def __init__(self, link: int) -> None:
        self._link = link
        self._parts: deque[tuple[int, int]] = deque()
        self.size = 0

    def add(self, target: int, size: int) -> None:
        """The next `size` bytes are for `target`, a pipe, which is closed when it has them."""
        self._parts.append((target, size))
        self.size += size

    @property
    def target(self) -> int | None:
        """Whose turn it is; pipes that get nothing, or nothing more, are closed. None where all have theirs."""
        while self._parts and self._parts[0][1] == 0:
            os.close(self._parts.popleft()[0])
        return self._parts[0][0] if self._parts else None

    def move(self) -> bool:
        """Moves what can be moved at once; False where there was nothing, or no room. Raises EOFError."""
        target, left = self._parts[0]
        try:
            count = os.splice(self._link, target, left, flags=SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return False
        except BrokenPipeError:  # nobody reads there any more
            self.refuse()
            return True
        if count == 0:
            raise EOFError
        self.size -= count
        self._parts[0] = (target, left - count)
        return True

    def refuse(self) -> None:
        """The pipe whose turn it is gets no more; its bytes are thrown away at the end."""
        os.close(self._parts.popleft()[0])

    def throw_away(self) -> None:
        """Takes from the connection what no pipe took. Raises EOFError."""
        while self._parts:
            self.refuse()
        if self.size == 0:
            return
        null = os.open(os.devnull, os.O_WRONLY)
        reading, writing = os.pipe()
        try:
            while self.size > 0:
                count = os.splice(self._link, writing, min(self.size, CHUNK_BYTES))
                if count == 0:
                    raise EOFError
                self.size -= count
                while count > 0:
                    count -= os.splice(reading, null, count)
        finally:
            for fd in (null, reading, writing):
                os.close(fd)


class _Capture:
    """What was read from one pipe, in memory that goes back to the system with `close`."""

    def __init__(self, max_bytes: int) -> None:
        # Not shared, or a fork could read it, and write there, too.
        self._memory = mmap.mmap(-1, max_bytes + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_DONTFORK)
        self.max_bytes = max_bytes
        self.size = 0

    def read(self, fd: int) -> int:
        """Reads once, at most one byte beyond the bound. Raises BlockingIOError."""
        with memoryview(self._memory) as view, view[self.size : self.size + CHUNK_BYTES] as room:
            count = os.readv(fd, [room])
        self.size += count
        return count

    @property
    def overflowed(self) -> bool:
        return self.size > self.max_bytes

    def write_to(self, fd: int) -> None:
        """Writes what is within the bound to a blocking descriptor."""
        start, end = 0, min(self.size, self.max_bytes)
        with memoryview(self._memory) as view:
            while start < end:
                with view[start:end] as rest:
                    start += os.write(fd, rest)

    def last_line_starts_with(self, text: bytes) -> bool:
        end = min(self.size, self.max_bytes)
        while end > 0 and self._memory[end - 1] == ord("\n"):
            end -= 1
        start = self._memory.rfind(b"\n", 0, end) + 1
        return self._memory[start : min(start + len(text), end)] == text

    def close(self) -> None:
        self._memory.close()


class Streams:
    """Pipes to one process. The process takes `theirs` (stdin, stdout, stderr) and `program`; the runner keeps the
    other ends."""

    def __init__(self, link: int, program_bytes: int, stdin_bytes: int, max_bytes: int) -> None:
        """The next bytes on `link` are the program, then stdin. `max_bytes` bounds stdout, and as much stderr.

        Raises OSError.
        """
        self.program, program_ours = os.pipe()
        stdin_theirs, stdin_ours = os.pipe()
        self._stdout, stdout_theirs = os.pipe()
        self._stderr, stderr_theirs = os.pipe()
        self.theirs: tuple[int, ...] = (stdin_theirs, stdout_theirs, stderr_theirs)
        for fd in (program_ours, stdin_ours, self._stdout, self._stderr):
            os.set_blocking(fd, False)
        self._link = link
        self._body = Body(link)
        self._body.add(program_ours, program_bytes)
        self._body.add(stdin_ours, stdin_bytes)
        self._captured = {self._stdout: _Capture(max_bytes), self._stderr: _Capture(max_bytes)}
        self._open = {self._stdout, self._stderr}
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)
        self._poll.register(self._stderr, select.POLLIN)
        self._poll.register(link, 0)
        self._target: int | None = None  # the pipe whose room is waited for, with the bytes for it at hand
        self.overflowed = False

    def after_fork(self) -> None:
        """Closes the process's ends here, and starts to hand on what it gets."""
        self._close_theirs()
        self._hand_on()  # most of it, mostly: the host sends a question in one piece

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of stdout and of stderr."""
        stdout, stderr = (min(capture.size, capture.max_bytes) for capture in self._captured.values())
        return stdout, stderr

    def write_to(self, fd: int) -> None:
        """Writes stdout, then stderr."""
        for capture in self._captured.values():
            capture.write_to(fd)

    def ended_by_memory_error(self) -> bool:
        """Whether stderr ends with what the interpreter says of a MemoryError."""
        return self._captured[self._stderr].last_line_starts_with(b"MemoryError")

    def watch(self, fd: int, events: int) -> None:
        """Lets `step` wake for another descriptor."""
        self._poll.register(fd, events)

    def step(self, timeout_s: float) -> set[int]:
        """Waits for something to happen and moves bytes; the other descriptors that something happened to.

        The link is among them when its other end is gone.
        """
        others = set()
        for fd, events in self._poll.poll(max(timeout_s, 0) * 1000):
            if fd == self._link and events & select.POLLIN:
                self._await_room()
            elif fd == self._target:
                if not self._hand_on():
                    others.add(self._link)
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

    def finish(self) -> None:
        """Takes the rest of the question from the link. Raises EOFError."""
        self._body.throw_away()

    def close(self) -> None:
        """Closes every end that is still open here, and gives the memory back."""
        self._close_theirs()
        for fd in tuple(self._open):
            self._close(fd)
        for capture in self._captured.values():
            capture.close()

    def _close_theirs(self) -> None:
        if self.theirs:
            for fd in (*self.theirs, self.program):
                os.close(fd)
        self.theirs = ()

    def _await_bytes(self) -> None:
        self._target = None
        waits = self._body.target is not None
        self._poll.modify(self._link, select.POLLIN if waits else 0)

    def _await_room(self) -> None:
        self._poll.modify(self._link, 0)
        self._target = self._body.target
        if self._target is not None:
            self._poll.register(self._target, select.POLLOUT)

    def _hand_on(self) -> bool:
        """Moves what there is into the pipes, as far as they have room; False where the link has ended."""
        if self._target is not None:
            self._poll.unregister(self._target)
        try:
            while self._body.target is not None and self._body.move():
                pass
        except EOFError:
            return False
        self._await_bytes()
        return True

    def _read(self, fd: int) -> bool:
        """Whether there may be more."""
        captured = self._captured[fd]
        try:
            count = captured.read(fd)
        except BlockingIOError:
            return False
        if count == 0:
            self._close(fd)
            return False
        self.overflowed = self.overflowed or captured.overflowed
        return True

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
            os.close(fd)
