"""Calls that end: in processes that are killed and replaced when a call takes too long.

Such a process is `python -m polyturn.envs.adapters.bounded module:function CPU_SECONDS OWNER`. It reads a JSON list of
arguments a line, and writes a JSON object a line: `{"value": ...}` or `{"error": "..."}`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import time
from typing import Any, BinaryIO

from polyturn.tools.children import end_child, end_with, start_child


class CallFailed(Exception):
    """The function raised, or its process died; the text says how."""


class CallTimedOut(Exception):
    """The call did not end in time, and its process was killed."""


class BoundedCalls:
    """Calls one function in a pool of processes. Safe in threads; a call waits for a process that is free.

    A call that holds the interpreter, such as a regular expression that backtracks for ever, is ended like any other.
    The pool's processes end with this one.
    """

    def __init__(self, function: str, *, num_processes: int, deadline_s: float) -> None:
        """
        Args:
            function: `module:name` of a function of JSON values that returns one.
            num_processes: They start when they are needed.
            deadline_s: For one call. The first call of a process has `START_S` more, for its imports.
        """
        self._command = [
            sys.executable, "-m", "polyturn.envs.adapters.bounded", function, str(int(deadline_s) + 2), str(os.getpid())
        ]  # fmt: skip
        self.deadline_s = deadline_s
        self._owner = os.getpid()
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._free.put(None)
        self._workers: set[_Worker] = set()

    def __call__(self, *arguments: Any) -> Any:
        """The function's value.

        Raises:
            CallFailed: it raised, or its process died.
            CallTimedOut: it did not end in time.
        """
        worker = self._free.get()
        healthy = False
        try:
            if worker is None:
                worker = _Worker(self._command)
                self._workers.add(worker)
            answer = worker.ask(arguments, self.deadline_s)
            healthy = True
        finally:
            if not healthy and worker is not None:
                self._workers.discard(worker)
                worker.kill()
            self._free.put(worker if healthy else None)
        if "error" in answer:
            raise CallFailed(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the processes. A later call starts new ones."""
        if os.getpid() != self._owner:  # a fork's copy: the processes are not its own
            return
        for worker in list(self._workers):
            worker.kill()


START_S = 60.0
"""What the first call of a process may take beyond its deadline: importing another gym on a busy machine."""


class _Worker:
    """One process, and the lines to and from it."""

    def __init__(self, command: list[str]) -> None:
        self._process = start_child(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # What iterates over sets of texts would otherwise give something else in every process.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        self._pending = b""
        self._fresh = True

    def ask(self, arguments: tuple[Any, ...], deadline_s: float) -> dict[str, Any]:
        """Raises CallFailed where the process is dead, CallTimedOut."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + deadline_s + (START_S if self._fresh else 0.0)
        self._fresh = False
        try:
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return json.loads(self._read_line(deadline))

    def _read_line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise CallTimedOut("the call did not end in time")
            chunk = os.read(stdout, 1 << 16)
            if not chunk:
                raise self._ended()
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _ended(self) -> Exception:
        status = self._process.wait()
        if status == -signal.SIGXCPU:
            return CallTimedOut("the call burnt all the CPU time that it had")
        return CallFailed(f"the process ended by itself (status {status})")

    def kill(self) -> None:
        end_child(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue  # what was still to be written goes nowhere


def shared_calls(function: str, *, num_processes: int = 2, deadline_s: float = 5.0) -> BoundedCalls:
    """This process's pool for that function: the same one for all who ask alike."""
    return _shared_calls(function, num_processes, deadline_s, os.getpid())


@functools.lru_cache(maxsize=8)
def _shared_calls(function: str, num_processes: int, deadline_s: float, owner: int) -> BoundedCalls:
    del owner  # a fork must not talk to its parent's processes
    return BoundedCalls(function, num_processes=num_processes, deadline_s=deadline_s)


MEMORY_BYTES = 4 << 30
"""Address space of a worker; what asks for more gets a MemoryError."""


def main(entry_point: str, cpu_s: int, owner: int) -> None:
    """Answer calls until standard input ends. A call that burns more than `cpu_s` is ended with the process."""
    end_with(owner)
    answers = _private_output()
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    module, _, name = entry_point.partition(":")
    function = getattr(importlib.import_module(module), name)
    for line in sys.stdin.buffer:
        _limit(resource.RLIMIT_CPU, int(_used_cpu()) + cpu_s)
        try:
            answer = json.dumps({"value": function(*json.loads(line))})
        except Exception as error:  # noqa: BLE001  the caller judges what the other gym's code raised
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
        answers.write(answer.encode() + b"\n")
        answers.flush()


def _private_output() -> BinaryIO:
    """Standard output, taken away from everything that prints."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _limit(which: int, value: int) -> None:
    """Lower a soft limit; the hard one stays, so that it can be set anew."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _used_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime + 1.0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
