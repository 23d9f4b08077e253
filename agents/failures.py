"""What is kept of an exception that ended an attempt: one sentence, and a bounded traceback under it."""

from __future__ import annotations

import traceback

from polyturn.agents.policy import PolicyFault
from polyturn.envs.faults import EnvironmentFault
from polyturn.tools.secrets import blank_credentials

MAX_SENTENCE_CHARS = 1_000
MAX_TRACEBACK_CHARS = 4_000
UNEXPECTED_ERROR = "unexpected_error"


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
    return f"{sentence}\n{_shortened(_trace(origin), MAX_TRACEBACK_CHARS)}"


def sentence_of(text: str) -> str:
    """The sentence of a `failure_text`."""
    return text.partition("\n")[0]


def describe(error: BaseException) -> str:
    """Type and message of an exception in one line."""
    message = message_of(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def message_of(error: BaseException) -> str:
    """What an exception says, in one printable and bounded line. An exception may be written by anyone."""
    try:
        text = str(error)
    except Exception as broken:  # noqa: BLE001  a message that cannot be written must not hide what failed
        text = f"(its message cannot be written: {type(broken).__name__})"
    return " ".join(_shortened(_printable(text), MAX_SENTENCE_CHARS).split())


def _trace(error: BaseException) -> str:
    """The frames, outermost first, and the exception; of what it came from only the nearest cause is named."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    cause = error.__cause__ or error.__context__
    because = f"(after {describe(cause)})\n" if cause is not None else ""
    return _printable(f"{because}{frames}{describe(error)}")


def _printable(text: str) -> str:
    """Without credentials, and without half a surrogate pair, which can be stored nowhere.

    Every message of a failure passes here on its way to journals, logs and terminals.
    """
    return blank_credentials(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _shortened(text: str, limit: int) -> str:
    """Its beginning and its end."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {text[-half:]}"
