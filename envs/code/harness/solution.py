"""The two processes, and the solution's side of them.

The solution's is forked before the tests are read; it defines what the model wrote and answers calls of it, until the
questions end.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import json
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from polyturn.envs.code.harness.values import CLASS, DoesNotCross, Packer, reply, unpack

MAX_TEXT = 300
PR_SET_DUMPABLE = 4


def serve(questions: int, answers: int) -> None:
    """Answers over the two pipes, of which the code finds nothing else open."""
    null = os.open(os.devnull, os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(null, target)
    first, second = sorted((questions, answers))
    os.closerange(3, first)
    os.closerange(first + 1, second)
    os.closerange(second + 1, 1 << 16)
    asked = os.fdopen(questions, "rb")
    program = json.loads(asked.readline())
    sys.modules["solution"] = types.ModuleType(
        "solution"
    )  # data classes look for the module that they belong to
    namespace: dict[str, Any] = sys.modules["solution"].__dict__
    namespace["__builtins__"] = builtins
    try:
        for source in (program["imports"], program["preamble"], program["code"]):
            exec(compile(source, "solution.py", "exec", dont_inherit=True), namespace)
        function = find_function(namespace, program["entry_point"])
    except KeyError:
        reply(
            answers,
            {
                "error": [
                    [["builtins", "NameError"]],
                    f"there is no {program['entry_point']!r} in the solution",
                ]
            },
        )
        return
    except BaseException as error:  # noqa: BLE001  whatever the code raises is its own
        reply(answers, {"error": describe(error)})
        return
    reply(answers, {"value": None})
    for line in asked:
        question = json.loads(line)
        given = [question["call"], question["names"]]
        arguments, names = unpack(given)
        try:
            value = function(*arguments, **names)
            answer = {"value": tell(value), "arguments": changes([arguments, names], given)}
        except BaseException as error:  # noqa: BLE001
            answer = {"error": describe(error)}
        reply(answers, answer)


def find_function(namespace: dict[str, Any], entry_point: str) -> Callable[..., Any]:
    """The function of that name, or the method of a new instance of `Solution`. Raises KeyError."""
    name = entry_point.rpartition(".")[2]
    if name in namespace and name == entry_point:
        return namespace[name]
    owner = namespace[CLASS]
    if not hasattr(owner, name):
        raise KeyError(name)
    return lambda *arguments, **names: getattr(owner(), name)(*arguments, **names)


def tell(value: Any) -> Any:
    """The value as JSON; what does not cross is named."""
    try:
        return Packer(lenient=True).pack(value)
    except DoesNotCross:
        return {"?": type(value).__name__}


def changes(arguments: list[Any], given: Any) -> Any:
    """The arguments after the call as JSON; None where they are as they were."""
    after = tell(arguments)
    return None if after == given else after


def describe(error: BaseException) -> list[Any]:
    """An exception's classes, the most special one first, and its text."""
    try:
        text = str(error)[:MAX_TEXT]
    except BaseException:  # noqa: BLE001  an exception's own `__str__` may raise
        text = ""
    return [[[kind.__module__, kind.__qualname__] for kind in type(error).__mro__], text]


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

    from polyturn.envs.code.harness.tests import Solution, run_tests

    solution = Solution(pid, questions[1], answers[0], deadline)
    verdict = run_tests(job, solution)
    solution.kill()
    data = f"{job['nonce']} {json.dumps(verdict)}\n".encode()
    while data:
        data = data[os.write(told, data) :]
    os._exit(0)
