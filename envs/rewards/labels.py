"""Whether a label can be paid at all, found out before anything is played."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from polyturn.envs.messages import AssistantMessage, Task
from polyturn.envs.rewards.types import EpisodeView, as_score


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
