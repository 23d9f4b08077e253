"""FerryDesk: sell a customer the right ticket."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ferry_desk.timetable import Sailing, make_tasks
from polyturn import (
    AssistantMessage,
    Message,
    Task,
    TaskSource,
    ToolCall,
    ToolEnv,
    ToolError,
    ToolSpec,
    register,
    tool,
)

POLICY = (
    "You sell ferry tickets. Ask the customer when they can leave, book the cheapest sailing that suits them, and tell "
    "them when it departs. Sell one ticket only."
)


def oracle(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
    """Ask, look up, book from the cheapest on until one is not sold out, and tell."""
    del tools
    wish = next(m["content"] for m in messages if m["role"] == "user")
    origin, destination = re.search(r"from (\w+) to (\w+)", wish).groups()  # type: ignore[union-attr]
    earliest = next((m["content"][-6:-1] for m in messages if "not before" in m["content"]), None)
    answers = [m["content"] for m in messages if m["role"] == "tool"]
    if earliest is None:
        return AssistantMessage(content="When can you leave?")
    if not answers:
        return _calling("timetable", origin=origin, destination=destination)
    if answers[-1].startswith("Booked"):
        return AssistantMessage(content=f"Your ferry departs at {answers[-1][-6:-1]}.")
    lines = re.findall(r"(F\d+): departs (\S+), (\d+) crowns", answers[0])
    suitable = sorted((int(price), code) for code, departs, price in lines if departs >= earliest)
    return _calling("book", code=suitable[len(answers) - 1][1])


class FerryDesk(ToolEnv):
    """A customer, a timetable, and tickets that sell out."""

    oracle = staticmethod(oracle)

    def begin(self, task: Task) -> Sequence[Message]:
        self.booked: list[Sailing] = []
        self.has_said_when = False
        return [{"role": "system", "content": POLICY}, *task.messages]

    @tool
    def timetable(self, origin: str, destination: str) -> str:
        """List today's sailings between two islands.

        Args:
            origin: The island to leave from.
            destination: The island to go to.
        """
        customer = self.task.label
        if (origin, destination) != (customer.origin, customer.destination):
            raise ToolError(f"no ferry sails from {origin} to {destination} today")
        return "\n".join(sailing.line() for sailing in customer.sailings)

    @tool
    def book(self, code: str) -> str:
        """Book a ticket.

        Args:
            code: The sailing's code, such as F123.
        """
        sailing = next((s for s in self.task.label.sailings if s.code == code), None)
        if sailing is None:
            raise ToolError(f"there is no sailing {code}; the timetable has the codes")
        if sailing.sold_out:
            raise ToolError(f"{code} is sold out")
        self.booked.append(sailing)
        return f"Booked {code}, departs {sailing.departs}."

    @tool
    def cancel(self, code: str) -> str:
        """Cancel a ticket.

        Args:
            code: The sailing's code.
        """
        if code not in (codes := [sailing.code for sailing in self.booked]):
            raise ToolError(f"{code} is not booked")
        del self.booked[codes.index(code)]
        return f"Cancelled {code}."

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        if "?" not in message.content or self.has_said_when:
            return ()
        self.has_said_when = True
        return [{"role": "user", "content": f"I can leave, but not before {self.task.label.not_before}."}]

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        best = self.task.label.best
        right = self.booked == [best]
        # Told counts with the ticket only: a desk that lists all times has sold nothing.
        told = right and re.findall(r"\d\d:\d\d", message.content) == [best.departs]
        return {"ticket": 0.8 * right, "told": 0.2 * told}

    def tasks(self, split: str) -> TaskSource:
        return make_tasks(split)


def _calling(name: str, **arguments: str) -> AssistantMessage:
    return AssistantMessage(tool_calls=(ToolCall(id="call_0", name=name, arguments=arguments),))


def register_environments() -> None:
    """What the entry point calls."""
    register("ferry_desk/FerryDesk-v0", FerryDesk, description="Sell a customer the right ferry ticket.")
