"""Gymnasium's discrete and text spaces in words: what an observation says, and which action a reply means."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import Space, spaces

_NUMBER = re.compile(r"(?<![\w.])-?\d{1,9}(?!\w|\.\d)")
_TAIL = 2000
"""How much of the end of a reply is read: an action is short."""


class NoAction(ValueError):
    """A reply that is no action; the text tells the model what one is."""


def observation_text(space: Space[Any], observation: Any) -> str:
    """An observation in words. Text stays as it is; whatever is made of numbers becomes a list of them."""
    if isinstance(observation, str):
        return observation
    if isinstance(space, spaces.Dict) and isinstance(observation, Mapping):
        return "\n".join(
            f"{name}: {observation_text(part, observation[name])}" for name, part in space.items()
        )
    if isinstance(space, spaces.Tuple):
        return ", ".join(
            observation_text(part, value) for part, value in zip(space.spaces, observation, strict=True)
        )
    if isinstance(observation, (np.ndarray, np.generic)):
        return str(observation.tolist())
    return str(observation)


def action_reader(space: Space[Any], names: Sequence[str] = ()) -> Callable[[str], Any]:
    """A function from replies to actions; it raises `NoAction` for one that means none.

    A reply may say more than the action: its last name or number counts.

    Args:
        space: `Text`, `Discrete`, `MultiDiscrete` or `MultiBinary`, or a space of one's own that contains texts.
        names: What the actions of a `Discrete` space are called, from its first on.

    Raises:
        ValueError: actions of this space cannot be written in text, or there are not as many names as actions.
    """
    if isinstance(space, spaces.Discrete):
        if names and len(names) != space.n:
            raise ValueError(f"there are {space.n} actions, but {len(names)} names for them")
        return lambda text: _discrete(space, names, text)
    if names:
        raise ValueError(f"only the actions of a Discrete space have names, not those of {space}")
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)):
        return lambda text: _several(space, text)
    # Box would warn of the question.
    if not isinstance(space, spaces.Text) and (isinstance(space, spaces.Box) or not space.contains("a")):
        raise ValueError(
            f"a reply cannot be an action of {space}: Text, Discrete, MultiDiscrete and MultiBinary can be written"
        )
    return lambda text: _text(space, text)


def action_text(space: Space[Any], action: Any, names: Sequence[str] = ()) -> str:
    """The reply that means an action."""
    if names and isinstance(space, spaces.Discrete):
        return names[int(action) - int(space.start)]
    return action if isinstance(action, str) else " ".join(str(part) for part in np.ravel(action))


def describe_actions(space: Space[Any], names: Sequence[str] = ()) -> str:
    """One sentence on how to act."""
    if names:
        return f"Answer with one of: {', '.join(names)}."
    if isinstance(space, spaces.Discrete):
        return f"Answer with a number from {space.start} to {space.start + space.n - 1}."
    if isinstance(space, spaces.MultiDiscrete):
        ranges = ", ".join(
            f"{low} to {low + n - 1}"
            for low, n in zip(np.ravel(space.start), np.ravel(space.nvec), strict=True)
        )
        return f"Answer with {space.nvec.size} numbers: {ranges}."
    if isinstance(space, spaces.MultiBinary):
        return f"Answer with {int(np.prod(space.shape))} numbers, each 0 or 1."
    return "Answer with a text."


def _discrete(space: spaces.Discrete, names: Sequence[str], text: str) -> Any:
    tail = text[-_TAIL:]
    if names:
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        if found := re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", tail, re.IGNORECASE):
            lower = [name.lower() for name in names]
            return space.start + lower.index(found[-1].lower())
    numbers = _NUMBER.findall(tail)
    if numbers and (action := space.dtype.type(int(numbers[-1]))) in space:  # type: ignore[union-attr]
        return action
    raise NoAction(f"That is no action. {describe_actions(space, names)}")


def _several(space: spaces.MultiDiscrete | spaces.MultiBinary, text: str) -> Any:
    size = int(np.prod(space.shape))
    numbers = [int(number) for number in _NUMBER.findall(text[-_TAIL:])][-size:]
    if len(numbers) == size:
        action = np.array(numbers, dtype=np.int64).astype(space.dtype).reshape(space.shape)
        if np.array_equal(action.ravel(), numbers) and space.contains(action):
            return action
    raise NoAction(f"That is no action. {describe_actions(space)}")


def _text(space: Space[Any], text: str) -> str:
    stripped = text.strip()
    if not space.contains(stripped):
        limit = f" of at most {space.max_length} characters" if isinstance(space, spaces.Text) else ""
        raise NoAction(f"That is no action. Answer with a text{limit}, in the characters that are allowed.")
    return stripped
