"""A pool of processes with a bound on their processor time, not on the clock: a busy machine changes no verdict.

One parent process ("zygote") imports mpmath and math-verify once and forks a worker whenever it is asked to, so that a
killed worker is replaced in milliseconds. It speaks with its owner through a socket: `F` with a file descriptor forks a
worker that serves JSON lines on that descriptor, and answers its process id; `K` and an id ends that worker, and
answers how it ended. The kernel ends a worker whose comparison takes more processor time than it may. The end of the
socket is the end of the owner: the zygote kills its workers and exits, and workers die with the zygote.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

from polyturn.envs.rewards.math.decide import decide
from polyturn.envs.rewards.math.verdict import UNDECIDED, Reason, Unreadable
from polyturn.tools.children import end_child, end_with, start_child

START_SECONDS = 60.0
"""How long the first process may take to import its libraries."""
END_SECONDS = 5.0
"""How long it may take to end once its socket has."""
# The packages above this one import Gymnasium and more, which a worker has no use for: it gets them empty.
_BOOT = """
import json, sys, types
paths, packages = json.loads(sys.argv[2])
sys.path[:] = paths
for name, path in packages.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
from polyturn.envs.rewards.math.pool import main
main(int(sys.argv[1]))
"""
_PACKAGES = ("polyturn", "polyturn.envs", "polyturn.envs.rewards")


EXCEEDED = 3
"""The exit code of a worker that ran out of memory or stack on its comparison."""


class WorkerDied(Exception):
    """A worker ended while it worked."""


class Worker:
    """One forked process and the socket to it."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self._channel = channel
        self._buffer = b""

    def ask(self, request: Any, deadline_s: float) -> Any:
        """The answer to one request.

        Raises:
            TimeoutError: there was none in `deadline_s` seconds of the clock; the worker must be killed.
            WorkerDied: it has ended.
        """
        ends = time.monotonic() + deadline_s
        try:
            self._channel.settimeout(deadline_s)
            self._channel.sendall(json.dumps(request).encode() + b"\n")
            while b"\n" not in self._buffer:
                left = ends - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._channel.settimeout(left)
                chunk = self._channel.recv(65_536)
                if not chunk:
                    raise WorkerDied
                self._buffer += chunk
        except (BrokenPipeError, ConnectionResetError) as error:
            raise WorkerDied from error
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        self._channel.close()


