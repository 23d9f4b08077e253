"""CodeBreaker: find a hidden code from what each guess tells."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from polyturn.envs.messages import (
    AssistantMessage,
    ListTasks,
    Message,
    Script,
    Task,
    TaskSource,
    known_split,
    script_of,
)
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall, ToolError, ToolSpec

SPLITS = ("train", "heldout")
TRAIN_SHARE = 0.75
MAX_CODES = 100_000


class CodeBreakerEnv(ToolEnv):
    """The code is a row of digits. Each guess is answered with how many digits are in place and how many elsewhere.

    The reward is 1.0 for the code found within `max_guesses`, else 0.0.
    """

    hooks_run = "event_loop"
    is_replayable = True

    def __init__(
        self,
        *,
        length: int = 4,
        num_digits: int = 6,
        max_guesses: int = 10,
        split: str = "train",
        max_turns: int | None = None,
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            length: Digits in the code.
            num_digits: The digits are 1 to this one.
            max_guesses: Well-formed guesses.
            split: `train` or `heldout`; they share no code.
            max_turns: Messages; None leaves limits to the caller.
            tasks: Take the place of the game's own codes, which are their labels.
            render_mode: None or "ansi".

        Raises:
            ValueError: an unknown split; a size that makes no game, or too large a one.
        """
        if length < 1 or not 2 <= num_digits <= 9 or max_guesses < 1:
            raise ValueError("a game needs length >= 1, num_digits from 2 to 9 and max_guesses >= 1")
        if num_digits**length > MAX_CODES:
            raise ValueError(f"{num_digits} ** {length} codes are too many; at most {MAX_CODES:,}")
        self.length, self.num_digits, self.max_guesses = length, num_digits, max_guesses
        known_split(split, SPLITS)
        super().__init__(tasks=tasks, split=split, max_turns=max_turns, render_mode=render_mode)

    def tasks(self, split: str) -> TaskSource:
        """The codes of one split, or the tasks given to the constructor."""
        if self._given_tasks is not None:
            return self._given_tasks
        return codes(self.length, self.num_digits, self.max_guesses, known_split(split, SPLITS))

    def begin(self, task: Task) -> Sequence[Message]:
        """The rules."""
        self._num_guesses, self._solved = 0, False
        return task.messages

    @tool
    def guess(self, code: str) -> str:
        """Guess the code.

        Args:
            code: The digits in their order, for example "1234".
        """
        if len(code) != self.length or any(not "1" <= digit <= str(self.num_digits) for digit in code):
            raise ToolError(f"A guess has {self.length} digits from 1 to {self.num_digits}.")
        self._num_guesses += 1
        self.metrics["num_guesses"] = float(self._num_guesses)
        in_place, elsewhere = compare(code, self.task.label)
        left = self.max_guesses - self._num_guesses
        self._solved = in_place == self.length
        if self._solved or left == 0:
            self.finish()
        return f"{in_place} in place, {elsewhere} elsewhere. Guesses left: {left}."

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """Whether the code was guessed."""
        del message
        return {"solved": float(self._solved)}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Guesses the first code that agrees with all that was told, and so needs no knowledge of the answer."""
        del tools
        told = list(_told(messages))
        consistent = (
            code
            for code in _all_codes(self.length, self.num_digits)
            if all(compare(guess, code) == answer for guess, answer in told)
        )
        return _guessing(next(consistent))

    def random_policy(self, seed: int) -> Script:
        """Guesses codes at random."""
        rng = random.Random(seed)
        digits = "123456789"[: self.num_digits]
        return script_of(lambda: _guessing("".join(rng.choice(digits) for _ in range(self.length))))


def compare(guess: str, code: str) -> tuple[int, int]:
    """How many digits of the guess are right and in place, and how many further ones are right elsewhere."""
    in_place = sum(a == b for a, b in zip(guess, code, strict=True))
    common = sum((Counter(guess) & Counter(code)).values())
    return in_place, common - in_place


@functools.lru_cache(maxsize=8)
def codes(length: int, num_digits: int, max_guesses: int, split: str) -> ListTasks:
    """The codes of one split as tasks."""
    shuffled = list(_all_codes(length, num_digits))
    random.Random(f"code-breaker/{length}/{num_digits}").shuffle(shuffled)
    cut = max(1, min(len(shuffled) - 1, round(TRAIN_SHARE * len(shuffled))))
    rules = (
        f"I hide a code of {length} digits, each from 1 to {num_digits}; digits may repeat. "
        f"Find it with at most {max_guesses} guesses."
    )
    chosen = shuffled[:cut] if split == "train" else shuffled[cut:]
    return ListTasks([Task.from_prompt(f"{split}-{i}", rules, label=code) for i, code in enumerate(chosen)])


def _all_codes(length: int, num_digits: int) -> map[str]:
    return map("".join, itertools.product("123456789"[:num_digits], repeat=length))


def _told(messages: Sequence[Message]) -> list[tuple[str, tuple[int, int]]]:
    """The guesses so far with the answers to them."""
    guesses = [
        call["function"]["arguments"]["code"]
        for message in messages
        for call in message.get("tool_calls", ())
    ]
    answers = [message["content"].split() for message in messages if message["role"] == "tool"]
    return [(code, (int(words[0]), int(words[3]))) for code, words in zip(guesses, answers, strict=True)]


def _guessing(code: str) -> AssistantMessage:
    return AssistantMessage(tool_calls=(ToolCall(id="call_0", name="guess", arguments={"code": code}),))
