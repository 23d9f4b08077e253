"""A shop made from a seed."""

from __future__ import annotations

import datetime
import random

from polyturn.envs.customer_service.records import TODAY, Customer, Item, Order, OrderStatus, Shop, Variant

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
    "Ada",
    "Ben",
    "Cleo",
    "Dario",
    "Elin",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kaya",
    "Leon",
    "Mara",
    "Nils",
    "Olga",
    "Pavel",
    "Rosa",
    "Sven",
    "Tara",
    "Umar",
)
_LAST = (
    "Abel",
    "Brandt",
    "Castro",
    "Dahl",
    "Ekwall",
    "Fontaine",
    "Grieg",
    "Hansen",
    "Ivanov",
    "Jensen",
    "Keller",
    "Lund",
    "Moreau",
    "Novak",
    "Olsen",
)
_STREETS = ("Mill Lane", "Station Road", "Elm Street", "Harbour Street", "Church Walk", "Park Avenue")
_TOWNS = ("Ashford", "Brookfield", "Carlow", "Denby", "Easton", "Farleigh")


def make_shop(seed: int) -> Shop:
    """The shop of a seed: the same seed gives the same one."""
    rng = random.Random(seed)
    variants = _make_variants(rng)
    customers: dict[str, Customer] = {}
    orders: dict[str, Order] = {}
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
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