class WorkerPool:
    """At most `num_workers` processes, started at first use. Thread-safe.

    Args:
        num_workers: How many comparisons run at once; more wait.
        cpu_s: Seconds of processor time that one comparison may take.
        wall_s: Seconds of the clock after which a worker is given up, from when it has the comparison.
    """

    def __init__(self, *, num_workers: int = 2, cpu_s: float = 2.0, wall_s: float = 60.0) -> None:
        if num_workers < 1 or min(cpu_s, wall_s) <= 0:
            raise ValueError(f"a pool needs workers and time, not {num_workers}, {cpu_s} s and {wall_s} s")
        self._cpu_s, self._wall_s = cpu_s, wall_s
        self._slots: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False
        self.num_killed = 0
        """Workers that were ended by a bound on their time."""

    @property
    def zygote_pid(self) -> int | None:
        """The process that forks the workers; None before the first use."""
        return self._zygote.pid if self._zygote is not None else None

    def compare(self, gold: str, answer: str) -> tuple[bool, Reason]:
        """Compare in a worker; `too_costly`, `timeout` and `worker_died` are reasons, not errors.

        What says nothing about the answer is tried once more.

        Raises:
            RuntimeError: the pool is closed, or its processes cannot be started.
        """
        result = self._compare(gold, answer)
        return self._compare(gold, answer) if result[1] in UNDECIDED else result

    def _compare(self, gold: str, answer: str) -> tuple[bool, Reason]:
        worker = self._slots.get()
        try:
            if self._closed:
                raise RuntimeError("the verifier is closed")
            if worker is None:
                worker = self._fork()
            correct, reason = worker.ask([gold, answer, self._cpu_s], self._wall_s)
            return bool(correct), reason
        except TimeoutError:
            self.num_killed += 1
            self._end(worker)
            worker = None
            return False, "timeout"
        except WorkerDied:
            code = self._end(worker)
            worker = None
            self.num_killed += code == -signal.SIGPROF
            return False, "too_costly" if code in (-signal.SIGPROF, EXCEEDED) else "worker_died"
        finally:
            self._slots.put(worker)

    def warm(self) -> None:
        """Start one worker now."""
        worker = self._slots.get()
        try:
            worker = worker or self._fork()
        finally:
            self._slots.put(worker)

    def close(self) -> None:
        """End all processes; whoever is comparing gets `worker_died`."""
        with self._lock:
            self._closed = True
            self._stop()

    def forget(self) -> None:
        """Let go of processes that belong to the process that this one was forked from."""
        self._lock = threading.Lock()
        self._slots = queue.LifoQueue()
        for _ in range(self._num_workers):
            self._slots.put(None)
        if self._control is not None:
            self._control.close()
        self._control = self._zygote = None

    def _fork(self) -> Worker:
        ours, theirs = socket.socketpair()
        try:
            with self._lock:
                pid = self._request_fork(theirs)
        except OSError as error:
            ours.close()
            raise RuntimeError(f"the math workers cannot be started: {error}") from error
        finally:
            theirs.close()
        return Worker(pid, ours)

    def _request_fork(self, descriptor: socket.socket) -> int:
        for attempt in range(2):
            control = self._control if self._control is not None else self._start()
            try:
                socket.send_fds(control, [b"F"], [descriptor.fileno()])
                return int(_line(control))
            except (BrokenPipeError, ConnectionResetError, EOFError):
                self._stop()
                if attempt:
                    raise RuntimeError(
                        "the math workers cannot be started: their parent process dies"
                    ) from None
        raise AssertionError

    def _end(self, worker: Worker | None) -> int | None:
        """End a worker that may have ended by itself: its exit code, or minus the signal; None where that is lost."""
        assert worker is not None
        worker.close()
        with self._lock:
            if self._control is None:
                return None
            try:
                self._control.sendall(b"K%d" % worker.pid)
                return int(_line(self._control))
            except (OSError, EOFError):
                self._stop()
                return None

    def _start(self) -> socket.socket:
        if self._closed:
            raise RuntimeError("the verifier is closed")
        if importlib.util.find_spec("mpmath") is None:
            raise RuntimeError("comparing irrational values needs mpmath: pip install 'polyturn[math]'")
        ours, theirs = socket.socketpair()
        packages = {name: list(sys.modules[name].__path__) for name in _PACKAGES}
        paths = json.dumps([[entry for entry in sys.path if entry], packages])
        with theirs:
            self._zygote = start_child(
                [sys.executable, "-I", "-c", _BOOT, str(theirs.fileno()), paths],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=os.sep,
            )
        ours.settimeout(START_SECONDS)
        self._control = ours
        try:
            _line(ours)
        except (EOFError, TimeoutError) as error:
            self._stop()
            raise RuntimeError("the math workers cannot be started: see the error above") from error
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._zygote is not None:
            end_child(self._zygote, wait_s=END_SECONDS)
        self._control = self._zygote = None


def _line(control: socket.socket) -> bytes:
    """One line from the zygote, which never sends more than was asked for."""
    line = b""
    while not line.endswith(b"\n"):
        chunk = control.recv(64)
        if not chunk:
            raise EOFError
        line += chunk
    return line


MEMORY_BYTES = 2 << 30
MAX_FOREIGN = 1_000
"""Characters of what math-verify is given."""
_NUMBER_CODE = re.compile(r"\s*(Integer|Float)\s*\(\s*'?([0-9]{1,400}(?:\.[0-9]{0,400})?)'?\s*\)\s*")


