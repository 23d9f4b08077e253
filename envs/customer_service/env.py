"""CustomerService: find out what the customer wants, change the shop as the policy allows, and tell them.

The scripted agent that is always right knows the scenario, and talks and acts as the policy says.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from polyturn.envs.customer_service.customers import (
    Request,
    Scenario,
    ScriptedUser,
    briefing_of,
    make_scenario,
)
from polyturn.envs.customer_service.shop import (
    CancelReason,
    Customer,
    Order,
    RefundTo,
    Shop,
    dollars,
    make_shop,
)
from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Task, TaskSource, known_split
from polyturn.envs.tool_env import ToolEnv
from polyturn.envs.users.model import ModelUser, check_chat, open_chat
from polyturn.envs.users.user import User, load_user
from polyturn.envs.users.watch import WatchedUser
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall, ToolError, ToolSpec

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


SPLITS = ("train", "heldout")
SCENARIOS_PER_CUSTOMER = 4
MAX_FOUND = 10
MAX_CLAIMS = 12
"""An agent that says more different amounts and dates than this is guessing, and has told the customer nothing."""
MAX_CLAIMS_PER_MESSAGE = 4
"""A message that says more of them tells the customer none."""
_AMOUNT_OR_DATE = re.compile(
    r"(?<!\d)\d++\.\d\d\b|\d{4}-\d\d-\d\d|\b\d{1,2} [A-Z][a-z]{2,8}\b|\b[A-Z][a-z]{2,8} \d{1,2}\b"
)


class CustomerServiceEnv(ToolEnv):
    """A conversation with a customer, with a dozen tools over the shop's records.

    The reward is 1.0 when, at the end, the shop is exactly as the policy wants it and the customer has been told what
    they asked for; else 0.0. `metrics` says which of the two held.
    """

    def __init__(
        self,
        *,
        shop_seed: int = 1,
        user: str = "scripted",
        user_options: Mapping[str, Any] | None = None,
        split: str = "train",
        max_turns: int | None = 30,
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            shop_seed: Which shop, customers and scenarios.
            user: Who plays the customer: `scripted`; `model`, behind an OpenAI-compatible endpoint; or a class of one's
                own, by `module:name` or `path/to/file.py:name` (docs/users.md).
            user_options: Of `model`: url, model, and what else `ChatEndpoint` has; of a class: keyword arguments.
            split: `train` or `heldout`; they share no customer.
            max_turns: Tool calls and messages together.
            tasks: Take the place of the shop's own scenarios; each has a `Scenario` as its label.
            render_mode: None or "ansi".

        Raises:
            ValueError: an unknown split or user, or options that the user does not take.
        """
        known_split(split, SPLITS)
        self._shop_seed, self._user_kind, self._user_options = shop_seed, user, dict(user_options or {})
        self._check_user(shop_tasks(shop_seed, split)[0].label)
        self.is_replayable = user == "scripted"
        super().__init__(tasks=tasks, split=split, max_turns=max_turns, render_mode=render_mode)

    def tasks(self, split: str) -> TaskSource:
        """The scenarios of `train` or `heldout`, or the tasks given to the constructor."""
        if self._given_tasks is not None:
            return self._given_tasks
        return shop_tasks(self._shop_seed, known_split(split, SPLITS))

    def begin(self, task: Task) -> Sequence[Message]:
        """The policy, and the customer's first message."""
        self._scenario: Scenario = task.label
        self._shop = base_shop(self._shop_seed).copy()
        self._customer: Customer | None = None
        self._user = WatchedUser(self._make_user(task), briefing_of(self._scenario))
        opening = self._user.opening()
        self.metrics.update(self._user.metrics)
        return [*task.messages, {"role": "user", "content": opening}]

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        """The customer's answer; nothing when they leave."""
        reply = self._user.reply(message)
        self.metrics.update(self._user.metrics)
        return [] if reply is None else [{"role": "user", "content": reply}]

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """Whether the records are right and the customer knows what they asked for."""
        del message
        expected = self._scenario.expected(base_shop(self._shop_seed))
        records = self._shop == expected
        heard = self._user.heard
        said = "\n".join(text for text in heard if num_claims(text) <= MAX_CLAIMS_PER_MESSAGE)
        told = num_claims("\n".join(heard)) <= MAX_CLAIMS and all(
            any(is_said(way, said) for way in ways)
            for request in self._scenario.requests
            for ways in request.told
        )
        self.metrics.update(records_right=float(records), customer_told=float(told))
        return {"success": float(records and told)}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """Asks for the email address, looks everything up, proposes, acts and reports."""
        del tools
        return oracle_message(self.task.label, messages)

    # The tools.

    @tool
    def find_customer_by_email(self, email: str) -> dict[str, Any]:
        """Find the customer's account by its email address. Needed before anything about accounts and orders."""
        return self._identify(c for c in self._shop.customers.values() if c.email == email.strip().lower())

    @tool
    def find_customer_by_name(self, name: str, postcode: str) -> dict[str, Any]:
        """Find the customer's account by full name and postcode."""
        wanted = (name.strip().lower(), postcode.strip())
        return self._identify(
            c for c in self._shop.customers.values() if (c.name.lower(), c.postcode) == wanted
        )

    @tool
    def get_account(self) -> dict[str, Any]:
        """Show the account of the customer who was found."""
        return _account(self._identified())

    @tool
    def list_orders(self) -> list[dict[str, Any]]:
        """List the customer's orders."""
        customer = self._identified()
        return [
            {"order_id": order.order_id, "status": order.status, "total": dollars(order.cents)}
            for order in self._shop.orders.values()
            if order.customer_id == customer.customer_id
        ]

    @tool
    def get_order(self, order_id: str) -> dict[str, Any]:
        """Show an order: status, items with prices, address, delivery date."""
        return self._shown(self._own_order(order_id))

    @tool
    def find_products(self, name: str) -> list[dict[str, Any]]:
        """List the variants of products whose name contains a text, with price and stock."""
        found = [v for v in self._shop.variants.values() if name.strip().lower() in v.product]
        if not found:
            known = ", ".join(sorted({v.product for v in self._shop.variants.values()}))
            raise ToolError(f"No product is called {name!r}. There are: {known}.")
        return [
            {
                "variant_id": v.variant_id,
                "product": v.product,
                "option": v.option,
                "price": dollars(v.cents),
                "in_stock": v.in_stock,
            }
            for v in found[:MAX_FOUND]
        ]

    @tool
    def add_amounts(self, amounts: list[float]) -> str:
        """Add up amounts of money."""
        return dollars(sum(round(amount * 100) for amount in amounts))

    @tool
    def cancel_order(self, order_id: str, reason: CancelReason) -> dict[str, Any]:
        """Cancel an order and pay it back."""
        return self._changed(self._shop.cancel(self._own_order(order_id).order_id, reason))

    @tool
    def return_items(self, order_id: str, item_ids: list[str], refund_to: RefundTo) -> dict[str, Any]:
        """Take items of a delivered order back.

        Args:
            order_id: The order.
            item_ids: Which of its items, for example ["A1001-1"].
            refund_to: Where the money goes.
        """
        return self._changed(self._shop.return_items(self._own_order(order_id).order_id, item_ids, refund_to))

    @tool
    def exchange_item(self, order_id: str, item_id: str, variant_id: str) -> dict[str, Any]:
        """Exchange an item of a delivered order for another variant of the same product."""
        return self._changed(
            self._shop.exchange_item(self._own_order(order_id).order_id, item_id, variant_id)
        )

    @tool
    def change_delivery_address(self, order_id: str, address: str) -> dict[str, Any]:
        """Send an order in processing to another address, written as street, number and town."""
        return self._changed(self._shop.change_delivery_address(self._own_order(order_id).order_id, address))

    @tool
    def change_email(self, email: str) -> dict[str, Any]:
        """Give the customer's account another email address."""
        self._customer = self._shop.change_email(self._identified().customer_id, email)
        self._count_change()
        return _account(self._customer)

    def _check_user(self, scenario: Scenario) -> None:
        """Raise `ValueError` for a user that there is not, or options that it does not take."""
        kind, options = self._user_kind, self._user_options
        if kind == "model":
            try:
                check_chat(options)
            except ValueError as error:
                raise ValueError(f"user_options: {error}") from error
        elif kind == "scripted" and options:
            raise ValueError(f"user 'scripted' has no options, so none of the name {next(iter(options))!r}")
        elif kind != "scripted" and ":" not in kind:
            raise ValueError(
                f"user must be 'scripted', 'model', or a class by module:name or path/to/file.py:name, not {kind!r}"
            )
        elif kind != "scripted":
            load_user(kind, briefing_of(scenario), options)

    def _make_user(self, task: Task) -> User:
        scenario: Scenario = task.label
        if self._user_kind == "scripted":
            return ScriptedUser(scenario)
        briefing, options = briefing_of(scenario), self._user_options
        if self._user_kind == "model":
            return ModelUser(briefing, open_chat(options, engine_urls=self.engine_urls, talk=task.task_id))
        return load_user(self._user_kind, briefing, options)

    def _identify(self, found: Any) -> dict[str, Any]:
        customer = next(iter(found), None)
        if customer is None:
            raise ToolError(
                "There is no such account. Ask the customer again, or try another way to find it."
            )
        self._customer = customer
        return _account(customer)

    def _identified(self) -> Customer:
        if self._customer is None:
            raise ToolError("Find the customer's account first.")
        return self._customer

    def _own_order(self, order_id: str) -> Order:
        customer = self._identified()
        order = self._shop.order(order_id.strip())
        if order.customer_id != customer.customer_id:
            raise ToolError(f"Order {order_id} belongs to another customer.")
        return order

    def _changed(self, order: Order) -> dict[str, Any]:
        self._count_change()
        return self._shown(order)

    def _count_change(self) -> None:
        self.metrics["num_changes"] = self.metrics.get("num_changes", 0.0) + 1.0

    def _shown(self, order: Order) -> dict[str, Any]:
        shown = dataclasses.asdict(order) | {
            "delivery_date": order.delivery_date.isoformat(),
            "items": [
                {
                    "item_id": item.item_id,
                    "product": self._shop.variants[item.variant_id].product,
                    "option": self._shop.variants[item.variant_id].option,
                    "price": dollars(item.cents),
                    "status": item.status,
                }
                for item in order.items
            ],
        }
        return {name: value for name, value in shown.items() if value is not None}


