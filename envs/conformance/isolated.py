"""The checks in a process of their own, which is killed when it hangs, dies, or takes all the memory."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import psutil

from polyturn.envs.conformance.findings import Finding, Unavailable
from polyturn.envs.conformance.runner import CHECKS, DEADLINE_S

GRACE_S = 5.0
"""What the process gets beyond a check's own deadline; then something holds the interpreter, and it is killed."""

MEMORY_BYTES = 8 << 30
"""The process, without its children, is killed when it holds more."""

_POLL_S = 0.2


def check_isolated(
    env_id: str,
    options: Mapping[str, Any] | None = None,
    *,
    checks: Sequence[str] | None = None,
    deadline_s: float = DEADLINE_S,
    num_tasks: int = 8,
    num_episodes: int = 1000,
    budget_s: float = 5.0,
) -> Iterator[Finding]:
    """Check a registered environment, each finding as it comes. `Subject` says what the sizes are.

    Raises:
        Unavailable: what the environment runs on is not there.
        ValueError: it cannot be made with these options.
    """
    left = list(CHECKS if checks is None else checks)
    while left:
        request = {
            "env_id": env_id,
            "options": dict(options or {}),
            "checks": left,
            "deadline_s": deadline_s,
            "num_tasks": num_tasks,
            "num_episodes": num_episodes,
            "budget_s": budget_s,
        }
        for finding in _run(request, left[0], deadline_s):
            yield finding
            left.remove(finding.check)


def _run(request: Mapping[str, Any], first: str, deadline_s: float) -> Iterator[Finding]:
    """One process, until it has done all checks or has come to its end in one of them."""
    with tempfile.TemporaryFile("w+") as errors, _worker(json.dumps(request), errors) as process:
        answers: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_pump, args=(process.stdout, answers), daemon=True).start()
        name = first
        while True:
            started = time.perf_counter()
            ended, line = _next_line(process, answers, deadline_s + GRACE_S)
            if line is None:
                what = (
                    ended
                    or f"the process of the check ended by itself ({_exit(process)}){_last_line(errors)}"
                )
                seconds = time.perf_counter() - started
                yield Finding(check=name, ok=False, message=what, seconds=seconds)
                return
            answer = json.loads(line)
            if "unavailable" in answer:
                raise Unavailable(answer["unavailable"])
            if "refused" in answer:
                raise ValueError(answer["refused"])
            if "end" in answer:
                return
            if "begin" in answer:
                name = answer["begin"]
            else:
                yield Finding(**answer["finding"])


@contextlib.contextmanager
def _worker(request: str, errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "polyturn.envs.conformance", request]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # The whole group: an environment's helpers must not outlive a check that was ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _next_line(
    process: subprocess.Popen[str], answers: queue.Queue[str | None], seconds: float
) -> tuple[str, str | None]:
    """Why the process had to be ended, and what it wrote: a line, or None at its end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            line = answers.get(timeout=_POLL_S)
            if line is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
            return "", line
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(process.pid).memory_info().rss > MEMORY_BYTES:
                gigabytes = MEMORY_BYTES >> 30
                return (
                    f"the process took more than {gigabytes} GiB and was killed: bound what a check reads",
                    None,
                )
    return (
        f"the process did not answer within {seconds:g} s, not even its own watchdog, and was killed: something holds "
        "the interpreter (a huge power or a regular expression, say); grade in a process that can be killed"
    ), None


def _pump(stream: IO[str], answers: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError):  # closed under the reader once the process is to end
        for line in stream:
            answers.put(line)
    answers.put(None)


def _exit(process: subprocess.Popen[str]) -> str:
    code = process.poll()
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = errors.read()[-2000:].strip().splitlines()
    return f": {lines[-1]}" if lines else ""
