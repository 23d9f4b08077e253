"""Runs unit tests inside a sandbox. Its source is sent there; nothing of it runs in the host's process.

Two processes that share nothing but two pipes:

    tests (trusted)  -- {"call": [...], "names": {...}} -->  solution (what the model wrote)
                     <-- {"value": ..., "arguments": [...]} or {"error": [type, text]} --

The solution's process is forked first, before the tests and the nonce are read from stdin, so they are nowhere in its
memory. Values cross as tagged JSON and arrive as plain built-in values, so no object of the solution's ever meets a
test: an `__eq__`, a decorator, a patched builtin or a printed verdict of the solution's stays in its own process. The
process of the tests cannot be traced or read by the other (it is not dumpable), imports nothing from the work folder,
and writes its verdict after a nonce that only it and the host know. If it is killed there is no verdict, which the host
takes for a failure.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import io
import json
import math
import os
import select
import signal
import sys
import time
from typing import Any

MAX_LINE_BYTES = 4 << 20
MAX_DEPTH = 60
MAX_ITEMS = 200_000
MAX_FAILURES = 5
MAX_TEXT = 300
PR_SET_DUMPABLE = 4
BIG = 1 << 53


class Unspeakable(Exception):
    """A value that does not cross: not built of None, booleans, numbers, texts and containers of these."""


class SolutionGone(Exception):
    """The solution's process ended, was too slow, or talked nonsense. Every later call raises it too."""


class SolutionError(Exception):
    """An exception of the solution's that is no built-in one."""


# Values as tagged JSON: None, booleans, texts, small integers and finite floats stand for themselves, lists too;
# everything else is an object with one key.


