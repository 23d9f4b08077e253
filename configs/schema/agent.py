"""An agent of the user's own, which plays the episodes in place of the built-in loop."""

from __future__ import annotations

from typing import Any

from polyturn.configs.schema.section import Section


class AgentConfig(Section):
    """Who plays the episodes: an async function, or a program that it starts."""

    target: str
    """`module:name` or `path/to/file.py:name` of an async function of an episode, or of a class that is made with the
    options and whose objects are called so."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function, or of the class."""
    matching: str = "loose"
    """When a program goes on from an answer: the messages before are the recorded ones, `exact`, `loose` (but for white
    space, call ids and reasoning), by `role_and_content`, or by a function of a message, named as `target`."""
    policy_errors: list[str] = []
    """Exceptions, each `module:name`, that the agent raises for what the policy did: such an episode is graded as if
    the agent had returned nothing. Any other exception is a failure, and the episode is played again."""
    grade_truncated: bool = False
    """Grade also what an agent left that a limit has ended; false: such an episode is not graded."""
    serve: bool = True
    """Serve each episode's session over HTTP on the loopback interface; false: the agent asks without HTTP alone."""
