"""Customers: what they want, the facts that they know, what a right answer does and says; and one that is scripted."""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from polyturn.envs.customer_service.shop import TODAY, Customer, Order, Shop, dollars, make_address
from polyturn.envs.users.user import Briefing

Kind = Literal[
    "cancel",
    "return",
    "late_return",
    "exchange",
    "sold_out_exchange",
    "new_address",
    "late_address",
    "new_email",
]
Fact = Literal[
    "email", "name", "postcode", "order", "items", "reason", "refund", "address", "variant", "new_email"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """A call that changes the shop."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One thing that the customer wants."""

    kind: Kind
    opening: str
    """How the customer puts it."""
    facts: Mapping[Fact, str]
    """What the customer answers when asked; sentences."""
    order_id: str | None = None
    actions: tuple[Action, ...] = ()
    """What changes in the shop when it is done right; nothing where the policy forbids it."""
    told: tuple[tuple[str, ...], ...] = ()
    """What the customer must be told: for each piece, the ways to say it."""
    proposal: str = ""
    """How the oracle says what it is going to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A customer and their requests, in order."""

    customer: Customer
    requests: tuple[Request, ...]
    identity: Mapping[Fact, str] = field(default_factory=dict)

    def expected(self, shop: Shop) -> Shop:
        """A copy of `shop` after all the right changes."""
        changed = shop.copy()
        for request in self.requests:
            for action in request.actions:
                getattr(changed, action.tool)(**action.arguments)
        return changed


def briefing_of(scenario: Scenario) -> Briefing:
    """What whoever plays the customer is told: no right answer, and no change that is wanted of the shop."""
    facts = [*scenario.identity.values()]
    for request in scenario.requests:
        facts += request.facts.values()
    return Briefing(
        role="a customer in a chat with a shop's agent",
        requests=tuple(request.opening for request in scenario.requests),
        facts=tuple(dict.fromkeys(facts)),
        values=_VALUES,
        topics=tuple(_topics(request) for request in scenario.requests),
    )


_VALUES = (
    re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}"),
    re.compile(r"\bA\d{4}\b", re.IGNORECASE),
    re.compile(r"(?<![\w.-])\d{5}(?![\w-])"),
)
"""Email addresses, order numbers and postcodes; in time linear in a text's length."""


def _topics(request: Request) -> tuple[str, ...]:
    """Texts of which one is said where a request is talked about."""
    if request.order_id is not None:
        return (request.order_id,)
    return tuple(str(action.arguments["email"]) for action in request.actions)


def make_scenario(shop: Shop, customer: Customer, rng: random.Random) -> Scenario:
    """One or two requests of a customer, about different orders."""
    by_status = {
        order.status: order for order in shop.orders.values() if order.customer_id == customer.customer_id
    }
    makers: list[Callable[[], Request]] = [
        lambda: _processing(by_status["processing"], rng),
        lambda: _late_address(by_status["shipped"], rng),
        lambda: _delivered(shop, by_status["delivered"], rng),
        lambda: _new_email(customer, rng),
    ]
    weights = (3, 1, 4, 1)
    first = rng.choices(range(4), weights)[0]
    chosen = [first]
    if rng.random() < 0.35:
        others = [index for index in range(4) if index != first]
        chosen.append(rng.choices(others, [weights[index] for index in others])[0])
    identity: dict[Fact, str] = {
        "email": f"My email address is {customer.email}.",
        "name": f"My name is {customer.name}.",
        "postcode": f"My postcode is {customer.postcode}.",
    }
    return Scenario(customer=customer, requests=tuple(makers[index]() for index in chosen), identity=identity)


def _processing(order: Order, rng: random.Random) -> Request:
    return _cancel(order, rng) if rng.random() < 0.5 else _new_address(order, rng)


def _delivered(shop: Shop, order: Order, rng: random.Random) -> Request:
    if order.last_return_date < TODAY:
        return _late_return(shop, order, rng)
    return _return(shop, order, rng) if rng.random() < 0.5 else _exchange(shop, order, rng)


def _cancel(order: Order, rng: random.Random) -> Request:
    reason, why = rng.choice(
        (("no_longer_needed", "I no longer need it."), ("ordered_by_mistake", "I ordered it by mistake."))
    )
    return _about(
        order,
        "cancel",
        f"I want to cancel order {order.order_id}. How much will I get back?",
        {"reason": why},
        actions=_change("cancel", order_id=order.order_id, reason=reason),
        told=((dollars(order.cents),),),
        proposal=f"I will cancel order {order.order_id}",
    )


