"""Gymnasium spaces of conversations: what an environment says, and what a policy answers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from gymnasium import Space

from polyturn.envs.messages import AssistantMessage, Message, Observation, Role, Script, script_of
from polyturn.tools.types import ToolCall, ToolSpec

_SCALAR_SAMPLES: Mapping[str, Any] = {
    "string": "word",
    "integer": 1,
    "number": 0.5,
    "boolean": True,
    "null": None,
}

_FORMATTED: Mapping[str, str] = {
    "date": "2024-02-29",
    "date-time": "2024-02-29T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "P1D",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "uri": "https://example.org/",
    "email": "somebody@example.org",
}
"""Texts that a format wants."""


class ChatSpace(Space[Observation]):
    """Tuples of messages of given roles: what is new since the last action."""

    def __init__(self, roles: Sequence[Role] = ("system", "user", "tool"), seed: int | None = None) -> None:
        unknown = set(roles) - set(get_args(Role))
        if unknown:
            raise ValueError(f"unknown roles {sorted(unknown)}; the roles are {', '.join(get_args(Role))}")
        self.roles = frozenset(roles)
        super().__init__(None, None, seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def contains(self, x: Any) -> bool:
        if not isinstance(x, tuple):
            return False
        # A loop, because every step asks and a generator costs as much again.
        for message in x:
            if not (
                isinstance(message, dict)
                and message.get("role") in self.roles
                and isinstance(message.get("content"), str)
            ):
                return False
        return True

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> Observation:
        _refuse_masks(mask, probability)
        number = int(self.np_random.integers(1000))
        message: Message = {
            "role": "user" if "user" in self.roles else min(self.roles),
            "content": str(number),
        }
        return (message,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatSpace) and other.roles == self.roles

    def __hash__(self) -> int:
        return hash(self.roles)

    def __repr__(self) -> str:
        return f"ChatSpace({', '.join(sorted(self.roles))})"


class ReplySpace(Space[AssistantMessage]):
    """Assistant messages. A call of a tool that does not exist belongs to the space: it is a mistake to learn from."""

    def __init__(self, tools: Sequence[ToolSpec] = (), seed: int | None = None) -> None:
        self.tools = tuple(tools)
        super().__init__(None, None, seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def contains(self, x: Any) -> bool:
        return isinstance(x, AssistantMessage) and isinstance(x.content, str)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> AssistantMessage:
        """A short text, or as often a valid call of one of the tools."""
        _refuse_masks(mask, probability)
        if self.tools and self.np_random.random() < 0.5:
            spec = self.tools[int(self.np_random.integers(len(self.tools)))]
            arguments = sample_arguments(spec.parameters)
            return AssistantMessage(tool_calls=(ToolCall(id="call_0", name=spec.name, arguments=arguments),))
        return AssistantMessage(content=str(int(self.np_random.integers(1000))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReplySpace) and other.tools == self.tools

    def __hash__(self) -> int:
        return hash(tuple(tool.name for tool in self.tools))

    def __repr__(self) -> str:
        return f"ReplySpace(tools={[tool.name for tool in self.tools]})"


def sample_arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that an object schema allows."""
    return {name: _sample(schema) for name, schema in parameters.get("properties", {}).items()}


def _sample(schema: Mapping[str, Any]) -> Any:
    """A value that the schema allows."""
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _sample(schema["anyOf"][0])
    kind = schema.get("type", "string")
    kind = kind if isinstance(kind, str) else kind[0]
    if kind == "object":
        return {name: _sample(schema["properties"][name]) for name in schema.get("required", ())}
    if kind == "array":
        items = [_sample(item) for item in schema.get("prefixItems", ())]
        return items + [_sample(schema.get("items", {}))] * (schema.get("minItems", 0) - len(items))
    if kind == "string":
        sample = _FORMATTED.get(schema.get("format", ""), _SCALAR_SAMPLES[kind])
        return sample[: schema.get("maxLength")].ljust(schema.get("minLength", 0), "x")
    if kind in ("integer", "number"):
        return _number(schema, _SCALAR_SAMPLES[kind])
    return _SCALAR_SAMPLES.get(kind)


def _number(schema: Mapping[str, Any], default: float) -> float:
    """The default, moved to where the bounds want it."""
    number = max(default, schema.get("minimum", default), schema.get("exclusiveMinimum", default))
    number = min(number, schema.get("maximum", number), schema.get("exclusiveMaximum", number))
    if number == schema.get("exclusiveMinimum"):
        number += 1
    return number - 1 if number == schema.get("exclusiveMaximum") else number


def _refuse_masks(mask: Any | None, probability: Any | None) -> None:
    if mask is not None or probability is not None:
        raise ValueError("a space of messages has no masks or probabilities")


def random_script(space: Space[AssistantMessage], seed: int) -> Script:
    """A script that samples from a space; the space itself is left alone."""
    own_space = copy.deepcopy(space)
    own_space.seed(seed)
    return script_of(own_space.sample)
