"""A process that answers calls of one function: `python -m polyturn.envs.adapters.worker module:function`.

It reads a JSON list of arguments a line, and writes a JSON object a line: `{"value": ...}` or `{"error": "..."}`.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from typing import BinaryIO

MEMORY_BYTES = 4 << 30
"""Address space of a worker; what asks for more gets a MemoryError."""


def main(entry_point: str, cpu_s: int) -> None:
    """Answer calls until standard input ends. A call that burns more than `cpu_s` is ended with the process."""
    answers = _private_output()
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    module, _, name = entry_point.partition(":")
    function = getattr(importlib.import_module(module), name)
    for line in sys.stdin.buffer:
        # Also where the owner is gone and cannot kill this process any more, it ends.
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
    main(sys.argv[1], int(sys.argv[2]))
