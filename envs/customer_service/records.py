"""What the shop knows: products, customers and orders, and the changes that its system allows.

Records are frozen and a change replaces one, so that copies of a shop share all that an episode leaves alone, and two
shops are compared with `==`.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from polyturn.tools.types import ToolError

OrderStatus = Literal["processing", "shipped", "delivered", "cancelled"]
ItemStatus = Literal["ordered", "returned", "exchanged"]
RefundTo = Literal["original_payment", "gift_card"]
CancelReason = Literal["no_longer_needed", "ordered_by_mistake"]

TODAY = datetime.date(2031, 5, 15)
RETURN_WINDOW_DAYS = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One form of a product that can be ordered."""

    variant_id: str
    product: str
    option: str
    """Its colour or size."""
    cents: int
    in_stock: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Customer:
    """An account."""

    customer_id: str
    name: str
    email: str
    postcode: str
    address: str
    gift_card_cents: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A line of an order."""

    item_id: str
    variant_id: str
    cents: int
    status: ItemStatus = "ordered"


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """An order and where it stands."""

    order_id: str
    customer_id: str
    status: OrderStatus
    items: tuple[Item, ...]
    address: str
    delivery_date: datetime.date
    """When it was, or is expected to be, delivered."""
    refund_to: RefundTo | None = None
    cancel_reason: CancelReason | None = None

    @property
    def cents(self) -> int:
        return sum(item.cents for item in self.items)

    @property
    def last_return_date(self) -> datetime.date:
        return self.delivery_date + datetime.timedelta(days=RETURN_WINDOW_DAYS)


@dataclass(kw_only=True, slots=True)
class Shop:
    """All records by id. Its methods raise `ToolError` for what the system does not allow."""

    variants: dict[str, Variant]
    customers: dict[str, Customer]
    orders: dict[str, Order]

    def copy(self) -> Shop:
        """A shop that can be changed without changing this one."""
        return Shop(variants=self.variants, customers=dict(self.customers), orders=dict(self.orders))

    def order(self, order_id: str) -> Order:
        """The order of that id."""
        if order_id not in self.orders:
            raise ToolError(
                f"There is no order {order_id!r}. Order ids look like {next(iter(self.orders))!r}."
            )
        return self.orders[order_id]

    def cancel(self, order_id: str, reason: CancelReason) -> Order:
        """Cancel an order that has not been sent."""
        order = self.order(order_id)
        if order.status != "processing":
            raise ToolError(
                f"Order {order_id} is {order.status}; only orders in processing can be cancelled."
            )
        return self._put(replace(order, status="cancelled", cancel_reason=reason))

    def return_items(self, order_id: str, item_ids: Sequence[str], refund_to: RefundTo) -> Order:
        """Return items of a delivered order. Dates are the agent's to mind, as the policy says."""
        order = self._delivered(order_id)
        chosen = {self._item(order, item_id).item_id for item_id in item_ids}
        if not chosen:
            raise ToolError("Name at least one item to return.")
        items = tuple(replace(i, status="returned") if i.item_id in chosen else i for i in order.items)
        if refund_to == "gift_card":
            customer = self.customers[order.customer_id]
            refund = sum(item.cents for item in order.items if item.item_id in chosen)
            self.customers[customer.customer_id] = replace(
                customer, gift_card_cents=customer.gift_card_cents + refund
            )
        return self._put(replace(order, items=items, refund_to=refund_to))

    def exchange_item(self, order_id: str, item_id: str, variant_id: str) -> Order:
        """Exchange an item of a delivered order for another variant of the same product that is in stock."""
        order = self._delivered(order_id)
        item = self._item(order, item_id)
        if variant_id not in self.variants:
            raise ToolError(f"There is no variant {variant_id!r}; find_products lists them.")
        old, new = self.variants[item.variant_id], self.variants[variant_id]
        if new.product != old.product or new.variant_id == old.variant_id:
            raise ToolError(f"An item is exchanged for another variant of the same product ({old.product}).")
        if not new.in_stock:
            raise ToolError(f"Variant {variant_id} is out of stock.")
        exchanged = replace(item, variant_id=variant_id, status="exchanged")
        return self._put(
            replace(order, items=tuple(exchanged if i.item_id == item_id else i for i in order.items))
        )

    def change_delivery_address(self, order_id: str, address: str) -> Order:
        """Send an order that has not been sent elsewhere."""
        order = self.order(order_id)
        if order.status != "processing":
            raise ToolError(f"Order {order_id} is {order.status}; its address can no longer be changed.")
        return self._put(replace(order, address=" ".join(address.split())))

    def change_email(self, customer_id: str, email: str) -> Customer:
        """Give an account another email address."""
        email = email.strip().lower()
        if "@" not in email:
            raise ToolError(f"{email!r} is no email address.")
        if any(customer.email == email for customer in self.customers.values()):
            raise ToolError(f"{email} belongs to an account already.")
        customer = replace(self.customers[customer_id], email=email)
        self.customers[customer_id] = customer
        return customer

    def _put(self, order: Order) -> Order:
        self.orders[order.order_id] = order
        return order

    def _delivered(self, order_id: str) -> Order:
        order = self.order(order_id)
        if order.status != "delivered":
            raise ToolError(f"Order {order_id} is {order.status}; only delivered items come back.")
        return order

    def _item(self, order: Order, item_id: str) -> Item:
        """An item of the order that is still the customer's as it was sent."""
        for item in order.items:
            if item.item_id == item_id:
                if item.status != "ordered":
                    raise ToolError(f"Item {item_id} has been {item.status} already.")
                return item
        known = ", ".join(item.item_id for item in order.items)
        raise ToolError(f"Order {order.order_id} has no item {item_id!r}; its items are {known}.")


def dollars(cents: int) -> str:
    """`1234` as `12.34`."""
    return f"{cents // 100}.{cents % 100:02d}"