def _new_address(order: Order, rng: random.Random) -> Request:
    address = make_address(rng)
    return _about(
        order,
        "new_address",
        f"I am moving. Can order {order.order_id} go to another address?",
        {"address": f"Please send it to {address}."},
        actions=_change("change_delivery_address", order_id=order.order_id, address=address),
        proposal=f"I will send order {order.order_id} to {address}",
    )


def _late_address(order: Order, rng: random.Random) -> Request:
    address = make_address(rng)
    opening = (
        f"Please send order {order.order_id} to {address} instead. "
        "If that cannot be done, tell me on which day it arrives."
    )
    facts: dict[Fact, str] = {"address": f"The address is {address}."}
    return _about(order, "late_address", opening, facts, told=(_ways_to_say(order.delivery_date),))


def _return(shop: Shop, order: Order, rng: random.Random) -> Request:
    items = rng.sample(order.items, rng.randint(1, len(order.items)))
    names = " and ".join(f"the {shop.variants[item.variant_id].product}" for item in items)
    refund_to, how = rng.choice(
        (
            ("original_payment", "Please pay it back the way I paid."),
            ("gift_card", "I would like it on my gift card."),
        )
    )
    item_ids = [item.item_id for item in items]
    return _about(
        order,
        "return",
        f"I want to return {names} from order {order.order_id}. What will the refund be in total?",
        {"items": f"It is {names}.", "refund": how},
        actions=_change("return_items", order_id=order.order_id, item_ids=item_ids, refund_to=refund_to),
        told=((dollars(sum(item.cents for item in items)),),),
        proposal=f"I will take back {names}",
    )


def _late_return(shop: Shop, order: Order, rng: random.Random) -> Request:
    product = shop.variants[rng.choice(order.items).variant_id].product
    opening = (
        f"I want to return the {product} from order {order.order_id}. "
        "If it is too late for that, tell me the last day on which I could have done so."
    )
    facts: dict[Fact, str] = {
        "items": f"It is the {product}.",
        "refund": "Please pay it back the way I paid.",
    }
    return _about(order, "late_return", opening, facts, told=(_ways_to_say(order.last_return_date),))


def _exchange(shop: Shop, order: Order, rng: random.Random) -> Request:
    item = rng.choice(order.items)
    owned = shop.variants[item.variant_id]
    wanted = rng.choice([v for v in shop.variants.values() if v.product == owned.product and v != owned])
    facts: dict[Fact, str] = {
        "items": f"It is the {owned.product}.",
        "variant": f"I would like {wanted.option}.",
    }
    if wanted.in_stock:
        return _about(
            order,
            "exchange",
            f"The {owned.product} in order {order.order_id} is not right. I want to exchange it.",
            facts,
            actions=_change(
                "exchange_item", order_id=order.order_id, item_id=item.item_id, variant_id=wanted.variant_id
            ),
            proposal=f"I will exchange the {owned.product} for {wanted.option}",
        )
    opening = (
        f"I want to exchange the {owned.product} in order {order.order_id} for {wanted.option}. "
        "If you have none left, I return it; put the refund on my gift card then."
    )
    return _about(
        order,
        "sold_out_exchange",
        opening,
        {**facts, "refund": "On my gift card, if there are none left."},
        actions=_change(
            "return_items", order_id=order.order_id, item_ids=[item.item_id], refund_to="gift_card"
        ),
        proposal=f"There is no {wanted.option} left, so I will take back the {owned.product}",
    )


def _new_email(customer: Customer, rng: random.Random) -> Request:
    email = f"{customer.name.split()[0].lower()}{rng.randint(100, 999)}@post.example"
    return Request(
        kind="new_email",
        opening="I need another email address on my account.",
        facts={"new_email": f"The new address is {email}."},
        actions=_change("change_email", customer_id=customer.customer_id, email=email),
        proposal=f"I will change your email address to {email}",
    )


def _about(order: Order, kind: Kind, opening: str, facts: Mapping[Fact, str], **others: Any) -> Request:
    """A request about one order, whose number the customer knows."""
    number: dict[Fact, str] = {"order": f"It is order {order.order_id}."}
    return Request(kind=kind, opening=opening, facts={**number, **facts}, order_id=order.order_id, **others)


