"""Which answers a conversation goes on from: its messages are compared with those of the answers by a stated rule.

Clients write back what they were answered in their own way: arguments anew, without reasoning, with other call ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from polyturn.envs.messages import Message
from polyturn.envs.plugins import Signature, load_plugin
from polyturn.tools.types import ToolSpec

RuleName = Literal["exact", "loose", "role_and_content"]
MessageKey = Callable[[Message], Hashable]
"""What two messages have in common that are one and the same."""
Place = TypeVar("Place")
_SIGNATURE = Signature(
    what="matching rule",
    arguments=("message",),
    text="def message_key(message: Message) -> Hashable",
    wrong_results=(float, bool, type(None), dict, list),
)


def exact(message: Message) -> Hashable:
    """All of the message; arguments of calls as values, however they are written."""
    calls = [(call.get("id"), *_call_key(call)) for call in message.get("tool_calls") or ()]
    return (
        message["role"],
        message["content"],
        message.get("reasoning"),
        message.get("tool_call_id"),
        message.get("name"),
        tuple(calls),
    )


def loose(message: Message) -> Hashable:
    """Role, content but for white space, and calls but for their ids; reasoning and names of tools do not count."""
    calls = tuple(_call_key(call) for call in message.get("tool_calls") or ())
    return message["role"], " ".join(message["content"].split()), calls


def role_and_content(message: Message) -> Hashable:
    """Role, and content but for white space at its ends: clients that leave calls out are followed."""
    return message["role"], message["content"].strip()


_in_one_order = json.JSONEncoder(
    sort_keys=True, default=str
).encode  # made once: `json.dumps` makes one a call
_RULES: Mapping[str, MessageKey] = {"exact": exact, "loose": loose, "role_and_content": role_and_content}


def make_rule(name: str) -> MessageKey:
    """The rule of that name, or the function that `module:name` or `path/to/file.py:name` names.

    Raises:
        ValueError: there is none.
    """
    if name in _RULES:
        return _RULES[name]
    if ":" not in name:
        raise ValueError(
            f"unknown matching rule {name!r}; the rules are {', '.join(_RULES)}, or module:function"
        )
    rule: MessageKey = load_plugin(_SIGNATURE, name)
    return rule


def tools_key(tools: Sequence[ToolSpec]) -> Hashable:
    """What two offers of tools have in common that are the same: they stand at the head of the conversation."""
    return tuple((tool.name, tool.description, _in_one_order(tool.parameters)) for tool in tools)


def _call_key(call: Mapping[str, Any]) -> tuple[str, str]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return function["name"], arguments
    return function["name"], _in_one_order(arguments)


@dataclass(slots=True)
class _Node(Generic[Place]):
    """A conversation up to a message."""

    behind: dict[Hashable, _Node[Place]] = field(default_factory=dict)
    place: Place | None = None
    """Where the answer is recorded that the message is; None: it is no answer of ours."""


class ConversationTree(Generic[Place]):
    """Recorded conversations, by what they begin with."""

    def __init__(self, key: MessageKey) -> None:
        self._key = key
        self._roots: dict[Hashable, _Node[Place]] = {}

    def find(self, tools: Hashable, messages: Sequence[Message]) -> tuple[int, Place | None]:
        """The longest beginning of a conversation that ends with a recorded answer.

        Args:
            tools: The `tools_key` of what the conversation is offered.

        Returns:
            How many messages that is, and where the answer is recorded; 0 and None where there is none.
        """
        node = self._roots.get(tools)
        count, place = 0, None
        for number, message in enumerate(messages, start=1):
            node = None if node is None else node.behind.get(self._key(message))
            if node is None:
                break
            if node.place is not None:
                count, place = number, node.place
        return count, place

    def add(self, tools: Hashable, messages: Sequence[Message], place: Place) -> None:
        """Record where the answer is that a conversation ends with; `tools` as of `find`."""
        node = self._roots.setdefault(tools, _Node())
        for message in messages:
            node = node.behind.setdefault(self._key(message), _Node())
        node.place = place
