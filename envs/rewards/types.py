"""What a reward is: one signature for rules, classes, services and rubrics; and whether it can pay a label."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from polyturn.envs.messages import AssistantMessage, Message, Task
from polyturn.tools.plain import MAX_SIZE, as_number, clean_text, shown

if TYPE_CHECKING:
    from polyturn.envs.messages import Task

SIGNATURE = "def reward(episode: EpisodeView) -> float | Mapping[str, float]"
GROUP_SIGNATURE = "def reward(episodes: Sequence[EpisodeView]) -> Sequence[float | Mapping[str, float]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeView:
    """What a reward sees of an episode that has come to its end."""

    task: Task
    message: AssistantMessage
    """The last assistant message: the answer."""
    messages: tuple[Message, ...]
    """The whole conversation, the answer included."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the environment counted."""
    reward: float | None = None
    """The reward so far: None for the reward of an episode, its value for a group reward."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """The parts of the environment's own grade where the reward asks for it, or all parts for a group reward."""

    @property
    def answer(self) -> str:
        """The text of the last assistant message."""
        return self.message.content

    @property
    def label(self) -> Any:
        """What the task is graded against."""
        return self.task.label


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A reward with the raw values that it was made of."""

    value: float
    parts: Mapping[str, float]
    """Recorded as they are: a weight changes `value` and not the part."""


Grade = Mapping[str, float] | Score
"""What an environment's own grade is: numbers by name, whose sum is the reward; or both apart."""

RewardValue = float | Mapping[str, float] | Score
"""A number; numbers by name, whose sum is the reward; or both apart."""


class Reward(Protocol):
    """Scores one episode. May be `async`. An exception is an `EnvironmentFault`, never a reward of 0.

    With an attribute `uses_environment_grade` that is true, `episode.reward_parts` holds the environment's own grade.
    """

    def __call__(self, episode: EpisodeView, /) -> RewardValue | Awaitable[RewardValue]: ...


class GroupReward(Protocol):
    """Scores all episodes of one task together, one value for each, in their order. May be `async`."""

    def __call__(
        self, episodes: Sequence[EpisodeView], /
    ) -> Sequence[RewardValue] | Awaitable[Sequence[RewardValue]]: ...


def as_score(value: Any, *, name: str | None = "reward") -> Score:
    """A reward's value with its parts; a bare number is a part called `name`, and refused where that is None.

    Raises:
        ValueError: it is no finite number, or mapping of such.
    """
    # What nearly every grade returns, at a third of the price of looking at it in full.
    if type(value) is dict:
        quick = 0.0
        for key, part in value.items():
            if (
                type(key) is not str
                or not key.isascii()
                or type(part) is not float
                or not -MAX_SIZE <= part <= MAX_SIZE
            ):
                break
            quick += part
        else:
            return Score(value=quick, parts=value.copy())
    given = value.parts if isinstance(value, Score) else value
    if not isinstance(given, Mapping):
        if name is None:
            raise ValueError(f"it must return finite numbers by name, not {shown(value, limit=200)}")
        given = {name: given}
    try:
        parts = {_name(key): as_number(part) for key, part in given.items()}
        total = as_number(value.value) if isinstance(value, Score) else sum(parts.values())
    except ValueError as error:
        raise ValueError(
            f"it must return a finite number, or finite numbers by name, not {shown(value, limit=200)}: {error}"
        ) from error
    return Score(value=total, parts=parts)


def is_async(function: Any) -> bool:
    """Whether calling it gives something to await: an `async` function, an object with an `async __call__`, or one that
    says so by an attribute `is_async`.
    """
    if getattr(function, "is_async", False):
        return True
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  the method itself is wanted
    )


def _name(key: Any) -> str:
    return clean_text(key) if isinstance(key, str) else shown(key)


def check_label(reward: Any, label: Any) -> None:
    """Raise `ValueError` for a label that a reward cannot grade against, or for which it pays no answer.

    A reward says the first by a method `check_label(label)`. One with a method `right_answer(label)`, the text of a
    right answer, is asked to grade that; a reward without either takes any label.
    """
    check = getattr(reward, "check_label", None)
    if check is not None:
        check(label)
    right_answer = getattr(reward, "right_answer", None)
    if right_answer is None or (answer := right_answer(label)) is None:
        return
    message = AssistantMessage(content=answer)
    task = Task.from_prompt("label", "", label=label)
    value = reward(EpisodeView(task=task, message=message, messages=(message.to_message(),)))
    assert not isinstance(value, Awaitable), "a reward that says what is right is not asynchronous"
    name = getattr(reward, "name", "reward")
    if not as_score(value, name=name).value > 0:
        raise ValueError(
            f"{name}: no answer can be paid for the label {label!r:.100}: the answer {answer!r:.100} is not"
        )
