"""The scripted agent that is always right: it knows the scenario, and talks and acts as the policy says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from polyturn.envs.customer_service.scenarios import Request, Scenario
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.tools.types import ToolCall

# The shop's methods by the tools that call them.
_TOOLS = {"cancel": "cancel_order"}


def oracle_message(scenario: Scenario, messages: Sequence[Message]) -> AssistantMessage:
    """The next of its messages, counted by those it has written."""
    num_written = sum(message["role"] == "assistant" for message in messages)
    script = list(_script(scenario))
    return script[min(num_written, len(script) - 1)]


def _script(scenario: Scenario) -> Iterator[AssistantMessage]:
    yield AssistantMessage(content="Hello. What is the email address of your account?")
    yield _call("find_customer_by_email", email=scenario.customer.email)
    for request in scenario.requests:
        yield from _handle(request)


def _handle(request: Request) -> Iterator[AssistantMessage]:
    if request.order_id is not None:
        yield _call("get_order", order_id=request.order_id)
    answer = " ".join(ways[0] for ways in request.told)
    if not request.actions:
        yield AssistantMessage(
            content=f"I am sorry, that is not possible any more. The day you ask about is {answer}. Anything else?"
        )
        return
    yield AssistantMessage(content=f"{request.proposal}. Shall I go ahead?")
    for action in request.actions:
        arguments = dict(action.arguments)
        if action.tool == "change_email":
            del arguments["customer_id"]
        yield _call(_TOOLS.get(action.tool, action.tool), **arguments)
    amount = f" The amount is {answer}." if answer else ""
    yield AssistantMessage(content=f"That is done.{amount} Is there anything else?")


def _call(name: str, **arguments: Any) -> AssistantMessage:
    return AssistantMessage(tool_calls=(ToolCall(id="call_0", name=name, arguments=arguments),))