def _change(tool: str, **arguments: Any) -> tuple[Action]:
    return (Action(tool=tool, arguments=arguments),)


def _ways_to_say(day: datetime.date) -> tuple[str, ...]:
    return (day.isoformat(), f"{day.day} {day:%B}", f"{day:%B} {day.day}")


MAX_UNHELPFUL = 3
"""The scripted customer leaves after so many messages that lead nowhere."""


def _pattern(words: str) -> re.Pattern[str]:
    return re.compile(words, re.IGNORECASE)


# What a question is after. The order matters: "new email address" is no question for a street.
_ASKS: Mapping[Fact, re.Pattern[str]] = {
    "new_email": _pattern(r"\bnew (e-?mail|address)|\bwhich (e-?mail|address)\b[^\n]{0,200}\binstead"),
    "email": _pattern(r"\be-?mail"),
    "name": _pattern(r"\b(your|full) name\b"),
    "postcode": _pattern(r"\b(post ?code|zip)"),
    "order": _pattern(r"\border (id|number)|\bwhich order\b"),
    "variant": _pattern(r"\b(which|what) (variant|option|size|colou?r|length|one would you)"),
    "items": _pattern(r"\b(which|what) (item|product|of the items)"),
    "reason": _pattern(r"\b(reason|why)\b"),
    "refund": _pattern(r"\brefund(ed)?\b[^\n]{0,200}\?|\bgift card\b[^\n]{0,200}\?|\bpayment method\b"),
    "address": _pattern(r"\baddress\b"),
}
_IDENTITY = _pattern(r"\b(verify|identify|identity|authenticate|who (you are|am I))\b")
_CONFIRM = _pattern(
    r"\b(confirm|shall I|should I|do you want me|would you like me|go ahead|proceed"
    r"|is that (ok|okay|right|correct|all right))\b"
)
_DONE = _pattern(
    r"\b(anything else|has been|have been|I have|I've|is done|all set"
    r"|cannot|can't|can not|unable|not possible|too late|sorry)\b"
)


class ScriptedUser:
    """Answers what is asked, confirms what is proposed, and says the next request when the last one is settled.

    Deterministic: the same messages get the same answers.
    """

    may_lose_patience = True

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._current = 0
        self._said: set[Fact] = set()
        self._num_unhelpful = 0

    def opening(self) -> str:
        """The first request."""
        return f"Hello. {self._request.opening}"

    def reply(self, message: str) -> str | None:
        """The answer to the agent; None when all requests are settled, or the customer has had enough."""
        asked = self._asked(message) if "?" in message else []
        if "anything else" in message.lower():
            return self._next_request()
        if asked:
            self._said.update(asked)
            return self._within_patience(" ".join(self._facts[fact] for fact in asked), helpful=True)
        if "?" in message and _CONFIRM.search(message):
            return self._within_patience("Yes, please go ahead.", helpful=True)
        if _DONE.search(message):
            return self._next_request()
        return self._volunteer()

    @property
    def _request(self) -> Request:
        return self._scenario.requests[self._current]

    @property
    def _facts(self) -> dict[Fact, str]:
        return {**self._scenario.identity, **self._request.facts}

    def _asked(self, message: str) -> list[Fact]:
        """The facts that the message asks for and the customer has."""
        facts = self._facts
        found: list[Fact] = [
            fact
            for fact, pattern in _ASKS.items()
            if fact in facts and pattern.search(message) and fact not in self._said
        ]
        if "new_email" in found and "email" in found and not _IDENTITY.search(message):
            found.remove("email")
        if not found and _IDENTITY.search(message):
            found = ["email"]
        return found

    def _volunteer(self) -> str | None:
        """What the customer adds to a message that neither asks nor settles anything."""
        unsaid = [fact for fact in self._facts if fact not in self._said]
        self._said.update(unsaid)
        text = " ".join(self._facts[fact] for fact in unsaid) if unsaid else "I do not see how that helps me."
        return self._within_patience(text, helpful=False)

    def _within_patience(self, text: str, *, helpful: bool) -> str | None:
        self._num_unhelpful = 0 if helpful else self._num_unhelpful + 1
        return text if self._num_unhelpful < MAX_UNHELPFUL else None

    def _next_request(self) -> str | None:
        if self._current + 1 == len(self._scenario.requests):
            return None
        self._current += 1
        self._said -= set(self._request.facts)
        self._num_unhelpful = 0
        return f"There is something else. {self._request.opening}"
