"""The best actions of an environment that gives away its own transitions, as Gymnasium's toy texts do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Transitions = Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]]
"""By state and action: probability, next state, reward, and whether that is the end."""

DISCOUNT = 0.999
"""Just below 1, so that the shorter of two ways is the better one."""


def best_actions(transitions: Transitions, *, tolerance: float = 1e-9, max_sweeps: int = 5000) -> list[int]:
    """The best action in every state, by value iteration (Sutton and Barto, section 4.4)."""
    values = [0.0] * len(transitions)

    def worth(state: int, action: Any) -> float:
        return sum(
            probability * (reward + (0.0 if ended else DISCOUNT * values[following]))
            for probability, following, reward, ended in transitions[state][action]
        )

    for _ in range(max_sweeps):
        change = 0.0
        for state, actions in transitions.items():
            value = max(worth(state, action) for action in actions)
            change = max(change, abs(value - values[state]))
            values[state] = value
        if change < tolerance:
            break
    return [
        max(actions, key=lambda action, state=state: worth(state, action))  # type: ignore[misc]
        for state, actions in sorted(transitions.items())
    ]
