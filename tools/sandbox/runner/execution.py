"""One execution, as the runner sees it: start, streams, deadline, end, clean-up of every process it left."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .confine import Confinement
from .framing import Decoder, FramingError, encode_header, write_all
from .job import in_child, run_many, run_once
from .streams import Streams

KILL_DEADLINE_S = 2.0
NUM_ROUNDS = 200


class Children:
    """Notices the end of children: a descriptor that becomes readable, and the statuses."""

    def __init__(self) -> None:
        self.wakeup, self._signalled = os.pipe()
        os.set_blocking(self.wakeup, False)
        os.set_blocking(self._signalled, False)
        signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._statuses: dict[int, int] = {}
        self._watched: set[int] = set()
        self._unwatched: deque[tuple[int, int]] = deque(maxlen=64)

    def watch(self, pid: int) -> None:
        """The status of this child is going to be asked for; of others only the latest few are kept."""
        self._watched.add(pid)
        for ended, status in tuple(self._unwatched):
            if ended == pid:  # it ended before anyone could say that it matters
                self._unwatched.remove((ended, status))
                self._keep(ended, status)

    def collect(self) -> None:
        """Reaps whatever has ended; never waits."""
        try:
            while os.read(self.wakeup, 4096):
                pass
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._keep(pid, status)

    def wait_for_all(self) -> None:
        """Waits until no child is left; all have been killed before."""
        while True:
            try:
                self._keep(*os.waitpid(-1, 0))
            except ChildProcessError:
                return

    def status(self, pid: int) -> int | None:
        """The exit status of a watched child (minus the signal's number), None while it lives."""
        return self._statuses.get(pid)

    def forget(self, pid: int) -> None:
        """Nobody asks for this child any more."""
        self._watched.discard(pid)
        self._statuses.pop(pid, None)

    def _keep(self, pid: int, status: int) -> None:
        if pid in self._watched:
            self._statuses[pid] = os.waitstatus_to_exitcode(status)
        else:
            self._unwatched.append((pid, status))

    def kill_all(self) -> None:
        """Kills every process in the sandbox but the runner, and waits for the end of all."""
        # Outside a PID namespace this would end the machine's every process; `serve` refuses to run there.
        assert os.getpid() == 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # never this process itself
        self.wait_for_all()

    def kill_all_but(self, keep: int) -> bool:
        """Kills every process but `keep` and the runner; False where `keep` had to be killed, too.

        Processes that fork all the time are stopped before they are killed: stopped ones hold the places that the
        limit of processes leaves, so no new ones come up.
        """
        spared = {1, os.getpid(), keep}
        end = time.monotonic() + KILL_DEADLINE_S
        stopped: set[int] = set()
        for _ in range(NUM_ROUNDS):
            new = processes() - spared - stopped
            if not new:
                break
            for pid in new:
                _signal(pid, signal.SIGSTOP)
            stopped |= new
        while time.monotonic() < end:
            self.collect()
            left = processes() - spared
            if not left:
                return self.status(keep) is None
            for pid in left:
                _signal(pid, signal.SIGKILL)
            select.select([self.wakeup], [], [], 0.002)
        self.kill_all()
        return False


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used; 0 where it has gone."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def processes() -> set[int]:
    """All processes but zombies, which may wait for a parent that is stopped."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit() and _is_running(name)}


def _is_running(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    state, num_threads = fields[0], int(fields[17])
    return state not in "ZX" or num_threads > 1  # whose first thread alone may have ended


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


SCRATCH_FOLDERS = ("/tmp", "/dev/shm")
CPU_CHECK_S = 0.25
"""How often CPU time is looked at. The kernel's own limit is one that code may ignore for a second, or lift."""
NAMES_LOST = "the persistent interpreter was killed and its names are lost"


class HostGone(Exception):
    """The host closed the connection while code ran."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What the runner knows of the code to run: neither the program nor its stdin, which wait on the host's link."""

    program_bytes: int
    stdin_bytes: int
    timeout_s: float


class Interpreter:
    """The persistent interpreter, stopped while it has nothing to do."""

    def __init__(self, pid: int, link: socket.socket) -> None:
        self.pid = pid
        self.link = link

    def ask(self, theirs: tuple[int, ...]) -> None:
        """Wakes it and hands it the descriptors of a program and its streams. Raises OSError where it is gone."""
        os.kill(self.pid, signal.SIGCONT)
        self.link.setblocking(True)
        socket.send_fds(self.link, [b"x"], theirs)
        self.link.setblocking(False)

    def answer(self, decoder: Decoder) -> int | None:
        """The exit status, when it has come. Raises EOFError or FramingError where the link is broken."""
        try:
            data = self.link.recv(4096)
        except BlockingIOError:
            return None
        except ConnectionError:
            raise EOFError from None
        if not data:
            raise EOFError
        decoder.feed(data)
        frame = decoder.next_frame()
        if frame is None:
            return None
        status = frame[0].get("exit_code")
        if not isinstance(status, int):
            raise FramingError("no exit code")
        return status


class Executor:
    """Runs code, one piece at a time."""

    def __init__(self, confinement: Confinement, namespace: dict[str, Any], host: int) -> None:
        """`host` is the descriptor whose end means that nobody waits for the results; code runs in copies of
        `namespace`."""
        self._confinement = confinement
        self._namespace = namespace
        self.config = confinement.config
        self._host = host
        self._children = Children()
        self._interpreter: Interpreter | None = None

    def run(self, question: Question, answers: int, *, fresh: bool) -> None:
        """Takes the rest of an `exec` question from the link and writes the answer to `answers`.

        Raises HostGone, and EOFError where the link ends.
        """
        start = time.monotonic()
        streams = Streams(self._host, question.program_bytes, question.stdin_bytes, self.config.output_bytes)
        try:
            execution = self._run_fresh if fresh else self._run_persistent
            outcome = execution(question, streams, start)
            _keep_open(self.config.work)
            failed = outcome["status"] == "ok" and outcome["exit_code"] == 1
            if failed and streams.ended_by_memory_error():
                detail = "MemoryError: the code needed more memory than it may use"
                outcome |= {"status": "oom", "detail": detail}
            stdout, stderr = streams.sizes
            header = {
                **outcome,
                "seconds": time.monotonic() - start,
                "stdout": stdout,
                "stderr": stderr,
                "left_files": any(map(_holds_something, (self.config.work, *SCRATCH_FOLDERS))),
            }
            streams.finish()
            write_all(answers, encode_header(header, stdout + stderr))
            streams.write_to(answers)
        finally:
            streams.close()

    def _fork(self, streams: Streams | None, work: Callable[[int], int]) -> tuple[int, int]:
        """A child's pid, and the descriptor where it tells of a failed set-up."""
        failure, setup = os.pipe()
        pid = os.fork()
        if pid == 0:
            in_child(setup, lambda: work(setup))
        os.close(setup)
        self._children.watch(pid)
        if streams is not None:
            streams.after_fork()
        return pid, failure

    def _run_fresh(self, question: Question, streams: Streams, start: float) -> dict[str, Any]:
        def work(setup: int) -> int:
            return run_once(self._confinement, self._namespace, streams.theirs, setup, streams.program)

        try:
            pid, failure = self._fork(streams, work)
        except OSError as error:
            return _outcome("setup_error", detail=f"fork: {error}")
        try:
            streams.watch(self._children.wakeup, select.POLLIN)
            reason = self._wait(
                streams, start + question.timeout_s, lambda: self._children.status(pid) is not None, {}
            )
            lost = self._clean_up(kill_interpreter=False, main=pid)
            streams.drain()
            status = self._children.status(pid)
            problem = os.read(failure, 4096).decode(errors="replace")
        finally:
            os.close(failure)
            self._children.forget(pid)
        if problem:
            return _outcome("setup_error", detail=problem)
        outcome = self._judge(reason, streams, status, question)
        if lost:
            outcome["detail"] = _join(outcome["detail"], NAMES_LOST)
        return outcome

    def _run_persistent(self, question: Question, streams: Streams, start: float) -> dict[str, Any]:
        self._children.collect()
        was_lost = ""
        if self._interpreter is not None and self._children.status(self._interpreter.pid) is not None:
            self._drop_interpreter()
            was_lost = "the persistent interpreter had ended, so its names are lost and a new one was started"
        if self._interpreter is None:
            problem = self._start_interpreter()
            if problem:
                return _outcome("setup_error", detail=problem)
        assert self._interpreter is not None
        interpreter = self._interpreter
        decoder = Decoder(max_header_bytes=1024, max_body_bytes=0)
        statuses: list[int] = []
        broken = False

        def is_done() -> bool:
            nonlocal broken
            if self._children.status(interpreter.pid) is not None:
                return True
            try:
                status = interpreter.answer(decoder)
            except (EOFError, FramingError):
                broken = True
                return True
            if status is not None:
                statuses.append(status)
            return status is not None

        try:
            used_before = {interpreter.pid: cpu_seconds(interpreter.pid)}
            interpreter.ask((*streams.theirs, streams.program))
        except OSError as error:
            self._clean_up(kill_interpreter=True)
            return _outcome(
                "setup_error", detail=f"the persistent interpreter did not answer ({error}); {NAMES_LOST}"
            )
        finally:
            streams.after_fork()
        streams.watch(self._children.wakeup, select.POLLIN)
        streams.watch(interpreter.link.fileno(), select.POLLIN)
        reason = self._wait(streams, start + question.timeout_s, is_done, used_before)
        if broken and not statuses:
            # It closed its link: by ending, whose status is on its way, or on purpose, which makes it useless.
            self._wait_for_end(interpreter.pid)
        ended = self._children.status(interpreter.pid)
        alive = reason == "done" and bool(statuses) and ended is None
        lost = self._clean_up(kill_interpreter=not alive) or not alive
        streams.drain()
        status = statuses[0] if statuses else ended
        outcome = self._judge(reason, streams, status, question)
        if lost:
            outcome["detail"] = _join(
                outcome["detail"],
                NAMES_LOST
                if ended is None
                else "the code ended the persistent interpreter, so its names are lost",
            )
        outcome["detail"] = _join(was_lost, outcome["detail"])
        return outcome

    def _start_interpreter(self) -> str:
        """Starts a persistent interpreter; what went wrong, or nothing."""
        ours, its = socket.socketpair()
        try:
            pid, failure = self._fork(
                None, lambda setup: run_many(self._confinement, self._namespace, its, setup)
            )
        except OSError as error:
            ours.close()
            return f"fork: {error}"
        finally:
            its.close()
        with os.fdopen(failure, "rb") as stream:
            problem = stream.read(4096).decode(errors="replace")  # ends when the interpreter is ready
        self._interpreter = Interpreter(pid, ours)
        if problem:
            self._clean_up(kill_interpreter=True)
        return problem

    def _wait(
        self,
        streams: Streams,
        deadline: float,
        is_done: Callable[[], bool],
        used_before: dict[int, float],
    ) -> str:
        """Moves bytes until the code is done, wrote too much, or ran out of time: done, output, timeout or cpu.

        `used_before` is the CPU time of processes that are older than the execution.
        """
        next_check = time.monotonic() + CPU_CHECK_S
        while True:
            events = streams.step(min(deadline, next_check) - time.monotonic())
            if self._host in events:
                raise HostGone
            if self._children.wakeup in events:
                self._children.collect()
            if streams.overflowed:
                return "output"
            if is_done():
                return "done"
            if time.monotonic() >= deadline:
                return "timeout"
            if time.monotonic() >= next_check:
                if self.config.rlimits and self._used_up(used_before):
                    return "cpu"
                next_check = time.monotonic() + CPU_CHECK_S

    def _used_up(self, used_before: dict[int, float]) -> bool:
        """Whether any process has had its CPU seconds."""
        allowed = self.config.cpu_s
        return any(
            cpu_seconds(pid) - used_before.get(pid, 0.0) > allowed
            for pid in processes()
            if pid != os.getpid()
        )

    def _wait_for_end(self, pid: int) -> None:
        deadline = time.monotonic() + 0.1
        while self._children.status(pid) is None and time.monotonic() < deadline:
            select.select([self._children.wakeup], [], [], 0.01)
            self._children.collect()

    def _clean_up(self, *, kill_interpreter: bool, main: int | None = None) -> bool:
        """Kills what the code left behind; whether the interpreter's names were lost although it should have lived."""
        interpreter = self._interpreter
        if not self.config.kill_all and not kill_interpreter:
            if main is not None and self._children.status(main) is None:
                os.kill(main, signal.SIGKILL)
                self._wait_for_end(main)
            return False
        if interpreter is None or kill_interpreter:
            self._children.kill_all()
            self._drop_interpreter()
            return False
        if self._children.kill_all_but(interpreter.pid):
            os.kill(interpreter.pid, signal.SIGSTOP)
            return False
        self._drop_interpreter()
        return True

    def _drop_interpreter(self) -> None:
        if self._interpreter is not None:
            self._children.forget(self._interpreter.pid)
            self._interpreter.link.close()
            self._interpreter = None

    def _judge(self, reason: str, streams: Streams, status: int | None, question: Question) -> dict[str, Any]:
        """The status of an execution that was set up."""
        if streams.overflowed:
            limit = self.config.output_bytes
            return _outcome("output_limit", detail=f"it wrote more than the {limit} bytes that it may write")
        if reason == "timeout":
            return _outcome("timeout", detail=f"it ran longer than {question.timeout_s:g} s")
        if reason == "cpu" or status == -signal.SIGXCPU:
            return _outcome("timeout", detail=f"it used more than {self.config.cpu_s} s of CPU time")
        return _outcome("ok", exit_code=status)


def _outcome(status: str, *, exit_code: int | None = None, detail: str = "") -> dict[str, Any]:
    return {"status": status, "exit_code": exit_code, "detail": detail}


def _join(*sentences: str) -> str:
    return "; ".join(sentence for sentence in sentences if sentence)


def _holds_something(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:  # not there, or closed to the runner
        return os.path.exists(folder)


def _keep_open(folder: str) -> None:
    """Code that owns its work folder may have closed it to its owner, and so to the runner and to the code after it."""
    status = os.stat(folder)
    if status.st_uid == os.getuid() and status.st_mode & 0o700 != 0o700:
        os.chmod(folder, 0o700)
