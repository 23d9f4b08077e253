"""Answers with everything that an answer can have, for tests of the protocols in which they are said."""

from __future__ import annotations

from polyturn.envs.messages import AssistantMessage
from polyturn.tools.types import ToolCall

CALLING = AssistantMessage(
    content="Let me look.",
    reasoning="It is about Mara.\nSo I search.",
    tool_calls=(
        ToolCall(id="call_0", name="search", arguments={"query": "Mara, née Lindqvist", "topk": 3}),
        ToolCall(id="call_1", name="read", arguments={}),
    ),
    raw_text="as it was sampled",
)
ONLY_CALLING = AssistantMessage(tool_calls=CALLING.tool_calls[:1])
ANSWER = AssistantMessage(content="Ashford")
EMPTY = AssistantMessage(content="", reasoning="")
ALL = (
    CALLING,
    ONLY_CALLING,
    ANSWER,
    EMPTY,
    AssistantMessage(reasoning="So.", tool_calls=CALLING.tool_calls[1:]),
)
