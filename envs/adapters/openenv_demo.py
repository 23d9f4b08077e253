"""A small game as an OpenEnv server: `python -m polyturn.envs.adapters.openenv_demo PORT`. It ends with its input.

It needs the `openenv` package. What `OpenEnvEnv` plays when it is given no server.
"""

from __future__ import annotations

import random
import sys
from typing import Any

from polyturn.tools.children import end_with

HIGHEST = 30
MAX_GUESSES = 6
MAX_NUMBER = 1_000_000
"""Above it the game fails, as environments do."""


def hidden_number(seed: int) -> int:
    """The number to find."""
    return random.Random(seed).randint(1, HIGHEST)


def serve(port: int) -> None:
    """Serve until the process ends."""
    import uvicorn
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

    class Guess(Action):
        """A guess."""

        number: int

    class Hint(Observation):
        """What is said of it."""

        text: str

    class HiddenNumber(Environment):
        """Find a number."""

        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self._number = self._num_guesses = 0

        def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> Hint:
            del episode_id, options
            self._number, self._num_guesses = hidden_number(seed or 0), 0
            return Hint(text=f"Find a number from 1 to {HIGHEST} with {MAX_GUESSES} guesses.")

        def step(self, action: Guess, timeout_s: float | None = None, **options: Any) -> Hint:
            del timeout_s, options
            if action.number > MAX_NUMBER:
                raise RuntimeError(f"the game knows no number above {MAX_NUMBER}")
            self._num_guesses += 1
            if action.number == self._number:
                return Hint(text="That is it.", done=True, reward=1.0)
            text = "It is higher." if action.number < self._number else "It is lower."
            return Hint(text=text, done=self._num_guesses == MAX_GUESSES, reward=0.0)

        @property
        def state(self) -> State:
            return State(step_count=self._num_guesses)

    app = create_fastapi_app(HiddenNumber, Guess, Hint, max_concurrent_envs=4096)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical")


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    serve(int(sys.argv[1]))
