"""What customers want: requests with the facts that the customer knows, and what a right answer does and says."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from polyturn.envs.customer_service.generate import make_address
from polyturn.envs.customer_service.records import TODAY, Customer, Order, Shop, Variant, dollars

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
    return Request(
        kind="cancel",
        opening=f"I want to cancel order {order.order_id}. How much will I get back?",
        facts={"order": f"It is order {order.order_id}.", "reason": why},
        order_id=order.order_id,
        actions=(Action(tool="cancel", arguments={"order_id": order.order_id, "reason": reason}),),
        told=((dollars(order.cents),),),
        proposal=f"I will cancel order {order.order_id}",
    )


def _new_address(order: Order, rng: random.Random) -> Request:
    address = make_address(rng)
    return Request(
        kind="new_address",
        opening=f"I am moving. Can order {order.order_id} go to another address?",
        facts={"order": f"It is order {order.order_id}.", "address": f"Please send it to {address}."},
        order_id=order.order_id,
        actions=(
            Action(
                tool="change_delivery_address", arguments={"order_id": order.order_id, "address": address}
            ),
        ),
        proposal=f"I will send order {order.order_id} to {address}",
    )


def _late_address(order: Order, rng: random.Random) -> Request:
    address = make_address(rng)
    return Request(
        kind="late_address",
        opening=(
            f"Please send order {order.order_id} to {address} instead. "
            "If that cannot be done, tell me on which day it arrives."
        ),
        facts={"order": f"It is order {order.order_id}.", "address": f"The address is {address}."},
        order_id=order.order_id,
        told=(_ways_to_say(order),),
    )


def _return(shop: Shop, order: Order, rng: random.Random) -> Request:
    items = rng.sample(order.items, rng.randint(1, len(order.items)))
    names = " and ".join(f"the {shop.variants[item.variant_id].product}" for item in items)
    refund_to, how = rng.choice(
        (
            ("original_payment", "Please pay it back the way I paid."),
            ("gift_card", "I would like it on my gift card."),
        )
    )
    arguments = {
        "order_id": order.order_id,
        "item_ids": [item.item_id for item in items],
        "refund_to": refund_to,
    }
    return Request(
        kind="return",
        opening=f"I want to return {names} from order {order.order_id}. What will the refund be in total?",
        facts={"order": f"It is order {order.order_id}.", "items": f"It is {names}.", "refund": how},
        order_id=order.order_id,
        actions=(Action(tool="return_items", arguments=arguments),),
        told=((dollars(sum(item.cents for item in items)),),),
        proposal=f"I will take back {names}",
    )


def _late_return(shop: Shop, order: Order, rng: random.Random) -> Request:
    product = shop.variants[rng.choice(order.items).variant_id].product
    last = order.last_return_date
    return Request(
        kind="late_return",
        opening=(
            f"I want to return the {product} from order {order.order_id}. "
            "If it is too late for that, tell me the last day on which I could have done so."
        ),
        facts={
            "order": f"It is order {order.order_id}.",
            "items": f"It is the {product}.",
            "refund": "Please pay it back the way I paid.",
        },
        order_id=order.order_id,
        told=((last.isoformat(), f"{last.day} {last:%B}", f"{last:%B} {last.day}"),),
    )


def _exchange(shop: Shop, order: Order, rng: random.Random) -> Request:
    item = rng.choice(order.items)
    owned = shop.variants[item.variant_id]
    others = [v for v in shop.variants.values() if v.product == owned.product and v != owned]
    wanted = rng.choice(others)
    facts: dict[Fact, str] = {
        "order": f"It is order {order.order_id}.",
        "items": f"It is the {owned.product}.",
        "variant": f"I would like {wanted.option}.",
    }
    if wanted.in_stock:
        arguments = {
            "order_id": order.order_id,
            "item_id": item.item_id,
            "variant_id": wanted.variant_id,
        }
        return Request(
            kind="exchange",
            opening=f"The {owned.product} in order {order.order_id} is not right. I want to exchange it.",
            facts=facts,
            order_id=order.order_id,
            actions=(Action(tool="exchange_item", arguments=arguments),),
            proposal=f"I will exchange the {owned.product} for {wanted.option}",
        )
    return _sold_out(order, item.item_id, owned, wanted, facts)


def _sold_out(order: Order, item_id: str, owned: Variant, wanted: Variant, facts: dict[Fact, str]) -> Request:
    arguments = {"order_id": order.order_id, "item_ids": [item_id], "refund_to": "gift_card"}
    return Request(
        kind="sold_out_exchange",
        opening=(
            f"I want to exchange the {owned.product} in order {order.order_id} for {wanted.option}. "
            "If you have none left, I return it; put the refund on my gift card then."
        ),
        facts={**facts, "refund": "On my gift card, if there are none left."},
        order_id=order.order_id,
        actions=(Action(tool="return_items", arguments=arguments),),
        proposal=f"There is no {wanted.option} left, so I will take back the {owned.product}",
    )


def _new_email(customer: Customer, rng: random.Random) -> Request:
    email = f"{customer.name.split()[0].lower()}{rng.randint(100, 999)}@post.example"
    return Request(
        kind="new_email",
        opening="I need another email address on my account.",
        facts={"new_email": f"The new address is {email}."},
        actions=(
            Action(tool="change_email", arguments={"customer_id": customer.customer_id, "email": email}),
        ),
        proposal=f"I will change your email address to {email}",
    )


def _ways_to_say(order: Order) -> tuple[str, ...]:
    day = order.delivery_date
    return (day.isoformat(), f"{day.day} {day:%B}", f"{day:%B} {day.day}")
