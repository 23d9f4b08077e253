"""What goes wrong in an environment's infrastructure, as against what a model gets wrong."""

from __future__ import annotations

from typing import Self

from polyturn.tools.secrets import blank_credentials

MAX_SENTENCE_CHARS = 1_000


class EnvironmentFault(RuntimeError):
    """Something behind an environment failed: a tool's backend, a grader, a sandbox. Never a reward.

    The episode is played again or dropped, and counted.
    """

    part = ""
    """What failed, such as `tool 'search'`; empty where that is not known better than by the message."""

    def of(self, part: str) -> Self:
        """The same fault, of that part unless it is of another one already."""
        self.part = self.part or part
        return self


class UserFault(EnvironmentFault):
    """A simulated user could not be played: its model failed, or would not keep to its script."""


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
    text = printable(shortened(text, 10 * MAX_SENTENCE_CHARS))
    return " ".join(shortened(text, MAX_SENTENCE_CHARS).split())


def printable(text: str) -> str:
    """Without credentials, and without half a surrogate pair, which can be stored nowhere.

    Every message of a failure passes here on its way to journals, logs and terminals.
    """
    return blank_credentials(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def shortened(text: str, limit: int) -> str:
    """Its beginning and its end."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {text[-half:]}"
