"""A shop, made from a seed: products, customers and orders, and the changes that its system allows."""

from __future__ import annotations

import datetime
import random
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


NUM_CUSTOMERS = 120
_STATUSES: tuple[OrderStatus, ...] = ("processing", "shipped", "delivered")
"""Every customer has an order in each."""

_PRODUCTS = {
    "rain jacket": ("small", "medium", "large"),
    "desk lamp": ("black", "white", "brass"),
    "water bottle": ("blue", "green", "steel"),
    "backpack": ("grey", "olive", "navy"),
    "running shoes": ("size 39", "size 41", "size 43"),
    "headphones": ("black", "silver", "red"),
    "tea kettle": ("copper", "white", "black"),
    "wool blanket": ("cream", "rust", "navy"),
    "chess set": ("walnut", "maple", "marble"),
    "garden hose": ("10 metres", "20 metres", "30 metres"),
}
_FIRST = (
    "Ada Ben Cleo Dario Elin Farid Greta Hugo Ines Jonas Kaya Leon Mara Nils Olga Pavel Rosa Sven Tara Umar"
)
_LAST = "Abel Brandt Castro Dahl Ekwall Fontaine Grieg Hansen Ivanov Jensen Keller Lund Moreau Novak Olsen"
_STREETS = ("Mill Lane", "Station Road", "Elm Street", "Harbour Street", "Church Walk", "Park Avenue")
_TOWNS = ("Ashford", "Brookfield", "Carlow", "Denby", "Easton", "Farleigh")


def make_shop(seed: int) -> Shop:
    """The shop of a seed: the same seed gives the same one."""
    rng = random.Random(seed)
    variants = _make_variants(rng)
    customers: dict[str, Customer] = {}
    orders: dict[str, Order] = {}
    names = [f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()]
    for number, name in enumerate(rng.sample(names, NUM_CUSTOMERS)):
        customer = _make_customer(rng, number, name)
        customers[customer.customer_id] = customer
        for status in _STATUSES:
            order = _make_order(rng, f"A{1001 + len(orders)}", customer, status, variants)
            orders[order.order_id] = order
    return Shop(variants=variants, customers=customers, orders=orders)


def make_address(rng: random.Random) -> str:
    """Street, number and town."""
    return f"{rng.randint(1, 99)} {rng.choice(_STREETS)}, {rng.choice(_TOWNS)}"


def _make_variants(rng: random.Random) -> dict[str, Variant]:
    variants: dict[str, Variant] = {}
    for index, (product, options) in enumerate(_PRODUCTS.items()):
        cents = rng.randint(15, 120) * 100 + rng.choice((0, 50, 90, 99))
        sold_out = rng.randrange(len(options))
        for number, option in enumerate(options):
            variant = Variant(
                variant_id=f"V{index + 1:02d}{number + 1}",
                product=product,
                option=option,
                cents=cents,
                in_stock=number != sold_out,
            )
            variants[variant.variant_id] = variant
    return variants


def _make_customer(rng: random.Random, number: int, name: str) -> Customer:
    return Customer(
        customer_id=f"C{number + 1:03d}",
        name=name,
        email=f"{name.lower().replace(' ', '.')}{rng.randint(10, 99)}@mail.example",
        postcode=str(rng.randint(10000, 99999)),
        address=make_address(rng),
        gift_card_cents=rng.choice((0, 0, 1500, 2500)),
    )


def _make_order(
    rng: random.Random,
    order_id: str,
    customer: Customer,
    status: OrderStatus,
    variants: dict[str, Variant],
) -> Order:
    # Delivered orders lie on both sides of the return window; the others are still to come.
    days = -rng.randint(3, 60) if status == "delivered" else rng.randint(2, 12)
    products = rng.sample(sorted(_PRODUCTS), rng.randint(2, 3))
    items = []
    for number, product in enumerate(products):
        variant = rng.choice([v for v in variants.values() if v.product == product])
        items.append(
            Item(item_id=f"{order_id}-{number + 1}", variant_id=variant.variant_id, cents=variant.cents)
        )
    return Order(
        order_id=order_id,
        customer_id=customer.customer_id,
        status=status,
        items=tuple(items),
        address=customer.address,
        delivery_date=TODAY + datetime.timedelta(days=days),
    )
