"""The process behind the pool: it forks workers that compare what exact arithmetic does not decide.

One parent process ("zygote") imports mpmath and math-verify once and forks a worker whenever it is asked to, so that a
killed worker is replaced in milliseconds. It speaks with its owner through a socket: `F` with a file descriptor forks a
worker that serves JSON lines on that descriptor, and answers its process id; `K` and an id ends that worker, and
answers how it ended. The kernel ends a worker whose comparison takes more processor time than it may. The end of the
socket is the end of the owner: the zygote kills its workers and exits, and workers die with the zygote.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import socket
import sys
from typing import Any, NoReturn

from polyturn.envs.rewards.math.decide import decide
from polyturn.envs.rewards.math.pool import EXCEEDED
from polyturn.envs.rewards.math.verdict import Reason, Unreadable

MEMORY_BYTES = 2 << 30
MAX_FOREIGN = 1_000
"""Characters of what math-verify is given."""
_PR_SET_PDEATHSIG = 1
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
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote:
        os._exit(0)
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


if __name__ == "__main__":
    main(int(sys.argv[1]))
