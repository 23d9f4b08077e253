"""The function under test as the tests see it: calls of it are questions to the other process."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

from polyturn.envs.code.harness.answering import reply
from polyturn.envs.code.harness.values import DoesNotCross, Packer, take_over, unpack

MAX_LINE_BYTES = 64 << 20
FRAMEWORKS = ("unittest", "polyturn", "__main__")
"""What runs tests steers itself with exceptions, too, which are not the solution's to raise: one skips a test."""


class SolutionEnded(BaseException):
    """The solution's process ended, was too slow, or talked nonsense; every later call raises it too.

    Not an `Exception`: a test that expects one must not take this for it. Nor is it enough that nothing catches it: see
    `Solution.ended`, which a verdict reads.
    """


class TestsBroken(BaseException):
    """The tests cannot be run, whatever the solution does."""


class SolutionError(Exception):
    """An exception of the solution's whose class the tests do not know."""


class SolutionStopped(BaseException):
    """The same where it is no `Exception`."""


class StoppedIteration(RuntimeError):
    """The solution raised what ends loops. As it is, it would end a test's own: `all(map(f, values))` would be true."""


class Solution:
    """Calls a function of the other process."""

    def __init__(self, pid: int, questions: int, answers: int, deadline: float) -> None:
        self.pid, self.questions, self.answers, self.deadline = pid, questions, answers, deadline
        self.buffer = bytearray()
        self.ended = ""
        """Why there is no solution any more; a verdict with this is a failure, whatever the tests made of it."""
        self.broken = ""
        """What makes the tests impossible."""
        self.num_calls = 0
        self.num_values = 0
        """Calls that gave something back: from then on, what a test does may be the solution's doing."""
        self.exceptions: dict[str, Any] = {}
        """Names of the tests, among them those of exception classes that tests and solution both know."""
        self.__name__ = "candidate"

    def define(self, job: Any) -> None:
        """Raises what the code raises at its top level."""
        self.__name__ = job["entry_point"].rpartition(".")[2]
        self.ask({key: job[key] for key in ("imports", "preamble", "code", "entry_point")})

    def __call__(self, *arguments: Any, **names: Any) -> Any:
        self.num_calls += 1
        call, named = self.pack([list(arguments), names])
        answer = self.ask({"call": call, "names": named})
        self.num_values += 1
        try:
            value = unpack(answer["value"])
            if answer["arguments"] is not None:
                after, names_after = unpack(answer["arguments"])
                for given, changed in zip(arguments, after, strict=True):
                    take_over(given, changed)
                for name, changed in names_after.items():
                    take_over(names[name], changed)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError):
            raise self.end("it gave a value that could not be read") from None
        return value

    def pack(self, given: list[Any]) -> Any:
        """As JSON. What does not cross is the tests' fault, until the solution has given them something to hand on."""
        try:
            return Packer(lenient=False).pack(given)
        except DoesNotCross as error:
            if self.num_values == 0 and not self.ended:
                self.broken = f"the test gives the solution {error}"
                raise TestsBroken(self.broken) from None
            raise self.end(f"it would be given {error}") from None

    def ask(self, question: Any) -> Any:
        if self.ended:
            raise SolutionEnded(self.ended)
        try:
            reply(self.questions, question)
            answer = json.loads(self.read_line())
            error = answer.get("error")
        except TimeoutError:
            raise self.end("it took too long") from None
        except (OSError, EOFError):
            raise self.end("it ended its process") from None
        except (ValueError, AttributeError, RecursionError, MemoryError):
            raise self.end("it gave an answer that could not be read") from None
        if error is not None:
            self.num_values += 1
            raise self.as_exception(error)
        return answer

    def read_line(self) -> bytes:
        while (end := self.buffer.find(b"\n")) < 0:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.answers], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self.answers, 1 << 20)
            if not data:
                raise EOFError
            self.buffer += data
            if len(self.buffer) > MAX_LINE_BYTES:
                raise ValueError("too long")
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        return line

    def end(self, reason: str) -> SolutionEnded:
        """Ends the solution for good; the exception to raise."""
        self.ended = reason
        self.kill()
        return SolutionEnded(reason)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)

    def as_exception(self, error: Any) -> BaseException:
        """An exception of the nearest class that the tests know, too."""
        try:
            kinds, text = error
            named = [(str(module), str(name)) for module, name in kinds]
            text = str(text)
        except (TypeError, ValueError):
            return self.end("it gave an answer that could not be read")
        for module, name in named:
            kind = self.find_kind(module, name)
            if kind is None:
                continue
            if issubclass(kind, (StopIteration, StopAsyncIteration)):
                return StoppedIteration(text)
            text_with_name = f"{named[0][1]}: {text}"
            if kind is Exception:
                return Exception(text) if name == named[0][1] else SolutionError(text_with_name)
            if kind is BaseException:
                return SolutionStopped(text_with_name)
            with contextlib.suppress(Exception):  # some want other arguments than a text
                return kind(text)
        return SolutionError(text)

    def find_kind(self, module: str, name: str) -> type[BaseException] | None:
        """A class of exceptions by its name: a built-in one, one that the tests have, or one of a loaded module."""
        if module == "builtins":
            kind = getattr(builtins, name, None)
        elif module == "solution":
            kind = self.exceptions.get(name)
        else:
            kind = getattr(sys.modules.get(module), name, None)
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            return None
        return None if kind.__module__.partition(".")[0] in FRAMEWORKS else kind