def is_said(piece: str, text: str) -> bool:
    """Whether `piece` stands in `text`, not as a part of a longer number or word."""
    return re.search(rf"(?<![\w.,]){re.escape(piece)}(?!\w|[.,]\d)", text, re.IGNORECASE) is not None


def num_claims(text: str) -> int:
    """How many different amounts and dates a text names."""
    return len(set(_AMOUNT_OR_DATE.findall(text)))


@functools.lru_cache(maxsize=4)
def base_shop(seed: int) -> Shop:
    """The shop before any episode. Episodes change copies."""
    return make_shop(seed)


@functools.lru_cache(maxsize=8)
def shop_tasks(seed: int, split: str) -> ListTasks:
    """The scenarios of one split."""
    shop = base_shop(seed)
    customers = [
        c for number, c in enumerate(shop.customers.values()) if number % len(SPLITS) == SPLITS.index(split)
    ]
    policy = importlib.resources.files(__package__).joinpath("policy.md").read_text(encoding="utf-8").strip()
    tasks = []
    for customer in customers:
        seen: list[Scenario] = []
        for number in range(SCENARIOS_PER_CUSTOMER):
            task_id = f"{split}-{customer.customer_id}-{number}"
            rng = random.Random(f"{seed}/{task_id}")
            scenario = make_scenario(shop, customer, rng)
            while scenario in seen:  # a customer wants nothing twice
                scenario = make_scenario(shop, customer, rng)
            seen.append(scenario)
            tasks.append(
                Task(task_id=task_id, messages=({"role": "system", "content": policy},), label=scenario)
            )
    return ListTasks(tasks)


def _account(customer: Customer) -> dict[str, Any]:
    account = dataclasses.asdict(customer)
    account["gift_card"] = dollars(account.pop("gift_card_cents"))
    return account
