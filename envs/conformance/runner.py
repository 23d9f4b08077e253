"""Runs the checks of the conformance kit on an environment, in this process or in one that can be killed.

That process is killed when it hangs, dies, or takes all the memory; it answers in JSON lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from polyturn.envs.conformance.grading import check_faults, check_oracle, check_random
from polyturn.envs.conformance.hacks import check_hard_answers, check_reward_hacks
from polyturn.envs.conformance.interface import (
    check_append_only,
    check_concurrency,
    check_end,
    check_global_random_state,
    check_gymnasium,
    check_replay,
    check_seeds,
    check_spaces,
    check_splits,
    check_vector,
)
from polyturn.envs.conformance.resources import check_close, check_leaks, check_speed
from polyturn.envs.conformance.subject import Finding, Nonconforming, Subject, Unavailable, within
from polyturn.envs.registry import make
from polyturn.tools.children import end_child, end_with, start_child

Check = Callable[[Subject], str]

CHECKS: Mapping[str, Check] = {
    "gymnasium": check_gymnasium,
    "splits": check_splits,
    "spaces": check_spaces,
    "oracle": check_oracle,
    "random": check_random,
    "seeds": check_seeds,
    "replay": check_replay,
    "global_random_state": check_global_random_state,
    "append_only": check_append_only,
    "end": check_end,
    "faults": check_faults,
    "reward_hacks": check_reward_hacks,
    "hard_answers": check_hard_answers,
    "vector": check_vector,
    "concurrency": check_concurrency,
    "close": check_close,
    "leaks": check_leaks,
    "speed": check_speed,
}
"""Every check by name, in the order in which they run. A check returns what it saw, or raises `Nonconforming`."""

DEADLINE_S = 120.0
GRACE_S = 5.0
"""What the process gets beyond a check's own deadline; then something holds the interpreter, and it is killed."""

MEMORY_BYTES = 8 << 30
"""The process, without its children, is killed when it holds more."""

_POLL_S = 0.2


def run_check(name: str, subject: Subject, *, deadline_s: float = DEADLINE_S) -> Finding:
    """Run one check.

    Raises:
        Unavailable: what the environment runs on is not there.
    """
    started = time.perf_counter()
    hung = f"the check did not end within {deadline_s:g} s: something in the environment hangs"
    try:
        ok, message = True, within(deadline_s, lambda: CHECKS[name](subject), hung)
    except Nonconforming as found:
        _reraise_if_unavailable(found)
        ok, message = False, str(found)
    except Exception as error:  # noqa: BLE001  an environment under test may fail in any way
        _reraise_if_unavailable(error)
        ok, message = False, f"{type(error).__name__}: {error}{_where(error)}"
    return Finding(check=name, ok=ok, message=message, seconds=time.perf_counter() - started)


def check_environment(
    subject: Subject, *, checks: Iterable[str] | None = None, deadline_s: float = DEADLINE_S
) -> Iterator[Finding]:
    """Run the checks of those names, or all, one after the other.

    Raises:
        Unavailable: what the environment runs on is not there.
    """
    for name in CHECKS if checks is None else checks:
        yield run_check(name, subject, deadline_s=deadline_s)


def is_unavailable(error: BaseException) -> bool:
    """Whether an error says that a sandbox cannot run here, or that an optional package is to be installed."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    # By name: this module imports no sandbox.
    if any(type(cause).__name__ == "SandboxUnavailable" for cause in causes):
        return True
    says_how_to_install = any("pip install" in str(cause) for cause in causes)
    return says_how_to_install and any(isinstance(cause, ImportError) for cause in causes)


def _reraise_if_unavailable(error: BaseException) -> None:
    if is_unavailable(error):
        raise Unavailable(str(error)) from error


def _where(error: BaseException) -> str:
    """The innermost place outside of this kit."""
    trace = error.__traceback__
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if Path(code.co_filename).parent != Path(__file__).parent:
            place = f" (in {code.co_name}, {code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


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
            "owner": os.getpid(),
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
    command = [sys.executable, "-c", f"from {__name__} import answer; answer()", request]
    process = start_child(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    try:
        yield process
    finally:
        # The whole group: an environment's helpers must not outlive a check that was ended.
        end_child(process)
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


def answer() -> None:
    """The other process: run the checks of the request on the command line."""
    # Whatever an environment prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request: dict[str, Any] = json.loads(sys.argv[1])
    end_with(request["owner"])
    subject = Subject(
        name=request["env_id"],
        make=lambda: make(request["env_id"], **request["options"]),
        num_tasks=request["num_tasks"],
        num_episodes=request["num_episodes"],
        budget_s=request["budget_s"],
    )
    _serve(subject, request, answers)
    print(json.dumps({"end": True}), file=answers, flush=True)
    os._exit(0)  # threads and exit handlers of an environment are not waited for


def _serve(subject: Subject, request: dict[str, Any], answers: IO[str]) -> None:
    try:
        with subject.open():
            pass
    except ValueError as error:
        kind = "unavailable" if is_unavailable(error) else "refused"
        print(json.dumps({kind: str(error)}), file=answers)
        return
    except Exception as error:
        if not is_unavailable(error):
            raise
        print(json.dumps({"unavailable": str(error)}), file=answers)
        return
    for name in request["checks"]:
        print(json.dumps({"begin": name}), file=answers)
        try:
            finding = run_check(name, subject, deadline_s=request["deadline_s"])
        except Unavailable as reason:
            print(json.dumps({"unavailable": str(reason)}), file=answers)
            return
        print(json.dumps({"finding": dataclasses.asdict(finding)}), file=answers)
        if any(thread.name == "conformance check" for thread in threading.enumerate()):
            return  # something still hangs; the next check gets a process without it
