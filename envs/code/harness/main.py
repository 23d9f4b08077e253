"""The two processes: the solution's is forked before the tests are read."""

from __future__ import annotations

import ctypes
import io
import json
import os
import sys
import time

PR_SET_DUMPABLE = 4


def main() -> None:
    """Reads the job from stdin, and writes the nonce twice: when it starts, and before the verdict."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, *map(ctypes.c_ulong, (0, 0, 0, 0))) != 0:
        raise SystemExit("the tests cannot be protected from the solution")
    deadline = time.monotonic() + float(sys.argv[1])
    sys.path[:] = [folder for folder in sys.path if folder.startswith(sys.base_prefix)]
    sys.path_importer_cache.clear()
    for read_end, write_end in ((questions := os.pipe()), (answers := os.pipe())):
        os.set_inheritable(read_end, False)
        os.set_inheritable(write_end, False)
    pid = os.fork()
    if pid == 0:
        try:
            from polyturn.envs.code.harness.answering import serve

            serve(questions[0], answers[1])
        finally:
            os._exit(0)
    os.close(questions[0])
    os.close(answers[1])
    job = json.loads(sys.stdin.buffer.read())
    told = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(null, target)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
    os.write(told, f"{job['nonce']} started\n".encode())

    from polyturn.envs.code.harness.asking import Solution
    from polyturn.envs.code.harness.running import run_tests

    solution = Solution(pid, questions[1], answers[0], deadline)
    verdict = run_tests(job, solution)
    solution.kill()
    data = f"{job['nonce']} {json.dumps(verdict)}\n".encode()
    while data:
        data = data[os.write(told, data) :]
    os._exit(0)