def pack(value: Any, depth: int = 0, count: list[int] | None = None) -> Any:
    """A value as JSON; of subclasses of the built-in types only what the built-in type holds."""
    count = [0] if count is None else count
    count[0] += 1
    if depth > MAX_DEPTH or count[0] > MAX_ITEMS:
        raise Unspeakable("too deep or too large a value")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -BIG < number < BIG else {"i": hex(number)}
    if isinstance(value, float):
        real = float.__float__(value)
        return real if math.isfinite(real) else {"f": float.__repr__(real)}
    if isinstance(value, complex):
        return {"c": [pack(value.real), pack(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}

    def items(values: Any) -> list[Any]:
        return [pack(item, depth + 1, count) for item in values]

    if isinstance(value, list):
        return items(list.__iter__(value))
    if isinstance(value, tuple):
        return {"t": items(tuple.__iter__(value))}
    if isinstance(value, set):
        return {"s": items(set.__iter__(value))}
    if isinstance(value, frozenset):
        return {"z": items(frozenset.__iter__(value))}
    if isinstance(value, dict):
        return {"d": [items(pair) for pair in dict.items(value)]}
    if isinstance(value, range):
        return {"r": items((value.start, value.stop, value.step))}
    raise Unspeakable(f"a value of type {type(value).__name__}")


def unpack(data: Any) -> Any:
    """The plain value. Raises ValueError, TypeError, KeyError or RecursionError for anything else."""
    if isinstance(data, list):
        return [unpack(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((tag, content),) = data.items()
    if tag == "i":
        return int(content, 16)
    if tag == "f":
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
    if tag == "c":
        return complex(*unpack(content))
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "d":
        return {unpack(key): unpack(value) for key, value in content}
    makers: dict[str, Any] = {
        "t": tuple,
        "s": set,
        "z": frozenset,
        "r": lambda parts: range(*parts),
    }
    return makers[tag](unpack(content))


# The solution's side.


def serve(questions: int, answers: int) -> None:
    """Define what the model wrote and answer calls of it, until the questions end."""
    null = os.open(os.devnull, os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(null, target)
    first, second = sorted((questions, answers))
    os.closerange(3, first)
    os.closerange(first + 1, second)
    os.closerange(second + 1, 1 << 16)
    asked = os.fdopen(questions, "rb")
    program = json.loads(asked.readline())
    namespace: dict[str, Any] = {"__name__": "solution", "__builtins__": builtins}
    try:
        exec(compile(program["code"], "solution.py", "exec", dont_inherit=True), namespace)
        function = namespace[program["entry_point"]]
    except KeyError:
        reply(answers, {"error": ["NameError", f"there is no {program['entry_point']!r} in the solution"]})
        return
    except BaseException as error:  # noqa: BLE001  whatever the code raises is its own
        reply(answers, {"error": describe(error)})
        return
    reply(answers, {"value": None})
    for line in asked:
        question = json.loads(line)
        arguments, names = unpack(question["call"]), unpack(question["names"])
        try:
            value = function(*arguments, **names)
            answer = {"value": pack(value), "arguments": pack(arguments)}
        except BaseException as error:  # noqa: BLE001
            answer = {"error": describe(error)}
        reply(answers, answer)


def describe(error: BaseException) -> list[str]:
    try:
        text = str(error)[:MAX_TEXT]
    except BaseException:  # noqa: BLE001  an exception's own `__str__` may raise
        text = ""
    return [type(error).__name__, text]


def reply(fd: int, answer: Any) -> None:
    data = memoryview(json.dumps(answer).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


# The tests' side.


class Solution:
    """Calls a function of the other process."""

    def __init__(self, pid: int, questions: int, answers: int, deadline: float) -> None:
        self.pid, self.questions, self.answers, self.deadline = pid, questions, answers, deadline
        self.buffer = bytearray()
        self.gone = ""

    def define(self, code: str, entry_point: str) -> None:
        """Raises what the code raises at its top level."""
        self.ask({"code": code, "entry_point": entry_point})

    def __call__(self, *arguments: Any, **names: Any) -> Any:
        packed = {"call": pack(list(arguments)), "names": pack(names)}
        answer = self.ask(packed)
        try:
            value, after = unpack(answer["value"]), unpack(answer["arguments"])
            for given, changed in zip(arguments, after, strict=True):
                take_over(given, changed)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            raise self.end("it gave a value that could not be read") from None
        return value

    def ask(self, question: Any) -> Any:
        if self.gone:
            raise SolutionGone(self.gone)
        try:
            reply(self.questions, question)
            line = self.read_line()
            answer = json.loads(line)
            error = answer.get("error")
        except TimeoutError:
            raise self.end("it took too long") from None
        except (OSError, EOFError):
            raise self.end("it ended its process") from None
        except (ValueError, AttributeError, RecursionError):
            raise self.end("it gave an answer that could not be read") from None
        if error is not None:
            raise as_exception(error)
        return answer

    def read_line(self) -> bytes:
        while (end := self.buffer.find(b"\n")) < 0:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.answers], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self.answers, 1 << 16)
            if not data:
                raise EOFError
            self.buffer += data
            if len(self.buffer) > MAX_LINE_BYTES:
                raise ValueError("too long")
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        return line

    def end(self, reason: str) -> SolutionGone:
        self.gone = reason
        self.kill()
        return SolutionGone(reason)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)


def take_over(given: Any, changed: Any) -> None:
    """Functions that change their argument in place change the tests' own."""
    if type(given) is list and type(changed) is list:
        given[:] = changed
    elif type(given) in (dict, set) and type(changed) is type(given):
        given.clear()
        given.update(changed)


def as_exception(error: Any) -> Exception:
    """The built-in exception of that name; what is not an `Exception` must not end the tests."""
    name, text = (str(part) for part in error) if isinstance(error, list) and len(error) == 2 else ("", "")
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(Exception):
            return kind(text)
    return SolutionError(f"{name}: {text}")


class Scorekeeper(ast.NodeTransformer):
    """Counts every `assert`, and goes on after one that fails."""

    def __init__(self) -> None:
        self.num_asserts = 0

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.num_asserts += 1
        record = ast.parse("__passed__()").body[0]
        failed = ast.parse(f"__failed__({ast.unparse(node.test)[:MAX_TEXT]!r}, __error__)").body[0]
        handler = ast.ExceptHandler(
            type=ast.Name(id="__exception__", ctx=ast.Load()), name="__error__", body=[failed]
        )
        guarded = ast.Try(body=[node], handlers=[handler], orelse=[record], finalbody=[])
        return ast.fix_missing_locations(ast.copy_location(guarded, node))


def run_tests(job: Any, solution: Solution) -> dict[str, Any]:
    """The verdict."""
    passed, num_failed, broken = 0, 0, ""
    failures: list[str] = []

    def on_pass() -> None:
        nonlocal passed
        passed += 1

    def on_fail(test: str, error: Exception) -> None:
        nonlocal num_failed, broken
        num_failed += 1
        if isinstance(error, Unspeakable):
            broken = f"the test gives the solution {error}"
        text = str(error)[:MAX_TEXT]
        reason = (
            "" if isinstance(error, AssertionError) and not text else f" ({type(error).__name__}: {text})"
        )
        if len(failures) < MAX_FAILURES:
            failures.append(f"{test}{reason}")

    keeper = Scorekeeper()
    try:
        tree = keeper.visit(ast.parse(job["test"], "test.py"))
        program = compile(tree, "test.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        return {"broken": f"the test is no Python: {error}"}
    try:
        solution.define(job["code"], job["entry_point"])
    except Exception as error:  # noqa: BLE001
        on_fail("the solution can be loaded", error)
        return {"passed": 0, "total": max(1, keeper.num_asserts), "failures": failures, "broken": ""}
    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    try:
        exec(compile(job["preamble"], "preamble.py", "exec", dont_inherit=True), namespace)
    except Exception as error:  # noqa: BLE001
        return {"broken": f"the code before the tests failed: {type(error).__name__}: {error}"}
    namespace |= {
        "candidate": solution,
        job["entry_point"]: solution,
        "__passed__": on_pass,
        "__failed__": on_fail,
        "__exception__": Exception,
    }
    try:
        exec(program, namespace)
        if callable(namespace.get("check")):
            namespace["check"](solution)
    except Exception as error:  # noqa: BLE001
        on_fail("the tests run to their end", error)
    else:
        if not passed and not num_failed:
            if keeper.num_asserts:
                on_fail("an assertion is reached", AssertionError())
            else:
                on_pass()
    total = max(passed + num_failed, keeper.num_asserts, 1)
    return {"passed": passed, "total": total, "failures": failures, "broken": broken}


def main() -> None:
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
    solution = Solution(pid, questions[1], answers[0], deadline)
    verdict = run_tests(job, solution)
    solution.kill()
    data = f"{job['nonce']} {json.dumps(verdict)}\n".encode()
    while data:
        data = data[os.write(told, data) :]
    os._exit(0)


if __name__ == "__main__":
    main()
