"""What is kept of an exception that ended an attempt: one sentence, and a bounded traceback under it."""

from __future__ import annotations

import traceback

from polyturn.agents.policy import PolicyFault
from polyturn.envs.faults import EnvironmentFault, describe, message_of, printable, shortened

MAX_TRACEBACK_CHARS = 4_000
UNEXPECTED_ERROR = "unexpected_error"
PROMPT_TOO_LONG = "prompt_too_long"
LASTING = frozenset({PROMPT_TOO_LONG})
"""Stop reasons of attempts that would fail again however often they are made."""


def failure_reason(error: BaseException) -> str:
    """The stop reason of an attempt that an exception ended."""
    if isinstance(error, EnvironmentFault):
        return "environment_fault"
    return "policy_fault" if isinstance(error, PolicyFault) else UNEXPECTED_ERROR


def failure_text(error: BaseException) -> str:
    """A sentence, and in the lines under it where it came from.

    A fault says itself what failed. Of any other exception the type is named too, and the traceback is kept; so is the
    traceback of what a fault was made of.
    """
    is_fault = failure_reason(error) != UNEXPECTED_ERROR
    sentence = message_of(error) if is_fault else describe(error)
    origin = error.__cause__ if is_fault else error
    if origin is None:
        return sentence
    return f"{sentence}\n{shortened(_trace(origin), MAX_TRACEBACK_CHARS)}"


def sentence_of(text: str) -> str:
    """The sentence of a `failure_text`."""
    return text.partition("\n")[0]


def _trace(error: BaseException) -> str:
    """The frames, outermost first, and the exception; of what it came from only the nearest cause is named."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    cause = error.__cause__ or error.__context__
    because = f"(after {describe(cause)})\n" if cause is not None else ""
    return printable(f"{because}{frames}{describe(error)}")