def main(descriptor: int) -> None:
    """Serve the owner at the other end of `descriptor` until it goes away."""
    _preload()
    control = socket.socket(fileno=descriptor)
    control.sendall(b"ready\n")
    workers: set[int] = set()
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 32, 1)
        if not request:
            break
        if request.startswith(b"F"):
            pid = os.fork()
            if pid == 0:
                control.close()
                _serve(descriptors[0], os.getppid())
            os.close(descriptors[0])
            workers.add(pid)
            control.sendall(b"%d\n" % pid)
        elif request.startswith(b"K"):
            pid = int(request[1:])
            code = 0
            if pid in workers:
                workers.remove(pid)
                code = _kill(pid)
            control.sendall(b"%d\n" % code)
    for pid in workers:
        _kill(pid)


def compare_deeply(gold: str, answer: str) -> tuple[bool, Reason]:
    """The comparison by high-precision values, and by math-verify where its LaTeX reader knows more."""
    try:
        return decide(gold, answer, deep=True)
    except Unreadable:
        if max(len(gold), len(answer)) > MAX_FOREIGN:
            return False, "too_large"
        return by_math_verify(gold, answer)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001  no text may end the comparison of another
        return False, "failed"


def by_math_verify(gold: str, answer: str) -> tuple[bool, Reason]:
    """What math-verify says, with its LaTeX reader alone: its reader of plain expressions evaluates text."""
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        return False, "unreadable"
    config = (LatexExtractionConfig(),)
    try:
        golds, answers = (
            [
                item.doit()
                for item in parse(f"${text}$", config, parsing_timeout=None)
                if hasattr(item, "doit")
            ]
            for text in (gold, answer)
        )
        if not golds or not answers:
            return False, "unreadable"
        return bool(verify(golds, answers, timeout_seconds=None)), "symbolic"
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  what a reader of LaTeX raises on what it cannot read is anything
        return False, "unreadable"


def _preload() -> None:
    import logging

    import mpmath  # noqa: F401

    logging.disable(logging.CRITICAL)
    try:
        import math_verify  # noqa: F401
        import sympy.parsing.sympy_parser as parser
    except ImportError:
        return
    # latex2sympy lets sympy `eval` the digits of a number. Here nothing is evaluated, whatever the text.
    parser.eval_expr = _number
    by_math_verify("\\int_0^1 x\\,dx", "\\frac{1}{2}")


def _number(code: str, *_: object) -> Any:
    """The number in `Integer (12 )` or `Float ('1.5' )`, in place of sympy's evaluation of that text."""
    import sympy

    found = _NUMBER_CODE.fullmatch(code)
    if found is None:
        raise ValueError("text is never evaluated here")
    return sympy.Integer(int(found[2])) if found[1] == "Integer" else sympy.Float(found[2])


def _serve(descriptor: int, zygote: int) -> NoReturn:
    """A worker's life: a JSON line in, a JSON line out."""
    # The kernel's own answer to SIGPROF ends the process, whatever code it is in.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    end_with(zygote)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = 0
    try:
        with socket.socket(fileno=descriptor) as channel, channel.makefile("rwb") as lines:
            for line in lines:
                gold, answer, cpu_s = json.loads(line)
                signal.setitimer(signal.ITIMER_PROF, cpu_s)
                result = compare_deeply(gold, answer)
                signal.setitimer(signal.ITIMER_PROF, 0)
                lines.write(json.dumps(result).encode() + b"\n")
                lines.flush()
    except (MemoryError, RecursionError):
        status = EXCEEDED
    except OSError:
        status = 1
    finally:
        os._exit(status)


def _kill(pid: int) -> int:
    """End a worker, and say how it ended; it is this process's child, so the id is still its own."""
    os.kill(pid, signal.SIGKILL)  # without effect on one that is ending already
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
